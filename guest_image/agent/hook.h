/* The hook command of PERSONALISE: runs to its end while the workload is still frozen. */
#ifndef FCVM_HOOK_H
#define FCVM_HOOK_H

#include "fields.h"

/* Run the hook of the ARG fields, if there are any. A hook that fails, or is killed after 10 s, fails the request with the
 * end of its output. */
int hook_run(const struct body *body, struct failure *failure);

#endif
