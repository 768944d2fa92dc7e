#include "streams.h"

#include <errno.h>

#include "output.h"
#include "protocol.h"

enum { BUCKETS = 4096 };

static struct stream *buckets[BUCKETS];
static struct stream *first_ready, *last_ready;
static unsigned open_streams;

bool streams_are_full(void)
{
    return open_streams >= PROTOCOL_STREAMS_MAX;
}

void streams_begin(struct stream *stream, uint32_t id, const struct stream_ops *ops)
{
    struct stream **bucket = &buckets[id % BUCKETS];

    stream->ops = ops;
    stream->id = id;
    stream->may_receive = PROTOCOL_WINDOW;
    stream->may_send[0] = stream->may_send[1] = PROTOCOL_WINDOW;
    stream->same_bucket = *bucket;
    *bucket = stream;
    open_streams++;
}

struct stream *streams_find(uint32_t id)
{
    struct stream *stream = buckets[id % BUCKETS];

    while (stream && stream->id != id)
        stream = stream->same_bucket;
    return stream;
}

static void leave_line(struct stream *stream)
{
    if (!stream->waits_for_turn)
        return;
    *(stream->previous_ready ? &stream->previous_ready->next_ready : &first_ready) = stream->next_ready;
    *(stream->next_ready ? &stream->next_ready->previous_ready : &last_ready) = stream->previous_ready;
    stream->waits_for_turn = false;
}

void streams_end(struct stream *stream)
{
    struct stream **link = &buckets[stream->id % BUCKETS];

    while (*link != stream)
        link = &(*link)->same_bucket;
    *link = stream->same_bucket;
    leave_line(stream);
    open_streams--;
}

void streams_end_all(enum streams_ending why)
{
    for (unsigned i = 0; open_streams && i < BUCKETS; i++)
        while (buckets[i])
            buckets[i]->ops->abandon(buckets[i], why);
}

int streams_take_data(struct stream *stream, const unsigned char *bytes, size_t length, struct failure *failure)
{
    if (!stream->ops->data || stream->input_ended)
        return fail_with(failure, EPROTO, "DATA for stream %u, which takes none", stream->id);
    if (length > stream->may_receive)
        return fail_with(failure, EPROTO, "%zu bytes of DATA for stream %u, %u beyond its credit", length, stream->id,
                         (unsigned)(length - stream->may_receive));
    stream->may_receive -= (uint32_t)length;
    stream->ops->data(stream, bytes, length);
    return 0;
}

int streams_take_eof(struct stream *stream, struct failure *failure)
{
    if (!stream->ops->eof || stream->input_ended)
        return fail_with(failure, EPROTO, "EOF for stream %u, which takes none", stream->id);
    stream->input_ended = true;
    stream->ops->eof(stream);
    return 0;
}

int streams_grant(struct stream *stream, uint8_t channel, uint32_t bytes, struct failure *failure)
{
    if (stream->may_send[channel] > UINT64_MAX / 2)
        return fail_with(failure, EPROTO, "too much credit for stream %u", stream->id);
    stream->may_send[channel] += bytes;
    if (stream->ops->emit)
        streams_ready(stream);
    return 0;
}

void streams_abandon(struct stream *stream)
{
    stream->ops->abandon(stream, STREAMS_CLOSED);
}

void streams_resize(struct stream *stream, uint16_t rows, uint16_t columns)
{
    if (stream->ops->resize)
        stream->ops->resize(stream, rows, columns);
}

int streams_signal(struct stream *stream, int number, struct failure *failure)
{
    if (!stream->ops->signal)
        return fail_with(failure, EPROTO, "SIGNAL for stream %u, which is not an exec", stream->id);
    stream->ops->signal(stream, number);
    return 0;
}

void streams_consumed(struct stream *stream, size_t length)
{
    stream->consumed += (uint32_t)length;
    if (stream->consumed < PROTOCOL_WINDOW / 2)
        return;
    output_window(stream->id, 0, stream->consumed);
    stream->may_receive += stream->consumed;
    stream->consumed = 0;
}

void streams_ready(struct stream *stream)
{
    if (stream->waits_for_turn)
        return;
    stream->waits_for_turn = true;
    stream->next_ready = NULL;
    stream->previous_ready = last_ready;
    *(last_ready ? &last_ready->next_ready : &first_ready) = stream;
    last_ready = stream;
}

bool streams_take_turn(void)
{
    struct stream *stream = first_ready;

    if (!stream)
        return false;
    leave_line(stream);
    if (stream->ops->emit(stream))
        streams_ready(stream);
    return true;
}
