/* The workload's output: a ring that holds it, and LOGS streams that read the ring. */
#ifndef FCVM_LOGS_H
#define FCVM_LOGS_H

#include <stdbool.h>
#include <stdint.h>

#include "fields.h"

/* Read the workload's output from `fd` from now on. */
int logs_follow(int fd);

/* The workload has ended: the pipe holds the rest of its output. */
void logs_end(void);

/* Move what the pipe has into the ring. True: stopped early to let others run. */
bool logs_pump(void);

/* Bytes that were overwritten before any reader was sent them. */
uint64_t logs_dropped(void);

int logs_open(uint32_t id, const struct body *body, struct failure *failure);

#endif
