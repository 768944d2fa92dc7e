/* Copies of directories inside the guest, with all that a file system keeps of them. */
#ifndef FCVM_COPY_TREE_H
#define FCVM_COPY_TREE_H

#include <stdint.h>

struct tree_size {
    uint64_t bytes, files;
};

/* Add up what the directory `from` holds, itself included. 0, or -1 with errno. */
int copy_tree_measure(int from, struct tree_size *size);

/* Make `to`, an empty directory, what `from` is: owner, mode, times, extended attributes, links and devices too; sockets
 * are left out. 0, or -1 with errno. */
int copy_tree(int from, int to);

#endif
