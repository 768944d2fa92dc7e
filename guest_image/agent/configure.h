/* CONFIGURE: everything between an empty initramfs and a guest that can run its workload. */
#ifndef FCVM_CONFIGURE_H
#define FCVM_CONFIGURE_H

#include "fields.h"

/* The name of the workload's cgroup; tests give their own. */
void configure_use_cgroup(const char *name);

int configure(const struct body *body, struct reply *reply, struct failure *failure);

#endif
