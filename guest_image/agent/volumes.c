#include "volumes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "copy_tree.h"
#include "directories.h"
#include "report.h"

enum { SHARE = 2 }; /* the part of the free space that a volume's content may use */

/* Make a directory of the volume's own path below the store, where a reader of the disk finds it. */
static int make_place(int store, const char *path)
{
    if (directories_make(store, path + 1))
        return -1;
    return openat(store, path + 1, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static bool has_room(int store, const struct tree_size *size)
{
    struct statvfs room;

    if (fstatvfs(store, &room))
        return false;
    return size->bytes <= (uint64_t)room.f_bavail * room.f_frsize / SHARE &&
           (!room.f_files || size->files <= room.f_favail / SHARE);
}

/* NULL, or the step that failed, with errno. */
static const char *mount_one(int store, const char *path, int from)
{
    struct tree_size size = {0};
    char place[64];

    if (copy_tree_measure(from, &size))
        return "read";
    if (!has_room(store, &size)) {
        errno = ENOSPC;
        return "copy";
    }
    int to = make_place(store, path);
    if (to < 0)
        return "make";
    snprintf(place, sizeof place, "/proc/self/fd/%d", to);
    const char *step = copy_tree(from, to) ? "copy" : mount(place, path, NULL, MS_BIND, NULL) ? "mount" : NULL;
    close(to);
    return step;
}

/* A directory that is on another file system already, for example inside another volume, stays where it is. */
static bool is_on_overlay(int directory, const struct stat *root)
{
    struct stat status;

    return fstat(directory, &status) == 0 && status.st_dev == root->st_dev;
}

void volumes_mount(int store, char *const *paths)
{
    struct stat root;

    for (; *paths && stat("/", &root) == 0; paths++) {
        directories_make(AT_FDCWD, *paths); /* a failure shows when it is opened */
        int from = open(*paths, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        const char *step = from < 0 ? "open" : is_on_overlay(from, &root) ? mount_one(store, *paths, from) : NULL;
        if (step)
            report("the volume %s is on the overlay: %s: %s", *paths, step, strerror(errno));
        if (from >= 0)
            close(from);
    }
}
