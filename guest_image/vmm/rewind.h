/*
 * Rewind: what its files share, and what QEMU asks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef FCVM_REWIND_H
#define FCVM_REWIND_H

/*
 * True while a rewind loads device state. Loading flushes all translated code
 * elsewhere, since QEMU cannot know which of it is still that of the RAM.
 */
extern bool rewind_keeps_translations;

/* Keep what it takes to put RAM back. Refuse RAM that cannot be. */
bool rewind_ram_save(Error **errp);

/* Put RAM back, and drop the code of what changed. Count the guest's pages. */
bool rewind_ram_restore(size_t *pages, Error **errp);

#endif
