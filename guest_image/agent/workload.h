/* The workload: its start, state and end. */
#ifndef FCVM_WORKLOAD_H
#define FCVM_WORKLOAD_H

#include <stdbool.h>
#include <sys/types.h>

#include "fields.h"

int workload_start(const struct body *body, struct reply *reply, struct failure *failure);
int workload_status(const struct body *body, struct reply *reply, struct failure *failure);
int workload_stop(const struct body *body, struct reply *reply, struct failure *failure);
int workload_power_off(const struct body *body, struct reply *reply, struct failure *failure);

/* Tell a new session of an end that came before it. */
void workload_tell_end(void);

/* Whether POWEROFF was asked for; its reply goes out first. */
bool workload_wants_power_off(void);

/* The first process of a workload that is the init of a system, 0 for any other. */
pid_t workload_init(void);

#endif
