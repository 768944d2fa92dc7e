#include "names.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/openat2.h>

#include "hosts.h"
#include "journal.h"
#include "namespaces.h"
#include "protocol.h"
#include "workload.h"

enum { HOSTS_MAX = 65536, NAME_MAX_LENGTH = 64, ADDRESS_LENGTH = 64 };

/* `upper` is the file in the writable layer, kept open. */
struct etc_file {
    const char *name;
    int upper;
};

static int etc = -1;
static struct etc_file hostname_file = {"hostname", -1}, machine_id_file = {"machine-id", -1};
static struct etc_file hosts_file = {"hosts", -1}, resolver_file = {"resolv.conf", -1};
static const char dbus_file[] = "var/lib/dbus/machine-id";
static bool has_dbus_file; /* a file of its own in the image; usually it is absent, or a link to /etc/machine-id */
static char hostname[NAME_MAX_LENGTH + 1];
static char machine_id[33];
static char address[ADDRESS_LENGTH]; /* without the prefix length */
static char hosts_lines[HOSTS_MAX];  /* ours in /etc/hosts, each with its newline: the guest's own, then the host's */
static size_t own_lines;             /* bytes of the former */
static bool is_configured;

static int open_in_root(const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};

    return (int)syscall(SYS_openat2, namespaces_root(), path, &how, sizeof how);
}

/* -1 where /etc is a symlink or has no regular file of that name. The file is then replaced each time. */
static void open_upper(struct etc_file *file)
{
    char path[64];
    struct stat status;

    if (file->upper >= 0)
        close(file->upper);
    snprintf(path, sizeof path, WORKLOAD_UPPER "/etc/%s", file->name);
    file->upper = open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file->upper < 0 || (fstat(file->upper, &status) == 0 && S_ISREG(status.st_mode)))
        return;
    close(file->upper);
    file->upper = -1;
}

/* Write a new regular file, in place of a symlink (resolv.conf often is one). A clone whose layer is full goes without a
 * file that its workload has removed. */
