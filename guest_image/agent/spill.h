/* Output of what a command has left running: read and thrown away, so that who writes it goes on. */
#ifndef FCVM_SPILL_H
#define FCVM_SPILL_H

#include "loop.h"

/* Take a listed source's descriptor over, until nobody writes there any more. */
void spill_take(struct source *source);

#endif
