/* What PID 1 does before it can serve: mounts, kernel modules, limits. */
#ifndef FCVM_BOOT_H
#define FCVM_BOOT_H

#include <stdbool.h>

void boot_mount(void);
void boot_load_modules(void);

/* More descriptors than 1,024 streams can need. (Process 1 is never chosen when memory runs out, whatever its
 * oom_score_adj: oom_unkillable_task in mm/oom_kill.c. Leaving that at 0 spares every child resetting it.) */
void boot_raise_limits(void);

/* Wait until `is_there` says so, asking again at every kernel event of a device. False after `seconds`. */
bool boot_wait_for(bool (*is_there)(const void *argument), const void *argument, int seconds);

#endif
