#include "boot.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "loop.h"
#include "report.h"

enum { FILES = 65536, /* one for each stream, and some */ UEVENTS_OF_KERNEL = 1 };

static const struct early_mount {
    const char *type, *target;
    unsigned long flags;
} early_mounts[] = {
    {"proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC},
    {"sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC},
    {"devtmpfs", "/dev", MS_NOSUID},
};

void boot_mount(void)
{
    for (size_t i = 0; i < sizeof early_mounts / sizeof early_mounts[0]; i++) {
        const struct early_mount *mounting = &early_mounts[i];
        mkdir(mounting->target, 0755);
        /* EBUSY: the kernel mounted devtmpfs by itself (CONFIG_DEVTMPFS_MOUNT). */
        if (mount(mounting->type, mounting->target, mounting->type, mounting->flags, NULL) && errno != EBUSY)
            report_fatal("mount", mounting->target);
    }
}

static void load_module(const char *name)
{
    char path[320];

    snprintf(path, sizeof path, "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
        report("module %s: %s", name, strerror(errno)); /* whatever requires the module fails later and says so */
    if (fd >= 0)
        close(fd);
    unlink(path); /* the kernel has its own copy: free the memory */
}

void boot_load_modules(void)
{
    char name[256];
    FILE *order = fopen("/modules/order", "re");

    while (order && fgets(name, sizeof name, order)) {
        name[strcspn(name, "\n")] = 0;
        if (*name)
            load_module(name);
    }
    if (order)
        fclose(order);
}

void boot_raise_limits(void)
{
    const struct rlimit files = {.rlim_cur = FILES, .rlim_max = FILES};

    if (setrlimit(RLIMIT_NOFILE, &files))
        report("setrlimit: %s", strerror(errno));
}

static int open_uevents(void)
{
    const struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = UEVENTS_OF_KERNEL};
    int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);

    if (fd >= 0 && bind(fd, (const struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    report_fatal("socket", "NETLINK_KOBJECT_UEVENT");
}

bool boot_wait_for(bool (*is_there)(const void *argument), const void *argument, int seconds)
{
    char event[4096];
    bool there = is_there(argument);

    if (there)
        return true;
    int64_t deadline = loop_now_ms() + seconds * 1000;
    struct pollfd events = {.fd = open_uevents(), .events = POLLIN};
    while (!(there = is_there(argument))) {
        int64_t left = deadline - loop_now_ms();
        if (left <= 0 || poll(&events, 1, (int)left) < 0)
            break;
        while (recv(events.fd, event, sizeof event, 0) > 0)
            ;
    }
    close(events.fd);
    return there;
}
