/* One of the output pipes of a program, or its terminal: sent to the host, kept in a ring, or discarded. */
#ifndef FCVM_PROGRAM_OUTPUT_H
#define FCVM_PROGRAM_OUTPUT_H

#include <stdbool.h>
#include <stdint.h>

#include "loop.h"
#include "ring.h"

struct exec;
struct stream;

struct program_output {
    struct source source;
    struct exec *owner;
    struct ring ring;    /* what the program wrote while its stream was gone */
    bool is_readable;
    bool closes_at_end;  /* once the program has ended, nobody else may write here */
    bool has_ended;      /* the program has */
    uint32_t left;       /* bytes in the pipe when the program ended, as far as they are not sent yet */
};

/* Note that the program has ended: of a pipe, only what it holds now is still the program's own output. */
void program_output_end(struct program_output *output, bool is_terminal);

/* Send one frame to the host. False where there is nothing to send or no credit. */
bool program_output_send(struct program_output *output, struct stream *stream, uint8_t channel);

/* Read once into the ring. */
void program_output_keep(struct program_output *output);

/* Send no more of it, and let processes that the program has left running write on. */
void program_output_leave(struct program_output *output);

#endif
