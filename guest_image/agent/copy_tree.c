#include "copy_tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { VALUE_MAX = 65536, LINK_MAX = 4096, CHUNK = 1 << 20 };

/* A file with several names: the first copy, by a descriptor that lets the others be linked to it. */
struct linked {
    ino_t inode;
    int copy;
    struct linked *next;
};

static struct linked *linked;

typedef int visit(int directory, const char *name, const struct stat *status, void *with);

/* Call `each` for every name in a directory until one fails. */
static int walk(int directory, visit *each, void *with)
{
    struct dirent *item;
    struct stat status;
    int result = 0, again = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *listing = again < 0 ? NULL : fdopendir(again);

    if (!listing)
        return -1;
    while (result == 0 && (item = readdir(listing))) {
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0)
            continue;
        result = fstatat(directory, item->d_name, &status, AT_SYMLINK_NOFOLLOW) ? -1
                                                                              : each(directory, item->d_name, &status, with);
    }
    closedir(listing);
    return result;
}

static int measure_one(int directory, const char *name, const struct stat *status, void *with)
{
    struct tree_size *size = with;

    size->files++;
    size->bytes += S_ISREG(status->st_mode) ? (uint64_t)status->st_size : 0;
    if (!S_ISDIR(status->st_mode))
        return 0;
    int below = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result = below < 0 ? -1 : walk(below, measure_one, size);
    if (below >= 0)
        close(below);
    return result;
}

int copy_tree_measure(int from, struct tree_size *size)
{
    size->files++;
    return walk(from, measure_one, size);
}

/* Attributes of the overlay's bookkeeping do not belong to the image. */
static int copy_attributes(int from, int to)
{
    static char names[VALUE_MAX], value[VALUE_MAX];
    ssize_t length = flistxattr(from, names, sizeof names);

    for (char *name = names; length > 0 && name < names + length; name += strlen(name) + 1) {
        ssize_t size = strstr(name, ".overlay.") ? -1 : fgetxattr(from, name, value, sizeof value);
        if (size >= 0 && fsetxattr(to, name, value, (size_t)size, 0) && errno != ENOTSUP)
            return -1;
    }
    return 0;
}

/* Owner first: a change of owner clears the set-user-id bit and the capabilities. */
static int copy_properties(int from, int to, const struct stat *status)
{
    const struct timespec times[2] = {status->st_atim, status->st_mtim};

    if (fchown(to, status->st_uid, status->st_gid) || fchmod(to, status->st_mode & 07777))
        return -1;
    return copy_attributes(from, to) || futimens(to, times) ? -1 : 0;
}

static int copy_bytes(int from, int to, uint64_t left)
{
    while (left) {
        ssize_t got = sendfile(to, from, NULL, left < CHUNK ? (size_t)left : CHUNK);
        if (got <= 0)
            return got < 0 ? -1 : 0;
        left -= (uint64_t)got;
    }
    return 0;
}

static bool link_known(const struct stat *status, int directory, const char *name)
{
    char path[64];

    for (const struct linked *known = linked; known; known = known->next) {
        if (known->inode != status->st_ino)
            continue;
        snprintf(path, sizeof path, "/proc/self/fd/%d", known->copy);
        return linkat(AT_FDCWD, path, directory, name, AT_SYMLINK_FOLLOW) == 0;
    }
    return false;
}

static void remember(const struct stat *status, int copy)
{
    struct linked *known = malloc(sizeof *known);

    if (!known)
        return; /* the file is copied twice */
    *known = (struct linked){.inode = status->st_ino, .copy = dup(copy), .next = linked};
    linked = known;
}

static void forget_links(void)
{
    while (linked) {
        struct linked *known = linked;
        linked = known->next;
        close(known->copy);
        free(known);
    }
}

static int copy_file(int directory, const char *name, int to, const struct stat *status)
{
    if (status->st_nlink > 1 && link_known(status, to, name))
        return 0;
    int source = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    int copy = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int result = source < 0 || copy < 0 || copy_bytes(source, copy, (uint64_t)status->st_size) ||
                         copy_properties(source, copy, status)
                     ? -1
                     : 0;
    if (result == 0 && status->st_nlink > 1)
        remember(status, copy);
    if (source >= 0)
        close(source);
    if (copy >= 0)
        close(copy);
    return result;
}

static int copy_other(int directory, const char *name, int to, const struct stat *status)
{
    const struct timespec times[2] = {status->st_atim, status->st_mtim};
    static char target[LINK_MAX];

    if (S_ISSOCK(status->st_mode))
        return 0;
    if (S_ISLNK(status->st_mode)) {
        ssize_t length = readlinkat(directory, name, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        if (length < 0 || symlinkat(target, to, name))
            return -1;
    } else if (mknodat(to, name, status->st_mode, status->st_rdev)) {
        return -1;
    }
    if (fchownat(to, name, status->st_uid, status->st_gid, AT_SYMLINK_NOFOLLOW))
        return -1;
    if (!S_ISLNK(status->st_mode) && fchmodat(to, name, status->st_mode & 07777, 0))
        return -1;
    return utimensat(to, name, times, AT_SYMLINK_NOFOLLOW);
}

static int copy_directory(int from, int to);

static int copy_one(int directory, const char *name, const struct stat *status, void *with)
{
    int to = *(int *)with;

    if (S_ISREG(status->st_mode))
        return copy_file(directory, name, to, status);
    if (!S_ISDIR(status->st_mode))
        return copy_other(directory, name, to, status);
    int made = mkdirat(to, name, 0700) ? -1 : openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int below = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int result = made < 0 || below < 0 ? -1 : copy_directory(below, made);
    if (made >= 0)
        close(made);
    if (below >= 0)
        close(below);
    return result;
}

static int copy_directory(int from, int to)
{
    struct stat status;

    if (fstat(from, &status) || walk(from, copy_one, &to))
        return -1;
    return copy_properties(from, to, &status);
}

int copy_tree(int from, int to)
{
    int result = copy_directory(from, to), error = errno;

    forget_links();
    errno = error;
    return result;
}
