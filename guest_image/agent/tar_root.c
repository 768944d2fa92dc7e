#include "tar_root.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tar_place.h"

static char name[TAR_PATH]; /* the root's, below the base; "" is the base itself */

static int empty_directory(int fd)
{
    struct dirent *item;
    DIR *directory = fdopendir(fd);
    int result = 0;

    if (!directory)
        return -1;
    while (result == 0 && (item = readdir(directory))) {
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0)
            continue;
        if (unlinkat(fd, item->d_name, 0) == 0)
            continue;
        int inside = errno == EISDIR ? openat(fd, item->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
        result = inside < 0 || empty_directory(inside) || unlinkat(fd, item->d_name, AT_REMOVEDIR) ? -1 : 0;
    }
    int error = errno;
    closedir(directory);
    errno = error;
    return result;
}

/* Empty the directory: it gets mode, owner and time of the archive's root. */
static int hide_directory(const char *path)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    return fd < 0 ? -1 : empty_directory(fd);
}

int tar_root_open(const char *place, const struct tar_entry *root, bool hides, const struct user *user)
{
    static char path[PATH_MAX];
    struct stat status;

    if (strlen(place) >= sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    if (!realpath(place, path))
        strcpy(path, place);
    for (size_t length = strlen(path); length > 1 && path[length - 1] == '/'; length--)
        path[length - 1] = 0;
    bool is_there = stat(path, &status) == 0 && S_ISDIR(status.st_mode);
    bool is_directory = root->type == TAR_DIRECTORY;
    if (is_there && hides && !is_directory) {
        errno = EISDIR;
        return -1;
    }
    if (is_there && hides && hide_directory(path))
        return -1;
    if (is_there) {
        strcpy(name, is_directory ? "" : root->path);
        return tar_open_base(path, user);
    }
    char *slash = strrchr(path, '/');
    strcpy(name, slash ? slash + 1 : path);
    *(slash ? slash : path) = 0;
    return tar_open_base(*path ? path : "/", user);
}

const char *tar_root_rename(char path[TAR_PATH])
{
    static char renamed[TAR_PATH];
    const char *rest = path + strcspn(path, "/");

    rest += *name ? 0 : strspn(rest, "/");
    if (strlen(name) + strlen(rest) >= TAR_PATH)
        return "a path is too long";
    strcpy(renamed, name);
    strcat(renamed, rest);
    strcpy(path, renamed);
    return NULL;
}
