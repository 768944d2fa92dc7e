/* Copies of directories inside the guest, with all their metadata. */
#ifndef FCVM_COPY_TREE_H
#define FCVM_COPY_TREE_H

#include <stdint.h>

struct tree_size {
    uint64_t bytes, files;
};

/* Add up the sizes below the directory `from`, itself included. 0, or -1 with errno. */
int copy_tree_measure(int from, struct tree_size *size);

/* Copy the directory `from` into `to`, an empty one, with owner, mode, times, extended attributes, links and devices.
 * Sockets are left out. 0, or -1 with errno. */
int copy_tree(int from, int to);

#endif
