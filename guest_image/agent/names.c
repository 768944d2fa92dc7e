#include "names.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/openat2.h>

#include "namespaces.h"
#include "protocol.h"

enum { HOSTS_MAX = 65536, NAME_MAX_LENGTH = 64, ADDRESS_LENGTH = 64 };

static int etc = -1;
static char hostname[NAME_MAX_LENGTH + 1];
static char address[ADDRESS_LENGTH]; /* without the prefix length */
static char hosts_lines[HOSTS_MAX];  /* those of the host, each with its newline */

static int open_in_root(const char *path, uint64_t flags)
{
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};

    return (int)syscall(SYS_openat2, namespaces_root(), path, &how, sizeof how);
}

static int write_to(int fd, const char *name, const char *text, size_t length, struct failure *failure)
{
    if (fd < 0)
        return fail(failure, "open", name);
    ssize_t put = write(fd, text, length);
    int result = put == (ssize_t)length ? 0 : fail(failure, "write", name);
    close(fd);
    return result;
}

/* A regular file of our own; a symlink in its place (resolv.conf often is one) goes. */
static int replace_file(const char *name, const char *text, size_t length, struct failure *failure)
{
    unlinkat(etc, name, 0);
    return write_to(openat(etc, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644), name, text, length, failure);
}

static int rewrite_file(const char *name, const char *text, size_t length, struct failure *failure)
{
    int fd = openat(etc, name, O_WRONLY | O_TRUNC | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);

    if (fd < 0)
        return replace_file(name, text, length, failure);
    return write_to(fd, name, text, length, failure);
}

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
    return rewrite_file("hostname", line, (size_t)length, failure);
}

static int set_machine_id(const struct body *body, struct failure *failure)
{
    static const char dbus_file[] = "var/lib/dbus/machine-id";
    const struct field *field = body_find(body, FIELD_MACHINE_ID);
    char line[33];
    struct stat status;

    if (!field)
        return 0;
    if (field->length != 32)
        return fail_with(failure, EINVAL, "the machine id has %u bytes, not 32", field->length);
    memcpy(line, field->bytes, 32);
    line[32] = '\n';
    if (rewrite_file("machine-id", line, sizeof line, failure))
        return -1;
    /* Usually absent, or a link to /etc/machine-id. */
    int fd = open_in_root(dbus_file, O_PATH | O_NOFOLLOW);
    bool is_file = fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    if (fd >= 0)
        close(fd);
    if (!is_file)
        return 0;
    return write_to(open_in_root(dbus_file, O_WRONLY | O_TRUNC | O_NOFOLLOW), dbus_file, line, sizeof line, failure);
}

static int keep_hosts(const struct body *body, struct failure *failure)
{
    size_t used = 0;

    if (!body_find(body, FIELD_HOSTS))
        return 0;
    for (size_t i = 0; i < body->count; i++) {
        const struct field *field = &body->fields[i];
        if (field->tag != FIELD_HOSTS)
            continue;
        if (field->length + 2 > HOSTS_MAX - used)
            return fail_with(failure, E2BIG, "HOSTS lines of more than %d bytes", HOSTS_MAX);
        memcpy(hosts_lines + used, field->bytes, field->length);
        used += field->length;
        hosts_lines[used++] = '\n';
    }
    hosts_lines[used] = 0;
    return 0;
}

static int set_hosts(const struct body *body, struct failure *failure)
{
    static char text[HOSTS_MAX + 512];
    const struct field *field = body_find(body, FIELD_ADDRESS);

    if (!field && !body_find(body, FIELD_HOSTS) && !body_find(body, FIELD_HOSTNAME))
        return 0;
    if (keep_hosts(body, failure))
        return -1;
    if (field)
        snprintf(address, sizeof address, "%.*s", (int)strcspn(field->bytes, "/"), field->bytes);
    int length = snprintf(text, sizeof text, "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    if (*hostname)
        length += snprintf(text + length, sizeof text - (size_t)length, "%s\t%s\n", *address ? address : "127.0.1.1",
                           hostname);
    length += snprintf(text + length, sizeof text - (size_t)length, "%s", hosts_lines);
    return rewrite_file("hosts", text, (size_t)length, failure);
}

static int set_resolver(const struct body *body, bool always, struct failure *failure)
{
    /* Nothing listens there, so a lookup is refused at once instead of waiting for an answer. */
    static const char nobody[] = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";
    char text[1024];
    size_t used = 0;

    if (!body_find(body, FIELD_DNS))
        return always ? rewrite_file("resolv.conf", nobody, sizeof nobody - 1, failure) : 0;
    for (size_t i = 0; i < body->count; i++) {
        const struct field *field = &body->fields[i];
        if (field->tag != FIELD_DNS)
            continue;
        if (field->length > sizeof text - used - 16)
            return fail_with(failure, E2BIG, "too many DNS servers");
        used += (size_t)snprintf(text + used, sizeof text - used, "nameserver %s\n", field->bytes);
    }
    return rewrite_file("resolv.conf", text, used, failure);
}

int names_personalise(const struct body *body, struct failure *failure)
{
    if (set_hostname(body, failure) || set_machine_id(body, failure) || set_hosts(body, failure))
        return -1;
    return set_resolver(body, false, failure);
}

int names_configure(const struct body *body, struct failure *failure)
{
    static const char *const files[] = {"hostname", "machine-id", "hosts", "resolv.conf"};

    mkdirat(namespaces_root(), "etc", 0755);
    etc = open_in_root("etc", O_PATH | O_DIRECTORY);
    if (etc < 0)
        return fail(failure, "open", "/etc");
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++)
        unlinkat(etc, files[i], 0);
    if (set_hostname(body, failure) || set_machine_id(body, failure) || set_hosts(body, failure))
        return -1;
    return set_resolver(body, true, failure);
}
