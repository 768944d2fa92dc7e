#include "kept.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protocol.h"

enum { RING = PROTOCOL_WINDOW };

static void put(struct kept *kept, const char *bytes, size_t length)
{
    size_t end = (kept->start + kept->used) % RING;
    size_t first = RING - end < length ? RING - end : length;

    memcpy(kept->ring + end, bytes, first);
    memcpy(kept->ring, bytes + first, length - first);
    kept->used += length;
    if (kept->used > RING) {
        kept->dropped += kept->used - RING;
        kept->start = (kept->start + kept->used - RING) % RING;
        kept->used = RING;
    }
}

ssize_t kept_fill(struct kept *kept, int fd)
{
    static char bytes[RING];
    ssize_t got = read(fd, bytes, sizeof bytes);

    if (got <= 0)
        return got;
    if (!kept->ring)
        kept->ring = malloc(RING);
    if (kept->ring)
        put(kept, bytes, (size_t)got);
    else
        kept->dropped += (uint64_t)got;
    return got;
}

size_t kept_take(struct kept *kept, unsigned char *bytes, size_t size)
{
    size_t length = kept->used < size ? kept->used : size;
    size_t first = RING - kept->start < length ? RING - kept->start : length;

    if (!length)
        return 0;
    memcpy(bytes, kept->ring + kept->start, first);
    memcpy(bytes + first, kept->ring, length - first);
    kept->start = (kept->start + length) % RING;
    kept->used -= length;
    if (!kept->used)
        kept_free(kept);
    return length;
}

void kept_free(struct kept *kept)
{
    free(kept->ring);
    kept->ring = NULL;
    kept->start = kept->used = 0;
}
