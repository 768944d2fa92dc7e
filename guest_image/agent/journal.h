/* The journal of systemd in a guest with a new machine id: journalctl reads under the new id, journald writes under the old. */
#ifndef FCVM_JOURNAL_H
#define FCVM_JOURNAL_H

#include <sys/types.h>

/* Make the journal of one machine id findable under another, in the root of process `init`. No journal: do nothing. */
void journal_rename(pid_t init, const char *from, const char *to);

#endif
