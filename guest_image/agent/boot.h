/* What PID 1 does before it can serve: mounts, kernel modules, limits. */
#ifndef FCVM_BOOT_H
#define FCVM_BOOT_H

#include <stdbool.h>

void boot_mount(void);
void boot_load_modules(void);

/* Allow more descriptors than the streams can use. (The agent keeps oom_score_adj at 0, which its children inherit: the
 * kernel never kills process 1 for memory, see oom_unkillable_task in mm/oom_kill.c.) */
void boot_raise_limits(void);

/* Wait until `is_there` returns true; call it again at every device event of the kernel. False after `seconds`. */
bool boot_wait_for(bool (*is_there)(const void *argument), const void *argument, int seconds);

#endif
