/* Resource limits and kernel settings of programs in the guest, as container engines set them. */
#ifndef FCVM_LIMITS_H
#define FCVM_LIMITS_H

#include "child_status.h"
#include "fields.h"

/* Set the default sysctls and then SYSCTL*, and remember ULIMIT*. */
int limits_configure(const struct body *body, struct failure *failure);

/* In a child, as root: set the limits. 0, or -1 with the reason in `status`. */
int limits_apply(struct child_status *status);

#endif
