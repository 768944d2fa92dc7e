/* What a program has as stdin, stdout and stderr, and our ends of it: three pipes, or one terminal three times. */
#ifndef FCVM_ENDS_H
#define FCVM_ENDS_H

#include "terminal.h"

enum { PARENT = 0, CHILD = 1 }; /* ours, non-blocking, and the program's */

int ends_make_pipes(int pipes[3][2], struct failure *failure);

/* There is no end of ours to read errors from: it is -1. */
int ends_make_terminal(struct terminal_size size, int pipes[3][2], struct failure *failure);

#endif
