/* The hook command of PERSONALISE: runs to its end while the workload is still frozen. */
#ifndef FCVM_HOOK_H
#define FCVM_HOOK_H

#include "fields.h"

/* Nothing without ARG fields. A failing hook, or one that takes over 10 s (it is killed), fails with what it printed. */
int hook_run(const struct body *body, struct failure *failure);

#endif
