/* Child processes: their notices, their ends, and killing those that nobody wants any more. */
#ifndef FCVM_CHILD_H
#define FCVM_CHILD_H

#include <stdint.h>

#include "launch.h"

struct child {
    pid_t pid; /* also its process group; 0 when not running */
    int64_t kill_at; /* 0: not hung up */
    bool reaped;
    int status;
    void (*ended)(struct child *child, int status);
    struct notice *notice;
    struct child *next, *previous;
};

/* Begin reaping: SIGCHLD comes as an event. Also makes the memory that notices live in. */
void child_open(void);

/* Launch and list it; on failure nothing is left over. */
int child_start(struct child *child, struct launch *how, struct failure *failure);

/* Forget the notice of a child that has ended. */
void child_release(struct child *child);

/* Wait for its end while the event loop stands still. */
void child_reap_now(struct child *child);

/* SIGHUP to its process group now, SIGKILL after a second. */
void child_hang_up(struct child *child);

/* EXIT_CODE or EXIT_SIGNAL, and the MESSAGE of a child that could not start. */
struct reply;
void child_put_status(struct reply *reply, const struct child *child, int status);

#endif
