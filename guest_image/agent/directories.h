/* Directories that an image names but does not contain. */
#ifndef FCVM_DIRECTORIES_H
#define FCVM_DIRECTORIES_H

/* mkdir -p, as root and with mode 0755: an absolute path, or one below the directory `base`. 0, or -1 with errno. */
int directories_make(int base, const char *path);

#endif
