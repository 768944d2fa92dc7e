/* Users as an image names them, looked up in its own /etc/passwd and /etc/group. */
#ifndef FCVM_USERS_H
#define FCVM_USERS_H

#include <sys/types.h>

#include "launch.h"

struct user {
    uid_t id;
    gid_t group;
    gid_t groups[1024]; /* its own first */
    size_t group_count;
    char home[4096];
};

/* For use in a child, in the image's root. `name` is user|uid[:group|gid]; NULL and "" are root. 0, or -1 with a notice. */
int users_find(const char *name, struct user *user, struct notice *notice);

int users_become(const struct user *user);

#endif
