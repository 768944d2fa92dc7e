/* Starting processes inside the workload's namespaces and cgroup. */
#ifndef FCVM_LAUNCH_H
#define FCVM_LAUNCH_H

#include <stdbool.h>
#include <sys/types.h>

#include "report.h"

/* What a child says about itself, in memory shared with the agent: no pipe to open, read and close per process. */
struct notice {
    int pid;  /* in its own PID namespace; set (and the agent woken) once its namespaces stand */
    int used; /* for the agent's bookkeeping */
    char text[200];
};

struct launch {
    char **arguments;   /* a program... */
    char **environment;
    const char *directory; /* a workload's is made if it is missing; NULL: / */
    const char *user;      /* NULL: root */
    int (*run)(void *argument, struct notice *notice); /* ...or a function of ours, whose result is the exit code */
    void *argument;
    int input, output, errors; /* become 0, 1, 2 */
    bool is_workload;          /* the first of a new PID namespace */
    bool is_init;              /* a workload that is the init of a system */
    bool has_terminal;         /* 0, 1 and 2 are one, and become the session's own */
    bool is_hook;              /* outside the workload's cgroup, which is frozen */
    struct notice *notice;
};

/* The PID as the agent sees it, or -1. Returns when the child has said its own PID (notice->pid). */
pid_t launch(const struct launch *launch, struct failure *failure);

/* In a child: say on the notice why it fails; for use before _exit. */
void launch_complain(struct notice *notice, const char *call, const char *subject);
void launch_complain_text(struct notice *notice, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
