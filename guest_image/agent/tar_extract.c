#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "tar.h"
#include "tar_format.h"
#include "tar_place.h"
#include "tar_root.h"
#include "users.h"

enum { BUFFER = 65536, EXTENDED_MAX = 1048576 };

/* A directory that was made here. Its time is set at the end, when nothing more is put into it. */
struct made_directory {
    struct made_directory *next;
    struct timespec time;
    char path[];
};

static unsigned char buffer[BUFFER];
static size_t buffer_start, buffer_end;
static struct tar_entry entry;
static struct tar_overrides overrides, defaults;
static struct made_directory *made_directories;
static struct child_status *own_status;
static struct user owner;
static bool has_owner;
static const struct tar_request *request;
static bool has_base;

/* Keep the first error: it is nearest to the cause. */
static int report_error(const char *call, const char *subject)
{
    if (!own_status->text[0])
        child_status_fail(own_status, call, subject);
    return -1;
}

static int refuse(const char *why)
{
    if (!own_status->text[0])
        child_status_fail_with(own_status, "%s: %.120s", why, entry.path);
    return -1;
}

/* Input */

/* Take up to `size` of the next bytes; 0 at the end of input. */
static size_t take_some(const unsigned char **bytes, uint64_t size)
{
    if (buffer_start == buffer_end) {
        ssize_t got;
        while ((got = read(STDIN_FILENO, buffer, BUFFER)) < 0 && errno == EINTR)
            ;
        buffer_start = 0;
        buffer_end = got > 0 ? (size_t)got : 0;
    }
    size_t here = buffer_end - buffer_start;
    here = here < size ? here : (size_t)size;
    *bytes = buffer + buffer_start;
    buffer_start += here;
    return here;
}

static int take(void *into, size_t size)
{
    const unsigned char *bytes;
    unsigned char *at = into;

    while (size) {
        size_t here = take_some(&bytes, size);
        if (!here)
            return refuse("the archive ends too early, after");
        memcpy(at, bytes, here);
        at += here;
        size -= here;
    }
    return 0;
}

static int skip(uint64_t size)
{
    const unsigned char *bytes;

    while (size) {
        size_t here = take_some(&bytes, size);
        if (!here)
            return refuse("the archive ends too early, after");
        size -= here;
    }
    return 0;
}

/* Entries */

static int own(int directory, const char *name)
{
    uid_t user = has_owner ? owner.id : entry.uid;
    gid_t group = has_owner ? owner.group : entry.gid;

    return fchownat(directory, name, user, group, AT_SYMLINK_NOFOLLOW);
}

static void entry_times(struct timespec times[2])
{
    times[0] = times[1] = (struct timespec){.tv_sec = entry.mtime, .tv_nsec = entry.mtime_ns};
}

static int write_all(int fd, const unsigned char *bytes, size_t size)
{
    while (size) {
        ssize_t put = write(fd, bytes, size);
        if (put < 0)
            return report_error("write", entry.path);
        bytes += put;
        size -= (size_t)put;
    }
    return 0;
}

/* Zeros become a hole, which takes no memory of the guest. */
static bool is_hole(const unsigned char *bytes, size_t size)
{
    enum { PAGE = 4096 };

    return size >= PAGE && !*bytes && memcmp(bytes, bytes + 1, size - 1) == 0;
}

static int extract_file(int directory, const char *name)
{
    struct timespec times[2];
    const unsigned char *bytes;
    uint64_t left = entry.size;
    int fd = openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

    if (fd < 0)
        return report_error("create", entry.path);
    while (left) {
        size_t here = take_some(&bytes, left);
        if (!here || (is_hole(bytes, here) ? lseek(fd, (off_t)here, SEEK_CUR) < 0 : write_all(fd, bytes, here))) {
            close(fd);
            return refuse("the archive ends too early, in");
        }
        left -= here;
    }
    entry_times(times);
    /* Owner first: a change of owner clears the set-user-id bit. */
    int result = ftruncate(fd, (off_t)entry.size) || own(directory, name) || fchmod(fd, entry.mode & 07777) ||
                 futimens(fd, times);
    close(fd);
    return result ? report_error("set the owner, mode or time of", entry.path) : skip(tar_padding(entry.size));
}

