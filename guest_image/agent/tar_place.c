#include "tar_place.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/openat2.h>

#include "tar_format.h"

static int base = -1;
static uint64_t resolution;
static const struct user *owner;

const char *tar_clean_path(char *path)
{
    char *to = path, *part = path;

    while (*part) {
        size_t length = strcspn(part, "/");
        char *next = part + length + (part[length] == '/');
        if (length == 2 && memcmp(part, "..", 2) == 0)
            return "a path leads upwards";
        if (length && !(length == 1 && *part == '.')) {
            if (to != path)
                *to++ = '/';
            memmove(to, part, length);
            to += length;
        }
        part = next;
    }
    *to = 0;
    return NULL;
}

int tar_open_below(const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolution};

    return (int)syscall(SYS_openat2, base, *path ? path : ".", &how, sizeof how);
}

/* Make the directories above an entry that the archive does not contain. */
static int make_parents(char *directory)
{
    for (char *at = directory;; at++) {
        if (*at != '/' && *at)
            continue;
        char kept = *at;
        *at = 0;
        char *slash = strrchr(directory, '/');
        if (slash)
            *slash = 0;
        int parent = tar_open_below(slash ? directory : "", O_PATH | O_DIRECTORY);
        if (slash)
            *slash = '/';
        const char *name = slash ? slash + 1 : directory;
        int made = parent < 0 ? -1 : mkdirat(parent, name, 0755);
        if (made == 0 && owner)
            fchownat(parent, name, owner->id, owner->group, AT_SYMLINK_NOFOLLOW);
        bool failed = parent < 0 || (made && errno != EEXIST);
        if (parent >= 0)
            close(parent);
        *at = kept;
        if (failed)
            return -1;
        if (!kept)
            return 0;
    }
}

int tar_open_parent(char *path, const char **name)
{
    static char last[TAR_PATH];
    static int parent = -1;
    char *slash = strrchr(path, '/');

    *name = slash ? slash + 1 : path;
    if (slash)
        *slash = 0;
    const char *directory = slash ? path : "";
    if (parent < 0 || strcmp(directory, last) != 0) {
        if (parent >= 0)
            close(parent);
        parent = tar_open_below(directory, O_PATH | O_DIRECTORY);
        if (parent < 0 && errno == ENOENT && slash && make_parents(path) == 0)
            parent = tar_open_below(directory, O_PATH | O_DIRECTORY);
        strcpy(last, directory);
    }
    if (slash)
        *slash = '/';
    return parent;
}

int tar_open_base(const char *path, const struct user *user)
{
    static char cleaned[TAR_PATH];
    struct stat root, target;

    if (strlen(path) >= TAR_PATH) {
        errno = ENAMETOOLONG;
        return -1;
    }
    owner = user;
    base = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    resolution = RESOLVE_IN_ROOT;
    if (base < 0 || fstat(base, &root))
        return -1;
    strcpy(cleaned, path + strspn(path, "/"));
    for (size_t length = strlen(cleaned); length && cleaned[length - 1] == '/'; length--)
        cleaned[length - 1] = 0;
    int fd = tar_open_below(cleaned, O_PATH | O_DIRECTORY);
    if (fd < 0 && errno == ENOENT && make_parents(cleaned) == 0)
        fd = tar_open_below(cleaned, O_PATH | O_DIRECTORY);
    if (fd < 0 || fstat(fd, &target))
        return -1;
    close(base);
    base = fd;
    /* With "/" as the base an absolute symlink of the image is followed. Elsewhere it leads out and is refused. */
    bool is_root = target.st_ino == root.st_ino && target.st_dev == root.st_dev;
    resolution = is_root ? RESOLVE_IN_ROOT : RESOLVE_BENEATH;
    return 0;
}
