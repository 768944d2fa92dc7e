/* Where an archive's one root goes when its place is named, as with cp. */
#ifndef FCVM_TAR_ROOT_H
#define FCVM_TAR_ROOT_H

#include <stdbool.h>

#include "tar_format.h"
#include "users.h"

/* Open the base for an archive whose first entry, `root`, goes to `place`. If `place` is a directory, a file goes into it,
 * and a directory merges with it; with `hides` the directory is emptied first. 0, or -1 with errno. */
int tar_root_open(const char *place, const struct tar_entry *root, bool hides, const struct user *user);

/* Turn a clean path of the archive into one below that base. NULL, or what is wrong. */
const char *tar_root_rename(char path[TAR_PATH]);

#endif
