/* ACCEPT: connections that programs in the guest make to a port, each given to a stream of the host. */
#ifndef FCVM_ACCEPT_H
#define FCVM_ACCEPT_H

#include "fields.h"

int accept_open(uint32_t id, const struct body *body, struct failure *failure);

#endif
