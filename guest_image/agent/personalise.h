/* Going to sleep before a snapshot, and waking up in a clone as somebody else. */
#ifndef FCVM_PERSONALISE_H
#define FCVM_PERSONALISE_H

#include <stdbool.h>

#include "fields.h"

int personalise_quiesce(const struct body *body, struct reply *reply, struct failure *failure);
int personalise_park(const struct body *body, struct reply *reply, struct failure *failure);
int personalise_freeze(const struct body *body, struct reply *reply, struct failure *failure);
int personalise(const struct body *body, struct reply *reply, struct failure *failure);

/* Whether the workload is to stay frozen until the host has told the time; the host is about to have the reply. */
bool personalise_leaves_frozen(const struct body *body);

/* Let the workload go on, once the host has been told that all is set. */
void personalise_thaw(void);

#endif
