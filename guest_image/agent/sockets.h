/* Connections that a clone must not keep: those to peers outside the guest, which are not there any more. */
#ifndef FCVM_SOCKETS_H
#define FCVM_SOCKETS_H

#include <stdbool.h>

#include "report.h"

/* Find out once, before any clone, whether the kernel can do it: the first question loads modules. */
void sockets_probe(void);
bool sockets_can_reset(void);

/* Look for such connections in the frozen guest, so that its clones need not when there are none. One that `ends` with
 * its snapshot resets them itself, once for all clones. */
void sockets_note_quiesce(bool ends);

/* Reset every TCP connection that leaves by a NIC of the VM. */
int sockets_reset_foreign(struct failure *failure);

#endif
