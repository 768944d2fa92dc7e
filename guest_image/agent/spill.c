#include "spill.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

struct spill {
    struct source source;
    struct spill *next, *previous;
};

static struct spill *spills;

static void forget(struct spill *spill)
{
    *(spill->previous ? &spill->previous->next : &spills) = spill->next;
    if (spill->next)
        spill->next->previous = spill->previous;
    loop_close(&spill->source);
    loop_free(spill);
}

static void on_output(struct source *source, uint32_t events)
{
    static char bytes[65536];
    ssize_t got = read(source->fd, bytes, sizeof bytes);

    (void)events;
    if (got > 0)
        loop_again(source, EPOLLIN); /* a process that writes without end must not keep the agent here */
    else if (got == 0 || errno != EAGAIN)
        forget((struct spill *)(void *)source);
}

void spill_take(struct source *source)
{
    struct spill *spill = calloc(1, sizeof *spill);

    if (!spill) {
        loop_close(source);
        return;
    }
    spill->source.ready = on_output;
    spill->next = spills;
    if (spills)
        spills->previous = spill;
    spills = spill;
    loop_move(source, &spill->source, EPOLLIN);
}
