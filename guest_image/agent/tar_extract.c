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

/* A directory that was made here: its time is set when nothing more is put into it. */
struct made_folder {
    struct made_folder *next;
    struct timespec time;
    char path[];
};

static unsigned char buffer[BUFFER];
static size_t buffer_start, buffer_end;
static struct tar_entry entry;
static struct tar_overrides overrides, defaults;
static struct made_folder *made_folders;
static struct notice *complaints;
static struct user owner;
static bool has_owner;
static const struct tar_request *request;
static bool has_base;

/* The first complaint stays: it is nearest to the cause. */
static int complain(const char *call, const char *subject)
{
    if (!complaints->text[0])
        launch_complain(complaints, call, subject);
    return -1;
}

static int refuse(const char *why)
{
    if (!complaints->text[0])
        launch_complain_text(complaints, "%s: %.120s", why, entry.path);
    return -1;
}

/* Input */

/* Up to `size` bytes of what comes next; 0 at the end of input. */
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

static int own(int folder, const char *name)
{
    uid_t user = has_owner ? owner.id : entry.uid;
    gid_t group = has_owner ? owner.group : entry.gid;

    return fchownat(folder, name, user, group, AT_SYMLINK_NOFOLLOW);
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
            return complain("write", entry.path);
        bytes += put;
        size -= (size_t)put;
    }
    return 0;
}

/* Zeros that are not worth the guest's memory. */
static bool is_hole(const unsigned char *bytes, size_t size)
{
    enum { PAGE = 4096 };

    return size >= PAGE && !*bytes && memcmp(bytes, bytes + 1, size - 1) == 0;
}

static int extract_file(int folder, const char *name)
{
    struct timespec times[2];
    const unsigned char *bytes;
    uint64_t left = entry.size;
    int fd = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);

    if (fd < 0)
        return complain("create", entry.path);
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
    int result = ftruncate(fd, (off_t)entry.size) || own(folder, name) || fchmod(fd, entry.mode & 07777) || futimens(fd, times);
    close(fd);
    return result ? complain("set the owner, mode or time of", entry.path) : skip(tar_padding(entry.size));
}

static int remember_folder(void)
{
    struct made_folder *made = malloc(sizeof *made + strlen(entry.path) + 1);

    if (!made)
        return complain("malloc for", entry.path);
    made->time = (struct timespec){.tv_sec = entry.mtime, .tv_nsec = entry.mtime_ns};
    strcpy(made->path, entry.path);
    made->next = made_folders;
    made_folders = made;
    return 0;
}

