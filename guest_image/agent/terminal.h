/* Pseudo-terminals of the workload's devpts, so that a program finds its terminal by name. */
#ifndef FCVM_TERMINAL_H
#define FCVM_TERMINAL_H

#include <stdint.h>

#include "report.h"

enum { TERMINAL_END_OF_FILE = 4 }; /* what the key Ctrl-D types */

struct terminal_size {
    uint16_t rows, columns;
};

/* Return the controlling end, non-blocking, and the other end in *program; -1: there is no terminal. */
int terminal_open(struct terminal_size size, int *program, struct failure *failure);

/* Resize the terminal. The kernel sends SIGWINCH to the foreground process group. */
void terminal_resize(int terminal, struct terminal_size size);

#endif
