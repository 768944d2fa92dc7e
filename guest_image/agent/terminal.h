/* Pseudo-terminals of the workload's own devpts, so that a program finds its terminal by name. */
#ifndef FCVM_TERMINAL_H
#define FCVM_TERMINAL_H

#include <stdint.h>

#include "report.h"

enum { TERMINAL_END_OF_FILE = 4 }; /* what the key Ctrl-D types */

struct terminal_size {
    uint16_t rows, columns;
};

/* The controlling end, non-blocking, and in *program the other; -1 when there is none to be had. */
int terminal_open(struct terminal_size size, int *program, struct failure *failure);

/* The foreground process group learns of it by SIGWINCH. */
void terminal_resize(int terminal, struct terminal_size size);

#endif
