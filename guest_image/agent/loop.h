/* The event loop: one epoll, every descriptor registered once and edge-triggered, no periodic wakeup. */
#ifndef FCVM_LOOP_H
#define FCVM_LOOP_H

#include <stdbool.h>
#include <stdint.h>

struct source {
    int fd; /* -1 when closed */
    void (*ready)(struct source *source, uint32_t events);
};

/* A deadline. `ring` runs once, at or after `at`; 0 means not set. */
struct alarm {
    int64_t at;
    void (*ring)(void);
    struct alarm *next;
    bool listed;
};

void loop_open(void);
int loop_add(struct source *source, uint32_t events);

/* Get another event if the source is still ready: for callers that stopped before EAGAIN. */
void loop_again(struct source *source, uint32_t events);

/* Give a listed source's descriptor to another source, which gets an event if the descriptor is ready. */
void loop_move(struct source *from, struct source *to, uint32_t events);

/* Close the source's descriptor. Events already fetched for it are dropped. */
void loop_close(struct source *source);

/* free(3) after the events fetched so far are handled, since they may point into the memory. */
void loop_free(void *memory);

void loop_set_alarm(struct alarm *alarm, int64_t at);
int64_t loop_now_ms(void);

/* Wait for events (not at all when `busy`), call their sources and ring the alarms that are due. */
void loop_turn(bool busy);

#endif
