/* The workload's output: a ring that always takes it, and LOGS streams that read the ring. */
#ifndef FCVM_LOGS_H
#define FCVM_LOGS_H

#include <stdbool.h>
#include <stdint.h>

#include "fields.h"

/* Take over the reading end of the workload's output. */
int logs_follow(int fd);

/* The workload has ended: what the pipe still holds is the rest. */
void logs_end(void);

/* Move what the pipe has into the ring. True: stopped early to let others run. */
bool logs_pump(void);

/* Bytes that nobody read before newer ones took their place. */
uint64_t logs_dropped(void);

int logs_open(uint32_t id, const struct body *body, struct failure *failure);

#endif
