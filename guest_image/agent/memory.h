/* The guest's memory: how much there is, how much each file system may use, and what is killed when it runs out. */
#ifndef FCVM_MEMORY_H
#define FCVM_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

/* Limits of the file systems in memory, in bytes, and of the files of the writable layer. Even when all of them are full,
 * there is memory for processes: a program that fills them gets ENOSPC, and none is killed. */
struct memory_shares {
    uint64_t layer, shared, files;
};

/* All of the guest's memory, and how much of it programs can still use, in bytes. */
struct memory {
    uint64_t total, available;
};

/* False: the kernel does not report it. */
bool memory_read(struct memory *memory);

/* From now on, run the out-of-memory killer where the kernel would read the same pages of programs again and again.
 * Requires CONFIG_PSI and CONFIG_MAGIC_SYSRQ. */
void memory_end_thrashing(void);

/* `layer` is the wanted size of the writable layer in bytes; 0: half of the memory. A layer on a disk uses no memory.
 * `shared` is the wanted size of /dev/shm; 0: the rest. */
struct memory_shares memory_share(uint64_t layer, bool is_on_disk, uint64_t shared);

#endif
