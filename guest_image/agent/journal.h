/* The journal of a guest whose init is systemd: journalctl looks for it by machine id, journald goes on writing by the old. */
#ifndef FCVM_JOURNAL_H
#define FCVM_JOURNAL_H

#include <sys/types.h>

/* Let the journal of one machine id be found by another, in the root of process `init`; nothing where there is none. */
void journal_rename(pid_t init, const char *from, const char *to);

#endif
