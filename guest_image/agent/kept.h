/* The last output of a process that nobody listens to: a bounded ring, of which the oldest bytes go. */
#ifndef FCVM_KEPT_H
#define FCVM_KEPT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct kept {
    char *ring;
    size_t start, used;
    uint64_t dropped; /* bytes that went, all of them without memory for the ring */
};

/* Read once from `fd` and keep it. What read returned, errno with it. */
ssize_t kept_fill(struct kept *kept, int fd);

/* Take at most `size` of the oldest bytes out. */
size_t kept_take(struct kept *kept, unsigned char *bytes, size_t size);

void kept_free(struct kept *kept);

#endif
