/* Connections that a clone must not keep: those to peers outside the guest, which a clone does not have. */
#ifndef FCVM_SOCKETS_H
#define FCVM_SOCKETS_H

#include <stdbool.h>

#include "report.h"

/* Find out once, before the snapshot, whether the kernel can reset them: the first query loads modules. */
void sockets_probe(void);
bool sockets_can_reset(void);

/* Look for such connections in the frozen guest: its clones need not look if there are none. A guest that `ends` with its
 * snapshot resets them itself, once for all clones. */
void sockets_note_quiesce(bool ends);

/* Reset every TCP connection that leaves by a NIC of the VM. */
int sockets_reset_foreign(struct failure *failure);

#endif
