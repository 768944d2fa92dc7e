/* The host's lines in /etc/hosts, among those of the workload. */
#ifndef FCVM_HOSTS_H
#define FCVM_HOSTS_H

#include <stddef.h>

/* Replace the lines `before` in `text` by the lines `after`: remove each line that only `before` has, once, and add at the
 * end those that only `after` has. All other lines stay. `text` must have room for the bytes of `after` and two more behind
 * its `length`. Return the new length. */
size_t hosts_merge(char *text, size_t length, const char *before, const char *after);

#endif
