/* stdin, stdout and stderr of a program and our ends of them: three pipes, or one terminal three times. */
#ifndef FCVM_CHILD_STDIO_H
#define FCVM_CHILD_STDIO_H

#include "terminal.h"

enum { PARENT = 0, CHILD = 1 }; /* our end, non-blocking, and the program's */

int child_stdio_pipes(int pipes[3][2], struct failure *failure);

/* Our end of stderr is -1: a terminal has one output. */
int child_stdio_terminal(struct terminal_size size, int pipes[3][2], struct failure *failure);

#endif
