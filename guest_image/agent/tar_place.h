/* Where an archive's entries go: below one directory, whatever symlinks the image or the archive has. */
#ifndef FCVM_TAR_PLACE_H
#define FCVM_TAR_PLACE_H

#include <stdint.h>

#include "users.h"

/* Make `path` if it is missing and use it as the base. `user` (or NULL) owns the directories made here. 0, or -1 with
 * errno. */
int tar_open_base(const char *path, const struct user *user);

/* In place: no leading slash, no empty or "." part, no trailing slash; "" is the base itself. NULL, or what is wrong. */
const char *tar_clean_path(char *path);

/* Open a clean path, never outside the base. */
int tar_open_below(const char *path, uint64_t flags);

/* Open the directory that holds a clean path, made if missing, and return the path's last part. Open until the next call. */
int tar_open_parent(char *path, const char **name);

#endif
