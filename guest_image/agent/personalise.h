/* Going to sleep before a snapshot, and waking up in a clone as somebody else. */
#ifndef FCVM_PERSONALISE_H
#define FCVM_PERSONALISE_H

#include "fields.h"

int personalise_quiesce(const struct body *body, struct reply *reply, struct failure *failure);
int personalise(const struct body *body, struct reply *reply, struct failure *failure);

#endif
