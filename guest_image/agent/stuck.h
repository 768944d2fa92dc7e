/* Which tasks of a cgroup keep it from being frozen. */
#ifndef FCVM_STUCK_H
#define FCVM_STUCK_H

#include <stdbool.h>
#include <stddef.h>

/* Look at every task of the group (its path below the root of cgroup2) and of groups inside it. `names` receives those
 * that sleep in the kernel without taking signals ("stat (pid 12)"), and those that run. True: some sleep so and none
 * runs. Whoever is told to freeze never gets from there to an instruction of its program. */
bool stuck_in_kernel(const char *group, char *names, size_t size);

#endif
