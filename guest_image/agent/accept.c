#include "accept.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connect.h"
#include "dial.h"
#include "loop.h"
#include "streams.h"

enum { BACKLOG = 128 };

/* An ACCEPT that waits for its connection. */
struct waiting {
    struct stream stream;
    struct listener *listener;
    struct waiting *next;
};

/* A listening socket, from the first ACCEPT for its address until no ACCEPT waits. */
struct listener {
    struct source socket;
    struct target target;
    struct waiting *first;
    struct listener *next;
};

static struct listener *listeners;

static void close_listener(struct listener *listener)
{
    struct listener **at = &listeners;

    while (*at != listener)
        at = &(*at)->next;
    *at = listener->next;
    loop_close(&listener->socket);
    loop_free(listener);
}

static void leave(struct waiting *waiting)
{
    struct waiting **at = &waiting->listener->first;

    while (*at != waiting)
        at = &(*at)->next;
    *at = waiting->next;
    streams_end(&waiting->stream);
    loop_free(waiting);
}

static void abandon(struct stream *stream, enum streams_ending why)
{
    struct waiting *waiting = (struct waiting *)stream;
    struct listener *listener = waiting->listener;

    (void)why;
    leave(waiting);
    if (!listener->first)
        close_listener(listener);
}

static bool emit(struct stream *stream)
{
    (void)stream;
    return false;
}

/* There is no connection yet: DATA and EOF are malformed. */
static const struct stream_ops ops = {.emit = emit, .abandon = abandon};

/* Give the pending connections to the ACCEPTs that wait, the oldest first. */
static void match(struct listener *listener)
{
    while (listener->first) {
        int fd = accept4(listener->socket.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED))
            continue;
        if (fd < 0)
            return;
        uint32_t id = listener->first->stream.id;
        leave(listener->first);
        connect_adopt(id, fd);
    }
}

static void on_listener(struct source *source, uint32_t events)
{
    (void)events;
    match((struct listener *)(void *)((char *)source - offsetof(struct listener, socket)));
}

static struct listener *listen_at(int fd, const struct target *target, struct failure *failure)
{
    const int on = 1;

    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, &target->address.any, target->size) || listen(fd, BACKLOG)) {
        fail(failure, "listen", "");
        return NULL;
    }
    struct listener *listener = calloc(1, sizeof *listener);
    if (!listener) {
        fail_with(failure, ENOMEM, "no memory for a listener");
        return NULL;
    }
    listener->socket = (struct source){.fd = fd, .ready = on_listener};
    listener->target = *target;
    if (loop_add(&listener->socket, EPOLLIN)) {
        fail(failure, "epoll", "a listener");
        free(listener);
        return NULL;
    }
    listener->next = listeners;
    listeners = listener;
    return listener;
}

static struct listener *find_listener(const struct target *target)
{
    struct listener *listener = listeners;

    while (listener && memcmp(&listener->target, target, sizeof *target) != 0)
        listener = listener->next;
    return listener;
}

int accept_open(uint32_t id, const struct body *body, struct failure *failure)
{
    struct target target = {0};
    int fd = dial(body, SOCK_STREAM, &target, failure);

    if (fd < 0)
        return -1;
    struct listener *listener = find_listener(&target);
    if (listener)
        close(fd);
    else
        listener = listen_at(fd, &target, failure);
    struct waiting *waiting = listener ? calloc(1, sizeof *waiting) : NULL;
    if (!listener) {
        close(fd);
        return -1;
    }
    if (!waiting) {
        if (!listener->first)
            close_listener(listener);
        return fail_with(failure, ENOMEM, "no memory for a connection");
    }
    waiting->listener = listener;
    struct waiting **last = &listener->first;
    while (*last)
        last = &(*last)->next;
    *last = waiting;
    streams_begin(&waiting->stream, id, &ops);
    match(listener);
    return 0;
}
