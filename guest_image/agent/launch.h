/* Starting processes inside the workload's namespaces and cgroup. */
#ifndef FCVM_LAUNCH_H
#define FCVM_LAUNCH_H

#include <stdbool.h>
#include <sys/types.h>

#include "child_status.h"
#include "report.h"

struct launch {
    char **arguments;   /* a program... */
    char **environment;
    const char *directory; /* a workload's is made if it is missing; NULL: / */
    const char *user;      /* NULL: root */
    int (*run)(void *argument, struct child_status *status); /* ...or a function of ours, whose result is the exit code */
    void *argument;
    int input, output, errors; /* become 0, 1, 2 */
    bool is_workload;          /* the first of a new PID namespace */
    bool is_init;              /* a workload that is the init of a system */
    bool has_terminal;         /* 0, 1 and 2 are one, and become the session's own */
    bool is_hook;              /* stays outside the workload's cgroup, which is frozen */
    struct child_status *status;
};

/* The PID as the agent sees it, or -1. Returns once the child has reported its own PID (status->pid). */
pid_t launch(const struct launch *launch, struct failure *failure);

#endif
