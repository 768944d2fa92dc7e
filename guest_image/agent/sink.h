/* DATA on its way into a pipe or socket of the guest: written at once, and kept when that is full. */
#ifndef FCVM_SINK_H
#define FCVM_SINK_H

#include "loop.h"
#include "streams.h"

struct sink {
    struct stream *stream;
    struct source *source;
    unsigned char *kept; /* what did not fit, at most PROTOCOL_WINDOW; made when first needed */
    uint32_t start, end;
    bool is_held;   /* not to be written to yet */
    bool is_broken; /* nobody reads there any more: bytes are taken and dropped */
    int error;      /* of the write that broke it */
};

void sink_put(struct sink *sink, const unsigned char *bytes, size_t length);

/* Write what is kept. True when nothing is left. */
bool sink_flush(struct sink *sink);
void sink_free(struct sink *sink);

#endif
