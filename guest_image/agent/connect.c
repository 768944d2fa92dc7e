#include "connect.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "datagrams.h"
#include "dial.h"
#include "loop.h"
#include "output.h"
#include "protocol.h"
#include "write_buffer.h"
#include "streams.h"

struct connection {
    struct stream stream;
    struct source socket;
    struct write_buffer buffer; /* held until the socket is connected */
    int error;        /* an errno, when the end was not orderly */
    bool owes_reply;  /* it is connected, and the REPLY is not sent */
    bool has_input;   /* the host has sent something */
    bool readable;
    bool output_ended; /* EOF was sent to the host */
    bool input_shut;   /* the host's EOF was passed on */
};

static void finish(struct connection *connection)
{
    loop_close(&connection->socket);
    write_buffer_free(&connection->buffer);
    streams_end(&connection->stream);
    loop_free(connection);
}

/* Close so that the program in the guest sees a reset, as from a peer that went away. */
static void reset(struct connection *connection)
{
    const struct linger at_once = {.l_onoff = 1, .l_linger = 0};

    setsockopt(connection->socket.fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    finish(connection);
}

static void take_error(struct connection *connection)
{
    int error = 0;
    socklen_t size = sizeof error;

    if (getsockopt(connection->socket.fd, SOL_SOCKET, SO_ERROR, &error, &size) == 0 && error)
        connection->error = error;
}

static void refuse(struct connection *connection)
{
    struct reply reply = {0};
    char text[80] = "connect: ";

    strncat(text, strerror(connection->error), sizeof text - strlen(text) - 1);
    reply_text(&reply, FIELD_MESSAGE, text);
    output_reply(connection->stream.id, (uint32_t)connection->error, reply.bytes, reply.used);
    finish(connection);
}

/* Pass on what the host sent, and the host's EOF after the last byte. */
static void push_input(struct connection *connection)
{
    bool is_empty = write_buffer_flush(&connection->buffer);

    if (connection->buffer.is_broken && !connection->error)
        connection->error = connection->buffer.error;
    if (connection->error) {
        streams_ready(&connection->stream);
    } else if (connection->stream.input_ended && is_empty && !connection->input_shut) {
        shutdown(connection->socket.fd, SHUT_WR);
        connection->input_shut = true;
        streams_ready(&connection->stream);
    }
}

static void on_connected(struct connection *connection)
{
    connection->buffer.is_held = false;
    connection->owes_reply = true;
    streams_ready(&connection->stream);
}

static void on_socket(struct source *source, uint32_t events)
{
    struct connection *connection = (struct connection *)(void *)((char *)source - offsetof(struct connection, socket));

    if (events & EPOLLERR)
        take_error(connection);
    if (connection->buffer.is_held) {
        if (connection->error) {
            refuse(connection);
            return;
        }
        if (!(events & EPOLLOUT))
            return; /* not connected yet */
        on_connected(connection);
    }
    if (events & EPOLLOUT)
        push_input(connection);
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        connection->readable = true;
        streams_ready(&connection->stream);
    }
}

static void on_data(struct stream *stream, const unsigned char *bytes, size_t length)
{
    struct connection *connection = (struct connection *)stream;

    connection->has_input = true;
    write_buffer_put(&connection->buffer, bytes, length);
    if (connection->buffer.is_broken)
        push_input(connection);
}

static void on_eof(struct stream *stream)
{
    struct connection *connection = (struct connection *)stream;

    if (!connection->buffer.is_held)
        push_input(connection);
}

static void close_with_error(struct connection *connection)
{
    output_close(connection->stream.id, (uint32_t)connection->error);
    finish(connection);
}

