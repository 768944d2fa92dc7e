/* Streams with a process at their end: commands, and tar in both directions. */
#ifndef FCVM_EXEC_H
#define FCVM_EXEC_H

#include "fields.h"

int exec_open(uint32_t id, const struct body *body, struct failure *failure);
int exec_attach(uint32_t id, const struct body *body, struct failure *failure);
int exec_open_tar_in(uint32_t id, const struct body *body, struct failure *failure);
int exec_open_tar_out(uint32_t id, const struct body *body, struct failure *failure);

#endif
