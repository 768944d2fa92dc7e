/* CONNECT with PROTO udp: datagrams to one port of the workload and back, as from one peer on its network. */
#ifndef FCVM_DATAGRAMS_H
#define FCVM_DATAGRAMS_H

#include "fields.h"

int datagrams_open(uint32_t id, const struct body *body, struct failure *failure);

#endif
