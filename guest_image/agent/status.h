/* Queries about the guest: METRICS, LISTENING and SYNC. */
#ifndef FCVM_STATUS_H
#define FCVM_STATUS_H

#include "fields.h"

int status_metrics(const struct body *body, struct reply *reply, struct failure *failure);
int status_listening(const struct body *body, struct reply *reply, struct failure *failure);
int status_sync(const struct body *body, struct reply *reply, struct failure *failure);

#endif
