#include "logs.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "loop.h"
#include "output.h"
#include "protocol.h"
#include "streams.h"

enum { RING = 1048576, READ_PER_TURN = 262144, STALL_MS = 1000, LINE_SEARCH = 4096 };
enum { ONLY_UNSENT = 8 };

struct reader {
    struct stream stream;
    struct reader *next;
    uint64_t at;   /* of the next byte to send, counted from the first byte ever written */
    bool stalled;  /* it did not read for STALL_MS while the ring was full: the workload no longer waits for it */
    bool mid_line; /* the last byte sent was no newline */
};

static void on_output(struct source *source, uint32_t events);
static void note_overdue(void);

static char ring[RING];
static uint64_t written; /* bytes in all */
static uint64_t sent;    /* bytes that at least one reader was sent */
static uint64_t dropped;
static struct source output = {.fd = -1, .ready = on_output};
static bool may_have_more, workload_ended, finished;
static bool is_overdue; /* the ring has been full for STALL_MS */
static struct reader *readers;
static struct alarm stall_alarm = {.ring = note_overdue};

static uint64_t oldest(void)
{
    return written > RING ? written - RING : 0;
}

uint64_t logs_dropped(void)
{
    return dropped;
}

static void on_output(struct source *source, uint32_t events)
{
    (void)source;
    (void)events;
    may_have_more = true;
}

int logs_follow(int fd)
{
    output.fd = fd;
    may_have_more = true;
    return loop_add(&output, EPOLLIN);
}

void logs_end(void)
{
    workload_ended = may_have_more = true;
}

/* How many bytes fit without overwriting what a reader that is not stalled has still to read. */
static uint64_t room(void)
{
    uint64_t space = RING;

    for (struct reader *reader = readers; reader; reader = reader->next) {
        if (reader->stalled)
            continue;
        uint64_t left = reader->at + RING - written;
        if (left < space)
            space = left;
    }
    return space;
}

static void note_overdue(void)
{
    /* Do not give up on the readers yet: the whole guest may have been paused, and the host's grants may wait to be read. */
    is_overdue = may_have_more = true;
}

static void give_up_on_stalled(void)
{
    for (struct reader *reader = readers; reader; reader = reader->next)
        if (reader->at + RING == written)
            reader->stalled = true;
}

static void ready_readers(void)
{
    for (struct reader *reader = readers; reader; reader = reader->next)
        streams_ready(&reader->stream);
}

static void take_output(size_t limit)
{
    size_t place = (size_t)(written % RING);
    size_t size = RING - place < limit ? RING - place : limit;
    ssize_t got = read(output.fd, ring + place, size);

    if (got > 0) {
        uint64_t kept_from = oldest() > sent ? oldest() : sent;
        written += (uint64_t)got;
        dropped += oldest() > kept_from ? oldest() - kept_from : 0;
        return;
    }
    if (got < 0 && errno == EINTR)
        return;
    may_have_more = false;
    if (got == 0 || workload_ended) {
        loop_close(&output);
        finished = true;
    }
}

bool logs_pump(void)
{
    uint64_t before = written;

    while (output.fd >= 0 && may_have_more && written - before < READ_PER_TURN) {
        if (!room() && is_overdue)
            give_up_on_stalled();
        is_overdue = false;
        uint64_t space = room();
        if (!space) {
            if (!stall_alarm.at)
                loop_set_alarm(&stall_alarm, loop_now_ms() + STALL_MS);
            break;
        }
        stall_alarm.at = 0;
        take_output(space < READ_PER_TURN ? (size_t)space : READ_PER_TURN);
    }
    if (written != before || finished)
        ready_readers();
    return output.fd >= 0 && may_have_more && room();
}

/* Skip what was overwritten, up to the next line, and put a note into the stream. */
static void send_marker(struct reader *reader)
{
    uint64_t from = reader->at;
    size_t size;
    char *place = (char *)output_data_place(&size);

    reader->at = oldest();
    for (uint64_t i = reader->at; i < written && i < reader->at + LINE_SEARCH; i++)
        if (ring[i % RING] == '\n') {
            reader->at = i + 1;
            break;
        }
    int length = snprintf(place, size, "%s[fcvm: %llu bytes of output were dropped here]\n", reader->mid_line ? "\n" : "",
                          (unsigned long long)(reader->at - from));
    reader->mid_line = false;
    reader->stream.may_send[0] -= (uint64_t)length;
    output_data(reader->stream.id, 0, (size_t)length);
}

static void send_bytes(struct reader *reader)
{
    size_t size;
    unsigned char *place = output_data_place(&size);
    size_t start = (size_t)(reader->at % RING);
    uint64_t length = written - reader->at;

    if (length > size)
        length = size;
    if (length > RING - start)
        length = RING - start;
    if (length > reader->stream.may_send[0])
        length = reader->stream.may_send[0];
    memcpy(place, ring + start, (size_t)length);
    reader->at += length;
    sent = reader->at > sent ? reader->at : sent;
    reader->mid_line = ring[(reader->at - 1) % RING] != '\n';
    reader->stream.may_send[0] -= length;
    output_data(reader->stream.id, 0, (size_t)length);
    if (written - reader->at < RING / 2)
        reader->stalled = false;
}

static void leave(struct reader *reader)
{
    struct reader **link = &readers;

    while (*link != reader)
        link = &(*link)->next;
    *link = reader->next;
    streams_end(&reader->stream);
    loop_free(reader);
}

static bool emit(struct stream *stream)
{
    enum { MARKER_MAX = 80 };
    struct reader *reader = (struct reader *)stream;

    if (reader->at < written) {
        bool lost = reader->at < oldest();
        if (stream->may_send[0] < (lost ? MARKER_MAX : 1))
            return false;
        if (lost)
            send_marker(reader);
        else
            send_bytes(reader);
        return true;
    }
    if (!finished)
        return false;
    output_in_turn(FRAME_EOF, stream->id, "", 1);
    leave(reader);
    return false;
}

static void abandon(struct stream *stream, enum streams_ending why)
{
    (void)why;
    leave((struct reader *)stream);
}

static const struct stream_ops ops = {.emit = emit, .abandon = abandon};

int logs_open(uint32_t id, const struct body *body, struct failure *failure)
{
    struct reader *reader = calloc(1, sizeof *reader);
    uint64_t flags = 0;

    body_number(body, FIELD_FLAGS, &flags);
    if (!reader)
        return fail_with(failure, ENOMEM, "no memory for a log stream");
    streams_begin(&reader->stream, id, &ops);
    reader->at = flags & ONLY_UNSENT ? sent : 0;
    reader->next = readers;
    readers = reader;
    output_reply(id, 0, NULL, 0);
    streams_ready(&reader->stream);
    return 0;
}
