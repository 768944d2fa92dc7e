/* The lines of /etc/hosts that are the host's, among those that the workload has put there. */
#ifndef FCVM_HOSTS_H
#define FCVM_HOSTS_H

#include <stddef.h>

/* Change `text` as if `before` had been `after`: lines of `before` alone go, once each, lines of `after` alone are added at
 * the end; all other lines stay as they are. All three are lists of lines. `text` has room for as many bytes as `after` has,
 * and two, behind its `length`. Return the new length. */
size_t hosts_merge(char *text, size_t length, const char *before, const char *after);

#endif
