#include "write_buffer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protocol.h"

/* Bytes written; all of them when there is no reader. */
static size_t push(struct write_buffer *buffer, const unsigned char *bytes, size_t length)
{
    if (buffer->is_held)
        return 0;
    if (buffer->is_broken || buffer->source->fd < 0)
        return length;
    ssize_t put = write(buffer->source->fd, bytes, length);
    if (put >= 0)
        return (size_t)put;
    if (errno == EAGAIN || errno == EINTR)
        return 0;
    buffer->is_broken = true;
    buffer->error = errno;
    return length;
}

static void store(struct write_buffer *buffer, const unsigned char *bytes, size_t length)
{
    if (!buffer->bytes)
        buffer->bytes = malloc(PROTOCOL_WINDOW);
    if (!buffer->bytes) {
        buffer->is_broken = true;
        buffer->error = ENOMEM;
        return;
    }
    if (buffer->end + length > PROTOCOL_WINDOW) {
        memmove(buffer->bytes, buffer->bytes + buffer->start, buffer->end - buffer->start);
        buffer->end -= buffer->start;
        buffer->start = 0;
    }
    memcpy(buffer->bytes + buffer->end, bytes, length); /* they fit: buffered bytes have not been granted again */
    buffer->end += (uint32_t)length;
}

void write_buffer_put(struct write_buffer *buffer, const unsigned char *bytes, size_t length)
{
    size_t put = buffer->start == buffer->end ? push(buffer, bytes, length) : 0;

    if (put < length)
        store(buffer, bytes + put, length - put);
    streams_consumed(buffer->stream, put);
}

bool write_buffer_flush(struct write_buffer *buffer)
{
    while (buffer->start < buffer->end) {
        size_t put = push(buffer, buffer->bytes + buffer->start, buffer->end - buffer->start);
        if (!put)
            return false;
        buffer->start += (uint32_t)put;
        streams_consumed(buffer->stream, put);
    }
    buffer->start = buffer->end = 0;
    return true;
}

void write_buffer_free(struct write_buffer *buffer)
{
    free(buffer->bytes);
    buffer->bytes = NULL;
}
