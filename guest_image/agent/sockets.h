/* Connections that a clone must not keep: those to peers outside the guest, which are not there any more. */
#ifndef FCVM_SOCKETS_H
#define FCVM_SOCKETS_H

#include <stdbool.h>

#include "report.h"

/* Find out once, before any clone, whether the kernel can do it: the first question loads modules. */
void sockets_probe(void);
bool sockets_can_reset(void);

/* Look for such connections in the frozen guest, so that its clones need not when there are none. */
void sockets_note_quiesce(void);

/* Reset every TCP connection whose peer is not one of the guest's own addresses. */
int sockets_reset_foreign(struct failure *failure);

#endif
