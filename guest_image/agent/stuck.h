/* The tasks that keep a cgroup from being frozen. */
#ifndef FCVM_STUCK_H
#define FCVM_STUCK_H

#include <stdbool.h>
#include <stddef.h>

/* Look at every task of the group (its path below the root of cgroup2) and of groups inside it. `names` receives those in
 * uninterruptible sleep ("stat (pid 12)") and those that run. True: some sleep so and none runs. A task that sleeps so
 * cannot get back to its program while it is asked to freeze. */
bool stuck_in_kernel(const char *group, char *names, size_t size);

#endif
