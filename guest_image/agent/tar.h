/* Tar streams on stdin and stdout of a child that runs in the workload's root. */
#ifndef FCVM_TAR_H
#define FCVM_TAR_H

#include <stdint.h>

#include "child_status.h"

enum { TAR_AT_PLACE = 16, TAR_HIDES = 32 };

struct tar_request {
    const char *path;
    const char *user; /* extraction: the owner of what is extracted, in place of the archive's numbers */
    uint64_t flags;   /* extraction: TAR_AT_PLACE, TAR_HIDES */
};

/* Both take a struct tar_request and return an exit code, with the reason in `status` when it is not 0. */
int tar_extract(void *request, struct child_status *status);
int tar_create(void *request, struct child_status *status);

#endif
