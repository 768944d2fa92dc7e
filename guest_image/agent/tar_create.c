#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

#include "tar.h"
#include "tar_format.h"

enum { BUFFER = 65536, BUCKETS = 1024, VIRTUAL_MAX = 4194304 };

/* A file with several names, and the first one under which it was sent. */
struct known_file {
    dev_t device;
    ino_t inode;
    struct known_file *next;
    char path[];
};

static unsigned char buffer[BUFFER];
static size_t buffered;
static struct known_file *known_files[BUCKETS];
static struct tar_entry entry;
static struct child_status *own_status;
static dev_t device;

static int report_error(const char *call, const char *subject)
{
    child_status_fail(own_status, call, subject);
    return -1;
}

static int flush(void)
{
    for (size_t done = 0; done < buffered;) {
        ssize_t put = write(STDOUT_FILENO, buffer + done, buffered - done);
        if (put < 0 && errno != EINTR)
            return report_error("write", "to the host");
        done += put > 0 ? (size_t)put : 0;
    }
    buffered = 0;
    return 0;
}

static int put(const void *bytes, size_t size)
{
    const unsigned char *from = bytes;

    while (size) {
        size_t here = BUFFER - buffered < size ? BUFFER - buffered : size;
        memcpy(buffer + buffered, from, here);
        buffered += here;
        from += here;
        size -= here;
        if (buffered == BUFFER && flush())
            return -1;
    }
    return 0;
}

static int put_zeros(uint64_t size)
{
    static const unsigned char zeros[TAR_BLOCK];

    for (; size; size -= size < TAR_BLOCK ? size : TAR_BLOCK)
        if (put(zeros, size < TAR_BLOCK ? (size_t)size : TAR_BLOCK))
            return -1;
    return 0;
}

static int put_header(void)
{
    static unsigned char blocks[TAR_ENCODED_MAX];

    return put(blocks, tar_encode(&entry, blocks));
}

/* Send exactly as many bytes as the header announced, also when the file changes meanwhile. */
static int put_contents(int fd, const char *path)
{
    static unsigned char chunk[BUFFER];
    uint64_t left = entry.size;

    while (left) {
        ssize_t got = read(fd, chunk, left < sizeof chunk ? (size_t)left : sizeof chunk);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return report_error("read", path);
        if (got == 0)
            break;
        if (put(chunk, (size_t)got))
            return -1;
        left -= (uint64_t)got;
    }
    return put_zeros(left) || put_zeros(tar_padding(entry.size)) ? -1 : 0;
}

static void fill_entry(const struct stat *status, char type, const char *path)
{
    entry.type = type;
    entry.mode = status->st_mode & 07777;
    entry.uid = status->st_uid;
    entry.gid = status->st_gid;
    entry.mtime = status->st_mtime;
    entry.size = 0;
    entry.major = entry.minor = 0;
    entry.link[0] = 0;
    strncpy(entry.path, path, TAR_PATH - 1);
}

/* The name under which this inode was sent before. If there is none, remember this one and return NULL. */
static const char *find_known(const struct stat *status, const char *path)
{
    struct known_file **bucket = &known_files[status->st_ino % BUCKETS];

    for (const struct known_file *file = *bucket; file; file = file->next)
        if (file->inode == status->st_ino && file->device == status->st_dev)
            return file->path;
    struct known_file *file = malloc(sizeof *file + strlen(path) + 1);
    if (!file)
        return NULL; /* the file is sent twice */
    file->device = status->st_dev;
    file->inode = status->st_ino;
    strcpy(file->path, path);
    file->next = *bucket;
    *bucket = file;
    return NULL;
}

static int put_file(int directory, const char *name, const char *path, const struct stat *status)
{
    const char *known = status->st_nlink > 1 ? find_known(status, path) : NULL;

    fill_entry(status, known ? TAR_HARDLINK : TAR_FILE, path);
    if (known) {
        strncpy(entry.link, known, TAR_PATH - 1);
        return put_header();
    }
    int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return report_error("open", path);
    entry.size = (uint64_t)status->st_size;
    int result = put_header() || put_contents(fd, path) ? -1 : 0;
    close(fd);
    return result;
}

static int put_symlink(int directory, const char *name, const char *path, const struct stat *status)
{
    fill_entry(status, TAR_SYMLINK, path);
    ssize_t length = readlinkat(directory, name, entry.link, TAR_PATH - 1);
    if (length < 0)
        return report_error("readlink", path);
    entry.link[length] = 0;
    return put_header();
}

static int put_device(const char *path, const struct stat *status, char type)
{
    fill_entry(status, type, path);
    entry.major = major(status->st_rdev);
    entry.minor = minor(status->st_rdev);
    return put_header();
}

