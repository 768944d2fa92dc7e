/* Child processes: starting and reaping them, and killing those that are no longer wanted. */
#ifndef FCVM_CHILD_H
#define FCVM_CHILD_H

#include <stdint.h>

#include "launch.h"

struct child {
    pid_t pid; /* also its process group; 0 when not running */
    int64_t kill_at; /* 0: no SIGHUP was sent */
    bool reaped;
    int wait_status;
    void (*ended)(struct child *child, int wait_status);
    struct child_status *status;
    struct child *next, *previous;
};

/* Begin reaping: SIGCHLD comes as an event. Also map the memory of every struct child_status. */
void child_open(void);

/* Launch a child and list it. A failure leaves nothing behind. */
int child_start(struct child *child, struct launch *how, struct failure *failure);

/* Release the status of a child that has ended. */
void child_release(struct child *child);

/* Wait for the end of a child, without the event loop. */
void child_reap_now(struct child *child);

/* Send SIGHUP to the process group now, and SIGKILL after a second. */
void child_hang_up(struct child *child);

/* Put in EXIT_CODE or EXIT_SIGNAL, and the MESSAGE of a child that could not start. */
struct reply;
void child_put_end(struct reply *reply, const struct child *child);

#endif
