#include "sink.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protocol.h"

/* Bytes written, all of them when there is nobody to write to. */
static size_t push(struct sink *sink, const unsigned char *bytes, size_t length)
{
    if (sink->is_held)
        return 0;
    if (sink->is_broken || sink->source->fd < 0)
        return length;
    ssize_t put = write(sink->source->fd, bytes, length);
    if (put >= 0)
        return (size_t)put;
    if (errno == EAGAIN || errno == EINTR)
        return 0;
    sink->is_broken = true;
    sink->error = errno;
    return length;
}

static void keep(struct sink *sink, const unsigned char *bytes, size_t length)
{
    if (!sink->kept)
        sink->kept = malloc(PROTOCOL_WINDOW);
    if (!sink->kept) {
        sink->is_broken = true;
        sink->error = ENOMEM;
        return;
    }
    if (sink->end + length > PROTOCOL_WINDOW) {
        memmove(sink->kept, sink->kept + sink->start, sink->end - sink->start);
        sink->end -= sink->start;
        sink->start = 0;
    }
    memcpy(sink->kept + sink->end, bytes, length); /* fits: what is kept has not been granted again */
    sink->end += (uint32_t)length;
}

void sink_put(struct sink *sink, const unsigned char *bytes, size_t length)
{
    size_t put = sink->start == sink->end ? push(sink, bytes, length) : 0;

    if (put < length)
        keep(sink, bytes + put, length - put);
    streams_consumed(sink->stream, put);
}

bool sink_flush(struct sink *sink)
{
    while (sink->start < sink->end) {
        size_t put = push(sink, sink->kept + sink->start, sink->end - sink->start);
        if (!put)
            return false;
        sink->start += (uint32_t)put;
        streams_consumed(sink->stream, put);
    }
    sink->start = sink->end = 0;
    return true;
}

void sink_free(struct sink *sink)
{
    free(sink->kept);
    sink->kept = NULL;
}
