#include "loop.h"

#include <errno.h>
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "report.h"

enum { EVENTS_PER_TURN = 64 };

/* Memory to be freed is chained through its own first bytes. */
struct garbage {
    struct garbage *next;
};

static int epoll_fd = -1;
static struct garbage *garbage;
static struct alarm *alarms;
static struct epoll_event events[EVENTS_PER_TURN];
static int event_count;

void loop_open(void)
{
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        report_fatal("epoll_create1", "");
}

int loop_add(struct source *source, uint32_t wanted)
{
    struct epoll_event event = {.events = wanted | EPOLLET, .data.ptr = source};

    return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, source->fd, &event);
}

void loop_again(struct source *source, uint32_t wanted)
{
    struct epoll_event event = {.events = wanted | EPOLLET, .data.ptr = source};

    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, source->fd, &event);
}

static void drop_events(const struct source *source)
{
    for (int i = 0; i < event_count; i++)
        if (events[i].data.ptr == source)
            events[i].data.ptr = NULL;
}

void loop_move(struct source *from, struct source *to, uint32_t wanted)
{
    to->fd = from->fd;
    from->fd = -1;
    drop_events(from);
    loop_again(to, wanted);
}

void loop_close(struct source *source)
{
    if (source->fd < 0)
        return;
    /* Closing alone is not enough: a child that has not called exec yet still holds the open file. */
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, source->fd, NULL);
    close(source->fd);
    source->fd = -1;
    drop_events(source);
}

void loop_free(void *memory)
{
    struct garbage *item = memory;

    if (!item)
        return;
    item->next = garbage;
    garbage = item;
}

static void collect_garbage(void)
{
    while (garbage) {
        struct garbage *item = garbage;
        garbage = item->next;
        free(item);
    }
}

int64_t loop_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void loop_set_alarm(struct alarm *alarm, int64_t at)
{
    alarm->at = at;
    if (!alarm->listed) {
        alarm->listed = true;
        alarm->next = alarms;
        alarms = alarm;
    }
}

static int next_timeout_ms(void)
{
    int64_t first = 0;

    for (struct alarm *alarm = alarms; alarm; alarm = alarm->next)
        if (alarm->at && (!first || alarm->at < first))
            first = alarm->at;
    if (!first)
        return -1;
    int64_t left = first - loop_now_ms();
    if (left < 0)
        return 0;
    return left > INT_MAX ? INT_MAX : (int)left;
}

static void ring_due_alarms(void)
{
    int64_t now = 0;

    for (struct alarm *alarm = alarms; alarm; alarm = alarm->next) {
        if (!alarm->at)
            continue;
        if (!now)
            now = loop_now_ms();
        if (alarm->at <= now) {
            alarm->at = 0;
            alarm->ring();
        }
    }
}

void loop_turn(bool busy)
{
    event_count = epoll_wait(epoll_fd, events, EVENTS_PER_TURN, busy ? 0 : next_timeout_ms());
    if (event_count < 0 && errno != EINTR)
        report_fatal("epoll_wait", "");
    for (int i = 0; i < event_count; i++) {
        struct source *source = events[i].data.ptr;
        if (source)
            source->ready(source, events[i].events);
    }
    event_count = 0;
    ring_due_alarms();
    collect_garbage();
}
