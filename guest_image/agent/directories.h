/* Directories that an image names and has not. */
#ifndef FCVM_DIRECTORIES_H
#define FCVM_DIRECTORIES_H

/* mkdir -p, root's and 0755; what fails shows when the directory is used. */
void directories_make(const char *path);

#endif