/* Read at most one frame from the socket. True: a frame was sent. */
static bool send_output(struct connection *connection)
{
    size_t size;
    unsigned char *place = output_data_place(&size);

    if (size > connection->stream.may_send[0])
        size = (size_t)connection->stream.may_send[0];
    if (!connection->readable || connection->output_ended || !size)
        return false;
    ssize_t got = recv(connection->socket.fd, place, size, 0);
    if (got > 0) {
        connection->stream.may_send[0] -= (uint64_t)got;
        output_data(connection->stream.id, 0, (size_t)got);
        return true;
    }
    connection->readable = false;
    if (got < 0 && errno != EAGAIN && errno != EINTR && !connection->error)
        connection->error = errno;
    if (got < 0 || connection->error)
        return false;
    output_in_turn(FRAME_EOF, connection->stream.id, "", 1);
    connection->output_ended = true;
    return true;
}

/* Where the host has sent DATA already, send the REPLY together with the peer's answer: each write to the host wakes three
 * processes. */
static bool send_connected(struct connection *connection)
{
    static const unsigned char no_error[4];

    if (connection->has_input && !connection->readable && !connection->error)
        return false;
    output_in_turn(FRAME_REPLY, connection->stream.id, no_error, sizeof no_error);
    connection->owes_reply = false;
    return true;
}

static bool emit(struct stream *stream)
{
    struct connection *connection = (struct connection *)stream;

    if (connection->owes_reply)
        return send_connected(connection);
    if (send_output(connection))
        return true;
    /* Send CLOSE after all that came before the reset. */
    if (connection->error && !connection->readable)
        close_with_error(connection);
    else if (connection->output_ended && connection->input_shut)
        finish(connection);
    return false;
}

static void abandon(struct stream *stream, enum streams_ending why)
{
    (void)why;
    reset((struct connection *)stream);
}

static const struct stream_ops ops = {.data = on_data, .eof = on_eof, .emit = emit, .abandon = abandon};

static struct connection *make(uint32_t id, int fd)
{
    struct connection *connection = calloc(1, sizeof *connection);

    if (!connection)
        return NULL;
    connection->socket = (struct source){.fd = fd, .ready = on_socket};
    connection->buffer =
        (struct write_buffer){.stream = &connection->stream, .source = &connection->socket, .is_held = true};
    if (loop_add(&connection->socket, EPOLLIN | EPOLLOUT | EPOLLRDHUP)) {
        free(connection);
        return NULL;
    }
    streams_begin(&connection->stream, id, &ops);
    return connection;
}

static void send_at_once(int fd)
{
    const int on = 1;

    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

void connect_adopt(uint32_t id, int fd)
{
    static const char text[] = "no memory for a connection";
    struct reply reply = {0};

    send_at_once(fd);
    if (make(id, fd))
        return; /* connected: the REPLY follows at once */
    reply_text(&reply, FIELD_MESSAGE, text);
    output_reply(id, ENOMEM, reply.bytes, reply.used);
    close(fd);
}

static int open_connection(uint32_t id, const struct body *body, struct failure *failure)
{
    struct target target;
    struct connection *connection;
    int fd = dial(body, SOCK_STREAM, &target, failure);
    struct pollfd event = {.fd = fd, .events = POLLOUT};

    if (fd < 0)
        return -1;
    send_at_once(fd);
    if (connect(fd, &target.address.any, target.size) && errno != EINPROGRESS)
        fail(failure, "connect", "");
    else if ((connection = make(id, fd))) {
        if (poll(&event, 1, 0) == 1 && event.revents == POLLOUT)
            on_connected(connection); /* at once, as peers inside the guest do */
        return 0;                     /* otherwise the REPLY follows the connection */
    } else
        fail_with(failure, ENOMEM, "no memory for a connection");
    close(fd);
    return -1;
}

int connect_open(uint32_t id, const struct body *body, struct failure *failure)
{
    const char *protocol = body_text(body, FIELD_PROTO);

    if (!protocol || !*protocol || strcmp(protocol, "tcp") == 0)
        return open_connection(id, body, failure);
    if (strcmp(protocol, "udp") == 0)
        return datagrams_open(id, body, failure);
    return fail_with(failure, EPROTONOSUPPORT, "CONNECT knows tcp and udp, not \"%.20s\"", protocol);
}
