/* The guest's memory: what there is, what each file system may take of it, and who ends when all of it is taken. */
#ifndef FCVM_MEMORY_H
#define FCVM_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

/* What file systems in memory may take, in bytes, and how many files the writable layer may have. Full at once, the layer and
 * the others leave room for processes: whoever fills them gets ENOSPC, and nobody is killed. */
struct memory_shares {
    uint64_t layer, shared, files;
};

/* All of the guest's memory, and what programs may still have of it, in bytes. */
struct memory {
    uint64_t total, available;
};

/* False where the kernel does not tell. */
bool memory_read(struct memory *memory);

/* From now on, have the kernel kill for memory where it would read the same pages of programs again and again. Needs a kernel
 * with CONFIG_PSI and CONFIG_MAGIC_SYSRQ. */
void memory_end_thrashing(void);

/* `layer` is what the writable layer would have, in bytes; 0: half of the memory. One on a disk takes none. `shared` is what
 * /dev/shm is to have; 0: what is left. */
struct memory_shares memory_share(uint64_t layer, bool is_on_disk, uint64_t shared);

#endif
