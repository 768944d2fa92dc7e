/* What a child process reports about its start, in memory that it shares with the agent: no pipe per process. */
#ifndef FCVM_CHILD_STATUS_H
#define FCVM_CHILD_STATUS_H

struct child_status {
    int pid;  /* in its own PID namespace; set, and the agent woken, once the child is in its namespaces */
    int used; /* for the agent's bookkeeping */
    char text[200]; /* why the child failed; empty: it did not */
};

/* In a child, before _exit: report which call failed, with errno. */
void child_status_fail(struct child_status *status, const char *call, const char *subject);
void child_status_fail_with(struct child_status *status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
