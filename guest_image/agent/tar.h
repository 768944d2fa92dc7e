/* Tar streams on stdin and stdout of a child that runs in the workload's root. */
#ifndef FCVM_TAR_H
#define FCVM_TAR_H

#include <stdint.h>

#include "launch.h"

enum { TAR_AT_PLACE = 16, TAR_HIDES = 32 };

struct tar_request {
    const char *path;
    const char *user; /* extraction: who is to own what is extracted, instead of the archive's numbers */
    uint64_t flags;   /* extraction: TAR_AT_PLACE, TAR_HIDES */
};

/* Both take a struct tar_request and return an exit code, with a notice when it is not 0. */
int tar_extract(void *request, struct notice *notice);
int tar_create(void *request, struct notice *notice);

#endif