static void set_folder_times(void)
{
    for (struct made_folder *made = made_folders; made; made = made->next) {
        const struct timespec times[2] = {made->time, made->time};
        int fd = tar_open_below(made->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
        if (fd >= 0) {
            futimens(fd, times);
            close(fd);
        }
    }
}

/* A directory that is there already, also through a symlink (/lib), stays as it is. */
static int extract_folder(int folder, const char *name)
{
    int there = tar_open_below(entry.path, O_PATH | O_DIRECTORY);

    if (there >= 0) {
        close(there);
        return 0;
    }
    unlinkat(folder, name, 0);
    if (mkdirat(folder, name, 0700))
        return complain("mkdir", entry.path);
    if (own(folder, name) || fchmodat(folder, name, entry.mode & 07777, 0))
        return complain("set the owner or mode of", entry.path);
    return remember_folder();
}

static bool is_placed(void)
{
    return request->flags & (TAR_AT_PLACE | TAR_HIDES);
}

/* A path of the archive as one below the base. NULL, or what is wrong. */
static const char *clean(char path[TAR_PATH])
{
    const char *wrong = tar_clean_path(path);

    return wrong || !is_placed() ? wrong : tar_root_rename(path);
}

static int extract_link(int folder, const char *name)
{
    static char target[TAR_PATH];
    const char *target_name;

    strcpy(target, entry.link);
    const char *wrong = clean(target);
    if (wrong)
        return refuse(wrong);
    int held = dup(folder); /* open_parent closes what it gave last */
    int target_folder = tar_open_parent(target, &target_name);
    int result = target_folder < 0 ? -1 : linkat(target_folder, target_name, held, name, 0);
    close(held);
    return result ? complain("link", entry.path) : 0;
}

static int extract_node(int folder, const char *name)
{
    mode_t type = entry.type == TAR_FIFO ? S_IFIFO : entry.type == TAR_CHARACTER ? S_IFCHR : S_IFBLK;

    if (mknodat(folder, name, type | 0600, makedev(entry.major, entry.minor)))
        return complain("mknod", entry.path);
    if (own(folder, name) || fchmodat(folder, name, entry.mode & 07777, 0))
        return complain("set the owner or mode of", entry.path);
    return 0;
}

static int extract_symlink(int folder, const char *name)
{
    struct timespec times[2];

    if (symlinkat(entry.link, folder, name) || own(folder, name))
        return complain("symlink", entry.path);
    entry_times(times);
    utimensat(folder, name, times, AT_SYMLINK_NOFOLLOW);
    return 0;
}

static int extract_other(int folder, const char *name)
{
    switch (entry.type) {
    case TAR_HARDLINK:
        return extract_link(folder, name);
    case TAR_SYMLINK:
        return extract_symlink(folder, name);
    case TAR_CHARACTER:
    case TAR_BLOCK_DEVICE:
    case TAR_FIFO:
        return extract_node(folder, name);
    default:
        return refuse("an entry of a type that is not supported");
    }
}

/* The archive's root is the base. One that hides what was there has its owner, mode and time. */
static int take_base(void)
{
    int fd = request->flags & TAR_HIDES ? tar_open_below("", O_RDONLY | O_DIRECTORY) : -1;

    if (fd >= 0) {
        int result = own(fd, ".") || fchmod(fd, entry.mode & 07777) || remember_folder();
        close(fd);
        if (result)
            return complain("set the owner or mode of", request->path);
    }
    return skip(entry.size + tar_padding(entry.size));
}

/* Where a place is named, it depends on what the archive's root is. */
static int open_base(void)
{
    const struct user *user = has_owner ? &owner : NULL;

    has_base = true;
    if (!is_placed())
        return tar_open_base(request->path, user) ? complain("open directory", request->path) : 0;
    const char *wrong = tar_clean_path(entry.path);
    if (wrong || !*entry.path)
        return refuse(wrong ? wrong : "an entry has no name");
    if (tar_root_open(request->path, &entry, request->flags & TAR_HIDES, user))
        return complain(errno == EISDIR ? "put a file in the place of" : "open", request->path);
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
    int folder = tar_open_parent(entry.path, &name);
    if (folder < 0)
        return complain("open below the target directory:", entry.path);
    if (entry.type == TAR_DIRECTORY)
        return extract_folder(folder, name) || skip(entry.size + tar_padding(entry.size)) ? -1 : 0;
    if (unlinkat(folder, name, 0) && errno != ENOENT)
        return complain("replace", entry.path);
    if (is_file)
        return extract_file(folder, name);
    return extract_other(folder, name) || skip(entry.size + tar_padding(entry.size)) ? -1 : 0;
}

/* Extended headers: they speak about the entry that follows. */
static int take_extended(void)
{
    size_t size = (size_t)entry.size;
    const char *wrong = NULL;

    if (entry.size > EXTENDED_MAX)
        return refuse("an extended header is too large");
    char *text = malloc(size + 1);
    if (!text)
        return complain("malloc for", "an extended header");
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

int tar_extract(void *argument, struct notice *notice)
{
    request = argument;
    complaints = notice;
    has_owner = request->user && *request->user;
    if (has_owner && users_find(request->user, &owner, notice))
        return 1;
    umask(0);
    if ((is_placed() || open_base() == 0) && extract_all() == 0)
        set_folder_times();
    return complaints->text[0] ? 1 : 0;
}
