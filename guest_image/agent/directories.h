/* Directories that an image names and has not. */
#ifndef FCVM_DIRECTORIES_H
#define FCVM_DIRECTORIES_H

/* mkdir -p, root's and 0755, of a path below the directory `base` or an absolute one. 0, or -1 with errno. */
int directories_make(int base, const char *path);

#endif
