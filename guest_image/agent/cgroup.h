/* The workload's cgroup: freezing it, what it uses, its out-of-memory kills. */
#ifndef FCVM_CGROUP_H
#define FCVM_CGROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "report.h"

/* Mount cgroup2 and make the workload's group, called `name`. */
int cgroup_make(const char *name, struct failure *failure);

/* Tests only: leave nothing behind on the host. */
void cgroup_remove(void);

/* The directory of the group that takes new processes, or -1 where there is none. */
int cgroup_fd(void);

/* A group inside the workload's, for processes that are not the workload's own: a workload that delegates controllers to
 * groups of its own must have no process in the group itself. -1 where there is none. */
int cgroup_side_fd(void);

/* Put new processes into the side group from now on: the group belongs to an init, which cannot delegate its controllers
 * while a process is in the group itself. */
void cgroup_hand_over(void);

/* Move the calling process into the group. */
void cgroup_enter(void);

int cgroup_freeze(struct failure *failure);
int cgroup_thaw(struct failure *failure);
bool cgroup_is_frozen(void);

/* Call back when the group's count of out-of-memory kills may have changed. */
void cgroup_watch_oom(void (*changed)(void));
uint64_t cgroup_oom_kills(void);

/* A number from one of the group's files: the whole file, or the one after `key`. False where there is no such file. */
bool cgroup_number(const char *file, const char *key, uint64_t *value);

#endif
