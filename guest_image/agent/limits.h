/* Resource limits and kernel settings of what runs in the guest, as container engines give them. */
#ifndef FCVM_LIMITS_H
#define FCVM_LIMITS_H

#include "fields.h"
#include "launch.h"

/* Set SYSCTLs over the engines' own, and remember ULIMITs. */
int limits_configure(const struct body *body, struct failure *failure);

/* In a child, as root: take the limits. 0, or -1 with a notice. */
int limits_apply(struct notice *notice);

#endif
