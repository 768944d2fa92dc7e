#include "ring.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protocol.h"

enum { RING = PROTOCOL_WINDOW };

static void put(struct ring *ring, const char *bytes, size_t length)
{
    size_t end = (ring->start + ring->used) % RING;
    size_t first = RING - end < length ? RING - end : length;

    memcpy(ring->bytes + end, bytes, first);
    memcpy(ring->bytes, bytes + first, length - first);
    ring->used += length;
    if (ring->used > RING) {
        ring->dropped += ring->used - RING;
        ring->start = (ring->start + ring->used - RING) % RING;
        ring->used = RING;
    }
}

ssize_t ring_fill(struct ring *ring, int fd)
{
    static char bytes[RING];
    ssize_t got = read(fd, bytes, sizeof bytes);

    if (got <= 0)
        return got;
    if (!ring->bytes)
        ring->bytes = malloc(RING);
    if (ring->bytes)
        put(ring, bytes, (size_t)got);
    else
        ring->dropped += (uint64_t)got;
    return got;
}

size_t ring_take(struct ring *ring, unsigned char *bytes, size_t size)
{
    size_t length = ring->used < size ? ring->used : size;
    size_t first = RING - ring->start < length ? RING - ring->start : length;

    if (!length)
        return 0;
    memcpy(bytes, ring->bytes + ring->start, first);
    memcpy(bytes + first, ring->bytes, length - first);
    ring->start = (ring->start + length) % RING;
    ring->used -= length;
    if (!ring->used)
        ring_free(ring);
    return length;
}

void ring_free(struct ring *ring)
{
    free(ring->bytes);
    ring->bytes = NULL;
    ring->start = ring->used = 0;
}
