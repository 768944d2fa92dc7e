/* What the host may ask about the guest. */
#ifndef FCVM_INFORMATION_H
#define FCVM_INFORMATION_H

#include "fields.h"

int information_metrics(const struct body *body, struct reply *reply, struct failure *failure);
int information_listening(const struct body *body, struct reply *reply, struct failure *failure);
int information_sync(const struct body *body, struct reply *reply, struct failure *failure);

#endif