/* File systems without data, as /proc and /sys: left out unless PATH itself is on one. */
static bool is_of_the_kernel(int fd)
{
    static const unsigned long kinds[] = {PROC_SUPER_MAGIC, SYSFS_MAGIC,  CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC,
                                          DEVPTS_SUPER_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC, SECURITYFS_MAGIC,
                                          BPF_FS_MAGIC, PSTOREFS_MAGIC, BINFMTFS_MAGIC, EFIVARFS_MAGIC, NSFS_MAGIC};
    struct statfs status;

    if (fstatfs(fd, &status))
        return true;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if ((unsigned long)status.f_type == kinds[i])
            return true;
    return false;
}

/* FUSE: root cannot read what another user has mounted (EACCES), and nobody what is no longer served (ENOTCONN). */
static bool is_closed_to_us(void)
{
    return errno == EACCES || errno == ENOTCONN;
}

static int put_directory(int fd, char *path);

static int put_subdirectory(int directory, const char *name, char *path, const struct stat *status)
{
    strcat(path, "/"); /* put_name left room */
    fill_entry(status, TAR_DIRECTORY, path);
    if (put_header())
        return -1;
    int fd = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return is_closed_to_us() ? 0 : report_error("open", path);
    if (status->st_dev != device && is_of_the_kernel(fd)) {
        close(fd);
        return 0;
    }
    return put_directory(fd, path);
}

/* `path` is the entry's, with room for TAR_PATH bytes. A file that has vanished since the directory was read is left out. */
static int put_name(int directory, const char *name, char *path)
{
    struct stat status;

    if (fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW))
        return errno == ENOENT || is_closed_to_us() ? 0 : report_error("stat", path);
    switch (status.st_mode & S_IFMT) {
    case S_IFREG:
        return put_file(directory, name, path, &status);
    case S_IFDIR:
        return put_subdirectory(directory, name, path, &status);
    case S_IFLNK:
        return put_symlink(directory, name, path, &status);
    case S_IFCHR:
        return put_device(path, &status, TAR_CHARACTER);
    case S_IFBLK:
        return put_device(path, &status, TAR_BLOCK_DEVICE);
    case S_IFIFO:
        fill_entry(&status, TAR_FIFO, path);
        return put_header();
    default:
        return 0; /* an archive cannot hold sockets */
    }
}

/* Send everything in the directory `fd`, and close it. `path` ends in a slash. */
static int put_directory(int fd, char *path)
{
    const size_t length = strlen(path);
    struct dirent *item;
    DIR *directory = fdopendir(fd);
    int result = 0;

    if (!directory)
        return report_error("opendir", path);
    while (result == 0 && (item = readdir(directory))) {
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0)
            continue;
        if (length + strlen(item->d_name) + 2 > TAR_PATH) {
            errno = ENAMETOOLONG;
            result = report_error("path", path);
            break;
        }
        strcpy(path + length, item->d_name);
        result = put_name(dirfd(directory), item->d_name, path);
    }
    path[length] = 0;
    closedir(directory);
    return result;
}

static size_t smaller(size_t one, size_t other)
{
    return one < other ? one : other;
}

/* Files of /proc and /sys have a wrong size (0 or a page): read them to learn it. Read in portions: the kernel allocates as
 * much memory as is asked for. */
static int put_virtual_file(int fd, const char *path)
{
    static unsigned char contents[VIRTUAL_MAX];
    size_t used = 0;
    ssize_t got;

    while (used < sizeof contents && (got = read(fd, contents + used, smaller(sizeof contents - used, BUFFER))) != 0) {
        if (got < 0)
            return report_error("read", path);
        used += (size_t)got;
    }
    entry.size = used;
    return put_header() || put(contents, used) || put_zeros(tar_padding(used)) ? -1 : 0;
}

/* Send the requested path, with its symlinks followed: a file under its base name, a directory as "./". */
static int put_request(const char *path)
{
    static char name[TAR_PATH] = "./";
    struct stat status;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &status))
        return report_error("open", path);
    device = status.st_dev;
    if (S_ISDIR(status.st_mode)) {
        fill_entry(&status, TAR_DIRECTORY, name);
        return put_header() ? -1 : put_directory(fd, name);
    }
    const char *slash = strrchr(path, '/');
    fill_entry(&status, TAR_FILE, slash ? slash + 1 : path);
    if (!S_ISREG(status.st_mode)) {
        errno = EINVAL;
        return report_error("not a file or directory:", path);
    }
    entry.size = (uint64_t)status.st_size;
    if (!status.st_blocks && status.st_size <= VIRTUAL_MAX)
        return put_virtual_file(fd, path);
    return put_header() || put_contents(fd, path) ? -1 : 0;
}

int tar_create(void *argument, struct child_status *status)
{
    const struct tar_request *request = argument;

    own_status = status;
    return put_request(request->path) || put_zeros(2 * TAR_BLOCK) || flush() ? 1 : 0;
}
