/* Sessions: find the secret in the input, split the input into frames, refuse malformed ones. */
#ifndef FCVM_SESSION_H
#define FCVM_SESSION_H

#include <stdbool.h>

/* Read and handle what the channel has. True: stopped early to let others run. */
bool session_read(void);

#endif
