/* CONNECT: TCP connections to the workload, as a peer on its network would make them. */
#ifndef FCVM_CONNECT_H
#define FCVM_CONNECT_H

#include "fields.h"

int connect_open(uint32_t id, const struct body *body, struct failure *failure);

/* Give a connected socket to a stream, and reply. */
void connect_adopt(uint32_t id, int fd);

#endif
