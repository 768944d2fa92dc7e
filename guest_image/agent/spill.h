/* Output of processes that a command has left running: read and discarded, so that they can go on writing. */
#ifndef FCVM_SPILL_H
#define FCVM_SPILL_H

#include "loop.h"

/* Take over a listed source's descriptor, until it has no writer. */
void spill_take(struct source *source);

#endif
