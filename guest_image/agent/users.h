/* Users as an image names them, looked up in its own /etc/passwd and /etc/group. */
#ifndef FCVM_USERS_H
#define FCVM_USERS_H

#include <sys/types.h>

#include "child_status.h"

struct user {
    uid_t id;
    gid_t group;
    gid_t groups[1024]; /* its own first */
    size_t group_count;
    char home[4096];
};

/* In a child, in the image's root: look up `name`, which is user|uid[:group|gid]; NULL and "" are root. 0, or -1 with the
 * reason in `status`. */
int users_find(const char *name, struct user *user, struct child_status *status);

int users_become(const struct user *user);

#endif
