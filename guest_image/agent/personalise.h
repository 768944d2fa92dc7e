/* Freezing the workload before a snapshot, and giving a clone its identity. */
#ifndef FCVM_PERSONALISE_H
#define FCVM_PERSONALISE_H

#include <stdbool.h>

#include "fields.h"

int personalise_quiesce(const struct body *body, struct reply *reply, struct failure *failure);
int personalise_suspend(const struct body *body, struct reply *reply, struct failure *failure);
int personalise_freeze(const struct body *body, struct reply *reply, struct failure *failure);
int personalise(const struct body *body, struct reply *reply, struct failure *failure);

/* Whether the workload stays frozen until the host has sent the time of day. Call it right before the REPLY is written. */
bool personalise_leaves_frozen(const struct body *body);

/* Thaw the workload, after the REPLY is written. */
void personalise_thaw(void);

#endif
