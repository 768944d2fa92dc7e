/* DATA on its way into a pipe or socket of the guest: written at once, or buffered while that is full. */
#ifndef FCVM_WRITE_BUFFER_H
#define FCVM_WRITE_BUFFER_H

#include "loop.h"
#include "streams.h"

struct write_buffer {
    struct stream *stream;
    struct source *source;
    unsigned char *bytes; /* what did not fit, at most PROTOCOL_WINDOW; allocated on first use */
    uint32_t start, end;
    bool is_held;   /* buffer everything, do not write yet */
    bool is_broken; /* there is no reader: bytes are dropped */
    int error;      /* of the write that broke it */
};

void write_buffer_put(struct write_buffer *buffer, const unsigned char *bytes, size_t length);

/* Write what is buffered. True: nothing is left. */
bool write_buffer_flush(struct write_buffer *buffer);
void write_buffer_free(struct write_buffer *buffer);

#endif
