/* The last output of a process without a stream: a bounded ring that drops the oldest bytes. */
#ifndef FCVM_RING_H
#define FCVM_RING_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct ring {
    char *bytes;
    size_t start, used;
    uint64_t dropped; /* bytes, all of them where there was no memory for the ring */
};

/* Read once from `fd` into the ring. Returns what read returned, with errno. */
ssize_t ring_fill(struct ring *ring, int fd);

/* Remove at most `size` of the oldest bytes. */
size_t ring_take(struct ring *ring, unsigned char *bytes, size_t size);

void ring_free(struct ring *ring);

#endif