static int remember_directory(void)
{
    struct made_directory *made = malloc(sizeof *made + strlen(entry.path) + 1);

    if (!made)
        return report_error("malloc for", entry.path);
    made->time = (struct timespec){.tv_sec = entry.mtime, .tv_nsec = entry.mtime_ns};
    strcpy(made->path, entry.path);
    made->next = made_directories;
    made_directories = made;
    return 0;
}

static void set_directory_times(void)
{
    for (struct made_directory *made = made_directories; made; made = made->next) {
        const struct timespec times[2] = {made->time, made->time};
        int fd = tar_open_below(made->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        if (fd >= 0) {
            futimens(fd, times);
            close(fd);
        }
    }
}

/* A directory that exists already, also through a symlink (/lib), stays as it is. */
static int extract_directory(int directory, const char *name)
{
    int there = tar_open_below(entry.path, O_PATH | O_DIRECTORY);

    if (there >= 0) {
        close(there);
        return 0;
    }
    unlinkat(directory, name, 0);
    if (mkdirat(directory, name, 0700))
        return report_error("mkdir", entry.path);
    if (own(directory, name) || fchmodat(directory, name, entry.mode & 07777, 0))
        return report_error("set the owner or mode of", entry.path);
    return remember_directory();
}

static bool is_placed(void)
{
    return request->flags & (TAR_AT_PLACE | TAR_HIDES);
}

/* Turn a path of the archive into one below the base. NULL, or what is wrong. */
static const char *clean(char path[TAR_PATH])
{
    const char *wrong = tar_clean_path(path);

    return wrong || !is_placed() ? wrong : tar_root_rename(path);
}

static int extract_link(int directory, const char *name)
{
    static char target[TAR_PATH];
    const char *target_name;

    strcpy(target, entry.link);
    const char *wrong = clean(target);
    if (wrong)
        return refuse(wrong);
    int held = dup(directory); /* tar_open_parent closes what it returned last */
    int target_directory = tar_open_parent(target, &target_name);
    int result = target_directory < 0 ? -1 : linkat(target_directory, target_name, held, name, 0);
    close(held);
    return result ? report_error("link", entry.path) : 0;
}

static int extract_node(int directory, const char *name)
{
    mode_t type = entry.type == TAR_FIFO ? S_IFIFO : entry.type == TAR_CHARACTER ? S_IFCHR : S_IFBLK;

    if (mknodat(directory, name, type | 0600, makedev(entry.major, entry.minor)))
        return report_error("mknod", entry.path);
    if (own(directory, name) || fchmodat(directory, name, entry.mode & 07777, 0))
        return report_error("set the owner or mode of", entry.path);
    return 0;
}

static int extract_symlink(int directory, const char *name)
{
    struct timespec times[2];

    if (symlinkat(entry.link, directory, name) || own(directory, name))
        return report_error("symlink", entry.path);
    entry_times(times);
    utimensat(directory, name, times, AT_SYMLINK_NOFOLLOW);
    return 0;
}

static int extract_other(int directory, const char *name)
{
    switch (entry.type) {
    case TAR_HARDLINK:
        return extract_link(directory, name);
    case TAR_SYMLINK:
        return extract_symlink(directory, name);
    case TAR_CHARACTER:
    case TAR_BLOCK_DEVICE:
    case TAR_FIFO:
        return extract_node(directory, name);
    default:
        return refuse("an entry of a type that is not supported");
    }
}

/* The archive's root is the base. With TAR_HIDES the base gets the root's owner, mode and time. */
static int take_base(void)
{
    int fd = request->flags & TAR_HIDES ? tar_open_below("", O_RDONLY | O_DIRECTORY) : -1;

    if (fd >= 0) {
        int result = own(fd, ".") || fchmod(fd, entry.mode & 07777) || remember_directory();
        close(fd);
        if (result)
            return report_error("set the owner or mode of", request->path);
    }
    return skip(entry.size + tar_padding(entry.size));
}

/* Open the base. With a named place it depends on the type of the archive's root. */
static int open_base(void)
{
    const struct user *user = has_owner ? &owner : NULL;

    has_base = true;
    if (!is_placed())
        return tar_open_base(request->path, user) ? report_error("open directory", request->path) : 0;
    const char *wrong = tar_clean_path(entry.path);
    if (wrong || !*entry.path)
        return refuse(wrong ? wrong : "an entry has no name");
    if (tar_root_open(request->path, &entry, request->flags & TAR_HIDES, user))
        return report_error(errno == EISDIR ? "put a file in the place of" : "open", request->path);
    return 0;
}

static int extract_entry(void)
{
    const char *name;

    bool is_file = entry.type == TAR_FILE || entry.type == TAR_CONTIGUOUS;

    if (!has_base && open_base())
        return -1;
    const char *wrong = clean(entry.path);
    if (wrong)
        return refuse(wrong);
    if (!*entry.path)
        return is_file ? refuse("an entry has no name") : take_base();
    int directory = tar_open_parent(entry.path, &name);
    if (directory < 0)
        return report_error("open below the target directory:", entry.path);
    if (entry.type == TAR_DIRECTORY)
        return extract_directory(directory, name) || skip(entry.size + tar_padding(entry.size)) ? -1 : 0;
    if (unlinkat(directory, name, 0) && errno != ENOENT)
        return report_error("replace", entry.path);
    if (is_file)
        return extract_file(directory, name);
    return extract_other(directory, name) || skip(entry.size + tar_padding(entry.size)) ? -1 : 0;
}

/* Extended headers, which describe the entry that follows. */
static int take_extended(void)
{
    size_t size = (size_t)entry.size;
    const char *wrong = NULL;

    if (entry.size > EXTENDED_MAX)
        return refuse("an extended header is too large");
    char *text = malloc(size + 1);
    if (!text)
        return report_error("malloc for", "an extended header");
    if (take(text, size) || skip(tar_padding(size))) {
        free(text);
        return -1;
    }
    text[size] = 0;
    struct tar_overrides *about = entry.type == TAR_PAX_GLOBAL ? &defaults : &overrides;
    if (entry.type == TAR_PAX || entry.type == TAR_PAX_GLOBAL) {
        wrong = tar_decode_pax(text, size, about);
    } else if (strlen(text) >= TAR_PATH) {
        wrong = "a path is too long";
    } else if (entry.type == TAR_LONG_NAME) {
        strcpy(overrides.values.path, text);
        overrides.has_path = true;
    } else {
        strcpy(overrides.values.link, text);
        overrides.has_link = true;
    }
    free(text);
    return wrong ? refuse(wrong) : 0;
}

static bool is_extended(char type)
{
    return type == TAR_PAX || type == TAR_PAX_GLOBAL || type == TAR_LONG_NAME || type == TAR_LONG_LINK;
}

static int extract_all(void)
{
    static const unsigned char end[TAR_BLOCK];
    unsigned char block[TAR_BLOCK];

    for (;;) {
        if (take(block, sizeof block))
            return -1;
        if (memcmp(block, end, sizeof end) == 0)
            return 0;
        const char *wrong = tar_decode(block, &entry);
        if (wrong)
            return refuse(wrong);
        if (is_extended(entry.type)) {
            if (take_extended())
                return -1;
            continue;
        }
        tar_apply(&defaults, &entry);
        tar_apply(&overrides, &entry);
        overrides = (struct tar_overrides){0};
        if (extract_entry())
            return -1;
    }
}

int tar_extract(void *argument, struct child_status *status)
{
    request = argument;
    own_status = status;
    has_owner = request->user && *request->user;
    if (has_owner && users_find(request->user, &owner, status))
        return 1;
    umask(0);
    if ((is_placed() || open_base() == 0) && extract_all() == 0)
        set_directory_times();
    return own_status->text[0] ? 1 : 0;
}
