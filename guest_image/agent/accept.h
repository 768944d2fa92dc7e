/* ACCEPT: connections that programs in the guest make to a port, each taken by a stream of the host's. */
#ifndef FCVM_ACCEPT_H
#define FCVM_ACCEPT_H

#include "fields.h"

int accept_open(uint32_t id, const struct body *body, struct failure *failure);

#endif
