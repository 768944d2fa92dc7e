/* Sessions: finding the secret in the input, splitting it into frames, refusing what is malformed. */
#ifndef FCVM_SESSION_H
#define FCVM_SESSION_H

#include <stdbool.h>
#include <stdint.h>

/* Read and act on what the channel has. True: stopped early to let others run. */
bool session_read(void);

/* Whether a host has said hello, nothing has ended the session since, and it is not parked. */
bool session_is_live(void);

/* The same, parked or not. */
bool session_exists(void);

/* End the session with ERROR and discard input up to the secret. For use while a frame is being handled. */
void session_fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Go silent once what is queued now is written, and discard input up to `secret`. */
void session_quiesce(const unsigned char *secret);

/* The same, but go on with the session where `way_back` comes first. */
void session_park(const unsigned char *secret, const unsigned char *way_back);

#endif
