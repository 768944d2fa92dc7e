/* Where an archive's one root goes when a place is named for it, as cp has it. */
#ifndef FCVM_TAR_ROOT_H
#define FCVM_TAR_ROOT_H

#include <stdbool.h>

#include "tar_format.h"
#include "users.h"

/* Open the base for the archive whose first entry is `root` and is to be `place`. A directory that is there takes a root
 * that is none into it, and is one with a root that is a directory; `hides`: nothing is left of what it held. 0, or -1
 * with errno. */
int tar_root_open(const char *place, const struct tar_entry *root, bool hides, const struct user *user);

/* What a clean path of the archive is called below that base. NULL, or what is wrong. */
const char *tar_root_rename(char path[TAR_PATH]);

#endif
