#include "limits.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "protocol.h"

/* The hard limit is Docker's. The soft one is lower: a program that closes every possible descriptor takes seconds for a
 * million of them. */
enum { SOFT_FILES = 65536, HARD_FILES = 1048576, NAME = 200 };

/* As Docker and podman set them: the guest has no other users to protect from low ports and pings. */
static const char *const settings[] = {
    "net.ipv4.ip_unprivileged_port_start=0",
    "net.ipv4.ping_group_range=0 2147483647",
    "net.core.somaxconn=4096",
    "vm.max_map_count=262144",
};

static struct limit {
    bool is_set, is_asked_for;
    struct rlimit value;
} limits[RLIM_NLIMITS] = {
    [RLIMIT_NOFILE] = {.is_set = true, .value = {SOFT_FILES, HARD_FILES}},
    [RLIMIT_NPROC] = {.is_set = true, .value = {RLIM_INFINITY, RLIM_INFINITY}},
    [RLIMIT_MEMLOCK] = {.is_set = true, .value = {RLIM_INFINITY, RLIM_INFINITY}},
};

static const char *const names[RLIM_NLIMITS] = {
    "cpu",     "fsize", "data",  "stack",      "core",     "rss",  "nproc",  "nofile",
    "memlock", "as",    "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime",
};

/* Where dots separate the parts of a name, a slash stands for a dot (net.ipv4.conf.eth0/1.forwarding), as in sysctl(8). */
static void make_path(char *name)
{
    const char *first = strpbrk(name, "./");

    if (!first || *first == '/')
        return;
    for (; *name; name++)
        *name = *name == '.' ? '/' : *name == '/' ? '.' : *name;
}

/* `setting` is NAME=VALUE. 0, or -1 with errno. */
static int set(const char *setting)
{
    char name[NAME], path[NAME + 16];
    size_t length = strcspn(setting, "=");

    if (length >= sizeof name || !setting[length]) {
        errno = EINVAL;
        return -1;
    }
    snprintf(name, sizeof name, "%.*s", (int)length, setting);
    make_path(name);
    snprintf(path, sizeof path, "/proc/sys/%s", name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    const char *value = setting + length + 1;
    bool is_written = write(fd, value, strlen(value)) == (ssize_t)strlen(value);
    int error = errno;
    close(fd);
    errno = error;
    return is_written ? 0 : -1;
}

static int set_asked_for(const char *setting, struct failure *failure)
{
    if (set(setting) == 0)
        return 0;
    if (errno == ENOENT)
        return fail_with(failure, ENOENT, "the guest's kernel has no sysctl %.*s", (int)strcspn(setting, "="), setting);
    return fail(failure, "sysctl", setting);
}

static int read_limit(const char *text, struct failure *failure)
{
    unsigned resource;
    long long soft, hard;

    if (sscanf(text, "%u:%lld:%lld", &resource, &soft, &hard) != 3 || resource >= RLIM_NLIMITS)
        return fail_with(failure, EINVAL, "\"%.60s\" is not a limit", text);
    limits[resource] = (struct limit){
        .is_set = true,
        .is_asked_for = true,
        .value = {soft < 0 ? RLIM_INFINITY : (rlim_t)soft, hard < 0 ? RLIM_INFINITY : (rlim_t)hard},
    };
    return 0;
}

int limits_configure(const struct body *body, struct failure *failure)
{
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
        if (!report_test_mode || strncmp(settings[i], "net.", 4) == 0) /* a test shares the host's kernel */
            set(settings[i]); /* a kernel may lack it */
    for (size_t i = 0; i < body->count; i++) {
        const struct field *field = &body->fields[i];
        if (field->tag == FIELD_SYSCTL && set_asked_for(field->bytes, failure))
            return -1;
        if (field->tag == FIELD_ULIMIT && read_limit(field->bytes, failure))
            return -1;
    }
    return 0;
}

int limits_apply(struct child_status *status)
{
    for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
        const struct limit *limit = &limits[resource];
        if (!limit->is_set || setrlimit(resource, &limit->value) == 0 || !limit->is_asked_for)
            continue;
        child_status_fail_with(status, "ulimit %s=%lld: %s", names[resource], (long long)limit->value.rlim_max,
                             strerror(errno));
        return -1;
    }
    return 0;
}
