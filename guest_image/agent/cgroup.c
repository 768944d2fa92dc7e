#include "cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "loop.h"
#include "memory.h"
#include "stuck.h"

enum { FREEZE_DEADLINE_MS = 5000, LOOK_MS = 100, STUCK_LOOKS = 3 };
enum { PROCESS_BYTES = 256 << 10 /* more than a small shell uses */ };

#define MOUNTED_AT "/mnt/cgroup"

static void on_memory_event(struct source *source, uint32_t events);

static int directory = -1, freezer = -1, state = -1;
static bool frozen, handed_over;
static char group_path[128];
static struct source memory_events = {.fd = -1, .ready = on_memory_event};
static void (*oom_changed)(void);

static void enable_controllers(void)
{
    static const char *const controllers[] = {"+memory", "+cpu", "+pids", "+io", "+cpuset", "+hugetlb"};
    int fd = open(MOUNTED_AT "/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);

    /* One by one: a controller that this kernel lacks must not disable the others. */
    for (size_t i = 0; fd >= 0 && i < sizeof controllers / sizeof controllers[0]; i++) {
        ssize_t ignored = write(fd, controllers[i], strlen(controllers[i]));
        (void)ignored;
    }
    if (fd >= 0)
        close(fd);
}

/* A program that forks without end gets EAGAIN before the memory is used up. The limit does not stop the agent: the kernel
 * does not check it for a process that is moved into the group. */
static void limit_processes(void)
{
    char text[24];
    struct memory memory;
    int limit = openat(directory, "pids.max", O_WRONLY | O_CLOEXEC);

    if (limit < 0)
        return;
    if (memory_read(&memory)) {
        int length = snprintf(text, sizeof text, "%llu", (unsigned long long)memory.available / PROCESS_BYTES);
        ssize_t ignored = write(limit, text, (size_t)length);
        (void)ignored;
    }
    close(limit);
}

int cgroup_make(const char *name, struct failure *failure)
{
    mkdir(MOUNTED_AT, 0755);
    if (mount("cgroup2", MOUNTED_AT, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
        return fail_unless_test(failure, "mount", "cgroup2");
    if (!report_test_mode)
        enable_controllers();
    snprintf(group_path, sizeof group_path, MOUNTED_AT "/%s", name);
    if (mkdir(group_path, 0755) && errno != EEXIST)
        return fail_unless_test(failure, "mkdir", group_path);
    directory = open(group_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        return fail(failure, "open", group_path);
    if (!report_test_mode)
        limit_processes();
    freezer = openat(directory, "cgroup.freeze", O_WRONLY | O_CLOEXEC);
    state = openat(directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (freezer < 0 || state < 0)
        return fail_unless_test(failure, "open", "cgroup.freeze");
    return 0;
}

void cgroup_remove(void)
{
    if (directory >= 0)
        rmdir(group_path);
}

int cgroup_fd(void)
{
    return handed_over ? cgroup_side_fd() : directory;
}

void cgroup_hand_over(void)
{
    handed_over = true;
}

int cgroup_side_fd(void)
{
    static int side = -1;

    if (side >= 0 || directory < 0)
        return side;
    mkdirat(directory, "fcvm", 0755);
    side = openat(directory, "fcvm", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return side;
}

void cgroup_enter(void)
{
    int fd = directory < 0 ? -1 : openat(directory, "cgroup.procs", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return;
    ssize_t ignored = write(fd, "0", 1);
    (void)ignored;
    close(fd);
}

/* The number after `key` in a file of "key number" lines. */
static bool find_number(const char *text, const char *key, uint64_t *value)
{
    size_t length = strlen(key);

    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, length) == 0 && line[length] == ' ') {
            *value = strtoull(line + length + 1, NULL, 10);
            return true;
        }
    }
    return false;
}

static bool read_number(int fd, const char *key, uint64_t *value)
{
    char text[4096];
    ssize_t got = pread(fd, text, sizeof text - 1, 0);

    if (got <= 0)
        return false;
    text[got] = 0;
    if (key)
        return find_number(text, key, value);
    *value = strtoull(text, NULL, 10);
    return true;
}

bool cgroup_number(const char *file, const char *key, uint64_t *value)
{
    int fd = directory < 0 ? -1 : openat(directory, file, O_RDONLY | O_CLOEXEC);
    bool found = fd >= 0 && read_number(fd, key, value);

    if (fd >= 0)
        close(fd);
    return found;
}

static bool has_settled(void)
{
    uint64_t value = 0;

    return read_number(state, "frozen", &value) && value == 1;
}

int cgroup_freeze(struct failure *failure)
{
    struct pollfd change = {.fd = state, .events = POLLPRI};
    int64_t deadline = loop_now_ms() + FREEZE_DEADLINE_MS;
    char names[120] = "";
    int stuck = 0; /* consecutive looks at which only tasks inside the kernel were not frozen */

    if (frozen || freezer < 0)
        return 0;
    if (pwrite(freezer, "1", 1, 0) != 1)
        return fail(failure, "write", "cgroup.freeze");
    while (!has_settled() && stuck < STUCK_LOOKS) {
        if (poll(&change, 1, LOOK_MS) == 0)
            stuck = stuck_in_kernel(group_path + strlen(MOUNTED_AT), names, sizeof names) ? stuck + 1 : 0;
        if (loop_now_ms() < deadline)
            continue;
        ssize_t ignored = pwrite(freezer, "0", 1, 0);
        (void)ignored;
        return fail_with(failure, ETIMEDOUT, "the workload did not freeze within %d ms: %s", FREEZE_DEADLINE_MS,
                         names[0] ? names : "the cause is unknown");
    }
    frozen = true;
    return 0;
}

int cgroup_thaw(struct failure *failure)
{
    if (!frozen)
        return 0;
    if (pwrite(freezer, "0", 1, 0) != 1)
        return fail(failure, "write", "cgroup.freeze");
    frozen = false;
    return 0;
}

bool cgroup_is_frozen(void)
{
    return frozen;
}

static void on_memory_event(struct source *source, uint32_t events)
{
    (void)source;
    (void)events;
    oom_changed();
}

void cgroup_watch_oom(void (*changed)(void))
{
    oom_changed = changed;
    if (directory < 0 || memory_events.fd >= 0)
        return;
    memory_events.fd = openat(directory, "memory.events", O_RDONLY | O_CLOEXEC);
    if (memory_events.fd < 0 || loop_add(&memory_events, EPOLLPRI))
        loop_close(&memory_events);
    cgroup_oom_kills(); /* the kernel reports a change only to a descriptor that was read before the change */
}

uint64_t cgroup_oom_kills(void)
{
    uint64_t kills = 0;

    if (memory_events.fd >= 0)
        read_number(memory_events.fd, "oom_kill", &kills);
    return kills;
}
