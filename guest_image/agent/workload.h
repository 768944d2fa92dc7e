/* The workload: its start, state and end. */
#ifndef FCVM_WORKLOAD_H
#define FCVM_WORKLOAD_H

#include <stdbool.h>

#include "fields.h"

int workload_start(const struct body *body, struct reply *reply, struct failure *failure);
int workload_status(const struct body *body, struct reply *reply, struct failure *failure);
int workload_stop(const struct body *body, struct reply *reply, struct failure *failure);
int workload_power_off(const struct body *body, struct reply *reply, struct failure *failure);

/* Whether POWEROFF was asked for; its reply goes out first. */
bool workload_wants_power_off(void);

#endif
