/* Requests: collecting their bodies, and the table of what the agent can do. */
#ifndef FCVM_REQUESTS_H
#define FCVM_REQUESTS_H

#include <stddef.h>
#include <stdint.h>

#include "streams.h"

void requests_open(uint32_t id, uint8_t kind, uint32_t total, unsigned char *bytes, uint32_t here);
void requests_continue(struct stream *stream, const unsigned char *bytes, uint32_t length);

#endif
