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

/* Report the end of the workload, if it has ended, to a new session. */
void workload_report_end(void);

/* Whether POWEROFF was requested. Its REPLY must be written first. */
bool workload_wants_power_off(void);

/* The process id of a workload that is the init of a system; 0: it is not, or has ended. */
pid_t workload_init(void);

#endif