static int replace_file(struct etc_file *file, const char *text, size_t length, struct failure *failure)
{
    unlinkat(etc, file->name, 0);
    int fd = openat(etc, file->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    bool written = fd >= 0 && write(fd, text, length) == (ssize_t)length;
    bool is_full = !written && is_configured && errno == ENOSPC;
    if (is_full) {
        report("no room for /etc/%s", file->name);
        unlinkat(etc, file->name, 0);
    } else if (!written)
        fail(failure, "write", file->name);
    if (fd >= 0)
        close(fd);
    open_upper(file);
    return written || is_full ? 0 : -1;
}

/* Write to the file of the writable layer: through the overlay it takes ten times as long in a clone. */
static int rewrite_file(struct etc_file *file, const char *text, size_t length, struct failure *failure)
{
    struct stat status;

    /* The workload may have replaced the file. */
    if (file->upper < 0 || fstat(file->upper, &status) || status.st_nlink == 0)
        return replace_file(file, text, length, failure);
    if (pwrite(file->upper, text, length, 0) != (ssize_t)length)
        return fail(failure, "write", file->name);
    if (status.st_size > (off_t)length && ftruncate(file->upper, (off_t)length))
        return fail(failure, "truncate", file->name);
    return 0;
}

/* Set the kernel's host name, once per boot: programs that have started remember it. */
static int set_hostname(const struct body *body, struct failure *failure)
{
    const struct field *field = body_find(body, FIELD_HOSTNAME);
    char line[NAME_MAX_LENGTH + 2];

    if (!field)
        return 0;
    if (field->length > NAME_MAX_LENGTH)
        return fail_with(failure, EINVAL, "the host name has %u bytes, more than %d", field->length, NAME_MAX_LENGTH);
    memcpy(hostname, field->bytes, field->length + 1);
    if (sethostname(hostname, field->length) && fail_unless_test(failure, "sethostname", hostname))
        return -1;
    int length = snprintf(line, sizeof line, "%s\n", hostname);
    return rewrite_file(&hostname_file, line, (size_t)length, failure);
}

static int set_machine_id(const struct body *body, struct failure *failure)
{
    const struct field *field = body_find(body, FIELD_MACHINE_ID);
    char line[33];
    struct stat status;

    if (!field)
        return 0;
    if (field->length != 32)
        return fail_with(failure, EINVAL, "the machine id has %u bytes, not 32", field->length);
    memcpy(line, field->bytes, 32);
    line[32] = '\n';
    if (rewrite_file(&machine_id_file, line, sizeof line, failure))
        return -1;
    if (*machine_id && workload_init())
        journal_rename(workload_init(), machine_id, field->bytes);
    memcpy(machine_id, field->bytes, 33);
    int fd = has_dbus_file ? open_in_root(dbus_file, O_WRONLY | O_NOFOLLOW | O_NONBLOCK) : -1;
    if (fd < 0)
        return 0;
    bool is_file = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    if (is_file && (ftruncate(fd, 0) || write(fd, line, sizeof line) != sizeof line))
        fail(failure, "write", dbus_file);
    close(fd);
    return failure->error ? -1 : 0;
}

static int add_lines(const struct body *body, char *text, size_t used, struct failure *failure)
{
    for (size_t i = 0; i < body->count; i++) {
        const struct field *field = &body->fields[i];
        if (field->tag != FIELD_HOSTS)
            continue;
        if (field->length + 2 > HOSTS_MAX - used)
            return fail_with(failure, E2BIG, "HOSTS lines of more than %d bytes", HOSTS_MAX);
        memcpy(text + used, field->bytes, field->length);
        used += field->length;
        text[used++] = '\n';
    }
    text[used] = 0;
    return 0;
}

/* List the guest's own address with its full and short host name, then the host's lines: new ones, or those of before. */
static int list_hosts(const struct body *body, char *text, struct failure *failure)
{
    size_t dot = strcspn(hostname, "."), before = own_lines;

    own_lines = 0;
    if (*hostname)
        own_lines = (size_t)snprintf(text, HOSTS_MAX, "%s\t%s%s%.*s\n", *address ? address : "127.0.1.1", hostname,
                                     hostname[dot] ? " " : "", hostname[dot] ? (int)dot : 0, hostname);
    if (body_find(body, FIELD_HOSTS))
        return add_lines(body, text, own_lines, failure);
    snprintf(text + own_lines, HOSTS_MAX - own_lines, "%s", hosts_lines + before);
    return 0;
}

/* Open the file as it is now: the workload may have moved or replaced it. -1: there is none. */
static int open_hosts(struct stat *status)
{
    if (hosts_file.upper < 0 || fstat(hosts_file.upper, status) || status->st_nlink == 0)
        open_upper(&hosts_file);
    int fd = hosts_file.upper >= 0 ? dup(hosts_file.upper) : open_in_root("etc/hosts", O_RDONLY | O_NONBLOCK);
    if (fd >= 0 && (fstat(fd, status) || !S_ISREG(status->st_mode))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int merge_hosts(const char *lines, struct failure *failure)
{
    static const char local[] = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    struct stat status = {0};
    int fd = is_configured ? open_hosts(&status) : -1;
    size_t room = (size_t)status.st_size + sizeof local + HOSTS_MAX + 2;
    char *text = malloc(room);
    ssize_t length = sizeof local - 1;

    if (text && fd >= 0)
        length = pread(fd, text, (size_t)status.st_size, 0);
    else if (text)
        memcpy(text, local, sizeof local);
    if (fd >= 0)
        close(fd);
    if (!text || length < 0) {
        free(text);
        return fail(failure, "read", "/etc/hosts");
    }
    size_t merged = hosts_merge(text, (size_t)length, fd >= 0 ? hosts_lines : "", lines);
    int result = rewrite_file(&hosts_file, text, merged, failure);
    free(text);
    if (result == 0)
        strcpy(hosts_lines, lines);
    return result;
}

static int write_hosts(const struct body *body, struct failure *failure)
{
    static char lines[HOSTS_MAX];

    return list_hosts(body, lines, failure) || merge_hosts(lines, failure) ? -1 : 0;
}

static int set_hosts(const struct body *body, struct failure *failure)
{
    const struct field *field = body_find(body, FIELD_ADDRESS);

    if (field)
        snprintf(address, sizeof address, "%.*s", (int)strcspn(field->bytes, "/"), field->bytes);
    return field || !is_configured ? write_hosts(body, failure) : names_set_hosts(body, failure);
}

int names_set_hosts(const struct body *body, struct failure *failure)
{
    return body_find(body, FIELD_HOSTS) ? write_hosts(body, failure) : 0;
}

static int set_resolver(const struct body *body, bool always, struct failure *failure)
{
    /* Nothing listens there: a lookup fails at once instead of waiting for an answer. */
    static const char refusing[] = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    char text[1024];
    size_t used = 0;

    if (!body_find(body, FIELD_DNS))
        return always ? rewrite_file(&resolver_file, refusing, sizeof refusing - 1, failure) : 0;
    for (size_t i = 0; i < body->count; i++) {
        const struct field *field = &body->fields[i];
        if (field->tag != FIELD_DNS)
            continue;
        if (field->length > sizeof text - used - 16)
            return fail_with(failure, E2BIG, "too many DNS servers");
        used += (size_t)snprintf(text + used, sizeof text - used, "nameserver %s\n", field->bytes);
    }
    return rewrite_file(&resolver_file, text, used, failure);
}

int names_personalise(const struct body *body, struct failure *failure)
{
    if (set_machine_id(body, failure) || set_hosts(body, failure))
        return -1;
    return set_resolver(body, false, failure);
}

int names_configure(const struct body *body, struct failure *failure)
{
    struct stat status;

    mkdirat(namespaces_root(), "etc", 0755);
    etc = open_in_root("etc", O_PATH | O_DIRECTORY);
    if (etc < 0)
        return fail(failure, "open", "/etc");
    int dbus = open_in_root(dbus_file, O_PATH | O_NOFOLLOW);
    has_dbus_file = dbus >= 0 && fstat(dbus, &status) == 0 && S_ISREG(status.st_mode);
    if (dbus >= 0)
        close(dbus);
    if (set_hostname(body, failure) || set_machine_id(body, failure) || set_hosts(body, failure))
        return -1;
    is_configured = true;
    unlinkat(etc, "mtab", 0);
    symlinkat("/proc/mounts", etc, "mtab"); /* a directory of that name stays */
    return set_resolver(body, true, failure);
}
