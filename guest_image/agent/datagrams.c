#include "datagrams.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "dial.h"
#include "loop.h"
#include "output.h"
#include "protocol.h"
#include "streams.h"

enum { PREFIX = 2, DATAGRAM_MAX = 65535 };

/* The stream carries each datagram behind its length: u16, little-endian. */
struct packet {
    unsigned char bytes[PREFIX + DATAGRAM_MAX];
    size_t start, end;
};

struct datagrams {
    struct stream stream;
    struct source socket; /* not connected: an answer may come from another address of the guest */
    struct target target;
    struct packet from_host; /* the part that has arrived */
    struct packet to_host;   /* the part that is not sent yet */
    bool readable;
};

static struct datagrams *owner(struct stream *stream)
{
    return (struct datagrams *)stream;
}

static void finish(struct datagrams *datagrams)
{
    loop_close(&datagrams->socket);
    streams_end(&datagrams->stream);
    loop_free(datagrams);
}

static size_t length_of(const struct packet *packet)
{
    return packet->end < PREFIX ? PREFIX : PREFIX + (size_t)(packet->bytes[0] | packet->bytes[1] << 8);
}

/* Drop a datagram that the network does not accept. */
static void deliver(struct datagrams *datagrams)
{
    const struct packet *packet = &datagrams->from_host;
    const struct target *target = &datagrams->target;

    (void)!sendto(
        datagrams->socket.fd, packet->bytes + PREFIX, packet->end - PREFIX, 0, &target->address.any, target->size);
}

static void on_data(struct stream *stream, const unsigned char *bytes, size_t length)
{
    struct datagrams *datagrams = owner(stream);
    struct packet *packet = &datagrams->from_host;

    for (size_t left = length; left;) {
        size_t missing = length_of(packet) - packet->end;
        size_t taken = left < missing ? left : missing;
        memcpy(packet->bytes + packet->end, bytes, taken);
        packet->end += taken;
        bytes += taken;
        left -= taken;
        if (packet->end >= PREFIX && packet->end == length_of(packet)) {
            deliver(datagrams);
            packet->end = 0;
        }
    }
    streams_consumed(stream, length);
}

static void on_eof(struct stream *stream)
{
    streams_ready(stream);
}

/* Take the next datagram of the guest. False when there is none. */
static bool receive(struct datagrams *datagrams)
{
    struct packet *packet = &datagrams->to_host;
    ssize_t got = recv(datagrams->socket.fd, packet->bytes + PREFIX, DATAGRAM_MAX, 0);

    if (got < 0) {
        datagrams->readable = false;
        return false;
    }
    packet->bytes[0] = (unsigned char)(got & 0xff);
    packet->bytes[1] = (unsigned char)(got >> 8);
    packet->start = 0;
    packet->end = PREFIX + (size_t)got;
    return true;
}

static bool emit(struct stream *stream)
{
    struct datagrams *datagrams = owner(stream);
    struct packet *packet = &datagrams->to_host;
    size_t size;
    unsigned char *place = output_data_place(&size);

    if (packet->start == packet->end && !(datagrams->readable && receive(datagrams))) {
        if (stream->input_ended) {
            output_in_turn(FRAME_EOF, stream->id, "", 1);
            finish(datagrams);
        }
        return false;
    }
    if (size > packet->end - packet->start)
        size = packet->end - packet->start;
    if (size > stream->may_send[0])
        size = (size_t)stream->may_send[0];
    if (!size)
        return false;
    memcpy(place, packet->bytes + packet->start, size);
    packet->start += size;
    stream->may_send[0] -= size;
    output_data(stream->id, 0, size);
    return true;
}

static void abandon(struct stream *stream, enum streams_ending why)
{
    (void)why;
    finish(owner(stream));
}

static const struct stream_ops ops = {.data = on_data, .eof = on_eof, .emit = emit, .abandon = abandon};

static void on_socket(struct source *source, uint32_t events)
{
    struct datagrams *datagrams = (struct datagrams *)(void *)((char *)source - offsetof(struct datagrams, socket));

    if (!(events & (EPOLLIN | EPOLLERR)))
        return;
    datagrams->readable = true;
    streams_ready(&datagrams->stream);
}

int datagrams_open(uint32_t id, const struct body *body, struct failure *failure)
{
    struct datagrams *datagrams = calloc(1, sizeof *datagrams);
    struct target target;
    int fd = dial(body, SOCK_DGRAM, &target, failure);

    if (datagrams && fd >= 0) {
        datagrams->target = target;
        datagrams->socket = (struct source){.fd = fd, .ready = on_socket};
        if (loop_add(&datagrams->socket, EPOLLIN) == 0) {
            streams_begin(&datagrams->stream, id, &ops);
            output_reply(id, 0, NULL, 0);
            return 0;
        }
    }
    if (fd >= 0) {
        close(fd);
        fail_with(failure, ENOMEM, "no memory for datagrams");
    }
    free(datagrams);
    return -1;
}
