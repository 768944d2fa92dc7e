#include "namespaces.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "boot.h"
#include "volumes.h"

#define LOWER WORKLOAD_BASE "/lower"
#define NEW_ROOT WORKLOAD_BASE "/root"
#define VOLUMES WORKLOAD_BASE "/volumes"
#define BOOT_ID WORKLOAD_BASE "/boot_id"
#define INITS_TMP WORKLOAD_BASE "/tmp"
#define BOOT_ID_SHOWN "/proc/sys/kernel/random/boot_id"
#define SHARED_MEMORY "/dev/shm"

enum { DEVICE_WAIT_S = 10 };

#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif
#ifndef MOVE_MOUNT_F_EMPTY_PATH
#define MOVE_MOUNT_F_EMPTY_PATH 4
#endif

static const struct workload_mount {
    const char *type, *target, *options;
    unsigned long flags;
} workload_mounts[] = {
    {"proc", "/proc", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
    {"sysfs", "/sys", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
    {"devtmpfs", "/dev", "mode=0755,size=4M", MS_NOSUID}, /* small: not for files, which programs write by mistake */
    {"devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620,gid=5", MS_NOSUID | MS_NOEXEC},
    {"tmpfs", SHARED_MEMORY, "mode=1777", MS_NOSUID | MS_NODEV},
    {"mqueue", "/dev/mqueue", NULL, MS_NOSUID | MS_NODEV | MS_NOEXEC},
};

static const struct device_link {
    const char *target, *name;
} device_links[] = {
    {"/proc/self/fd", "/dev/fd"},
    {"/proc/self/fd/0", "/dev/stdin"},
    {"/proc/self/fd/1", "/dev/stdout"},
    {"/proc/self/fd/2", "/dev/stderr"},
    {"pts/ptmx", "/dev/ptmx"}, /* stays as it is where devtmpfs has a node of that name */
};

static const struct device_node {
    const char *name;
    unsigned minor;
} test_nodes[] = {{"/dev/null", 3}, {"/dev/zero", 5}, {"/dev/full", 7}, {"/dev/random", 8}, {"/dev/urandom", 9}};

static int own_mounts = -1, own_pids = -1;
static int workload_mounts_fd = -1, workload_cgroups = -1;
static int root = -1, boot_id = -1, terminals = -1;
static struct memory_shares shares;
static int given_directory = -1;

void namespaces_use_directory(const char *path)
{
    given_directory = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (given_directory < 0)
        report_fatal("open", path);
}

bool namespaces_are_made(void)
{
    return workload_mounts_fd >= 0;
}

int namespaces_root(void)
{
    return root;
}

int namespaces_terminals(void)
{
    return terminals;
}

static bool exists(const void *path)
{
    return access(path, F_OK) == 0;
}

static int mount_lower(const char *device, struct failure *failure)
{
    char given[64];

    if (given_directory >= 0) {
        snprintf(given, sizeof given, "/proc/self/fd/%d", given_directory);
        return mount(given, LOWER, NULL, MS_BIND, NULL) ? fail(failure, "bind", LOWER) : 0;
    }
    if (!device)
        return fail_with(failure, EINVAL, "CONFIGURE has no ROOT_DEVICE");
    if (!boot_wait_for(exists, device, DEVICE_WAIT_S))
        return fail_with(failure, ENOENT, "the root device %s did not appear within %d s", device, DEVICE_WAIT_S);
    if (mount(device, LOWER, "squashfs", MS_RDONLY, NULL))
        return fail(failure, "mount", device);
    return 0;
}

static int mount_writable(const struct writable_layer *layer, struct failure *failure)
{
    char options[96];

    if (layer->device) {
        if (!boot_wait_for(exists, layer->device, DEVICE_WAIT_S))
            return fail_with(failure, ENOENT, "the disk %s did not appear within %d s", layer->device, DEVICE_WAIT_S);
        /* Keep the inode tables sparse. */
        return mount(layer->device, WORKLOAD_BASE, "ext4", MS_NOATIME, "noinit_itable")
                   ? fail(failure, "mount", layer->device)
                   : 0;
    }
    snprintf(options, sizeof options, "mode=0755,size=%llu,nr_inodes=%llu", (unsigned long long)layer->shares.layer,
             (unsigned long long)layer->shares.files);
    return mount("fcvm", WORKLOAD_BASE, "tmpfs", 0, options) ? fail(failure, "mount", "tmpfs for the writable layer") : 0;
}

static int make_layers(const struct writable_layer *layer, struct failure *failure)
{
    static const char *const directories[] = {LOWER, WORKLOAD_UPPER, WORKLOAD_BASE "/work", NEW_ROOT, VOLUMES};

    if (mount_writable(layer, failure))
        return -1;
    for (size_t i = 0; i < sizeof directories / sizeof directories[0]; i++)
        if (mkdir(directories[i], 0755))
            return fail(failure, "mkdir", directories[i]);
    return mkdir(INITS_TMP, 01777) ? fail(failure, "mkdir", INITS_TMP) : 0;
}

static int copy_boot_id(struct failure *failure)
{
    char text[64];
    int kernels = open(BOOT_ID_SHOWN, O_RDONLY | O_CLOEXEC);
    ssize_t got = kernels < 0 ? -1 : read(kernels, text, sizeof text);

    if (kernels >= 0)
        close(kernels);
    boot_id = open(BOOT_ID, O_RDWR | O_CREAT | O_CLOEXEC, 0444);
    if (got <= 0 || boot_id < 0 || write(boot_id, text, (size_t)got) != got)
        return fail(failure, "copy", BOOT_ID_SHOWN);
    return 0;
}

static int mount_root(struct failure *failure)
{
#define LAYERS "lowerdir=" LOWER ",upperdir=" WORKLOAD_UPPER ",workdir=" WORKLOAD_BASE "/work"

    /* These options keep inode and device numbers stable, and allow renaming directories of the image. */
    if (mount("fcvm", NEW_ROOT, "overlay", 0, LAYERS ",xino=on,redirect_dir=on") &&
        mount("fcvm", NEW_ROOT, "overlay", 0, LAYERS))
        return fail(failure, "mount", "overlay");
    root = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return fail(failure, "open", NEW_ROOT);
    return copy_boot_id(failure);
}

static void fill_test_devices(void)
{
    for (size_t i = 0; i < sizeof test_nodes / sizeof test_nodes[0]; i++)
        if (mknod(test_nodes[i].name, S_IFCHR | 0666, makedev(1, test_nodes[i].minor)))
            report("test mode goes on without %s: %s", test_nodes[i].name, strerror(errno));
}

static int mount_workload_views(struct failure *failure)
{
    for (size_t i = 0; i < sizeof workload_mounts / sizeof workload_mounts[0]; i++) {
        const struct workload_mount *view = &workload_mounts[i];
        bool test_devices = report_test_mode && strcmp(view->type, "devtmpfs") == 0;
        mkdir(view->target, 0755);
        if (mount(view->type, view->target, test_devices ? "tmpfs" : view->type, view->flags, view->options) &&
            fail_unless_test(failure, "mount", view->target))
            return -1;
        if (test_devices)
            fill_test_devices();
    }
    for (size_t i = 0; i < sizeof device_links / sizeof device_links[0]; i++)
        if (symlink(device_links[i].target, device_links[i].name) && errno != EEXIST)
            return fail(failure, "symlink", device_links[i].name);
    return 0;
}

static int size_shared_memory(uint64_t bytes)
{
    char options[96];

    snprintf(options, sizeof options, "size=%llu,nr_inodes=%llu", (unsigned long long)bytes,
             (unsigned long long)shares.files / 4);
    return mount("tmpfs", SHARED_MEMORY, NULL, MS_REMOUNT | MS_NOSUID | MS_NODEV, options);
}

/* pivot_root cannot leave an initramfs; moving the new root over the old one does. */
static int move_into_root(const struct writable_layer *layer, struct failure *failure)
{
    int volumes = open(VOLUMES, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (volumes < 0)
        return fail(failure, "open", VOLUMES);
    if (chdir(NEW_ROOT) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        return fail(failure, "changing root to", NEW_ROOT);
    if (mount_workload_views(failure))
        return -1;
    if (size_shared_memory(shares.shared) && fail_unless_test(failure, "remount", SHARED_MEMORY))
        return -1;
    volumes_mount(volumes, layer->volumes);
    close(volumes);
    terminals = open("/dev/pts", O_PATH | O_DIRECTORY | O_CLOEXEC);
    workload_mounts_fd = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    return workload_mounts_fd < 0 ? fail(failure, "open", "/proc/self/ns/mnt") : 0;
}

int namespaces_make(const char *device, const struct writable_layer *layer, struct failure *failure)
{
    own_mounts = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    own_pids = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    if (own_mounts < 0 || own_pids < 0)
        return fail(failure, "open", "/proc/self/ns");
    shares = layer->shares;
    if (make_layers(layer, failure) || mount_lower(device, failure) || mount_root(failure))
        return -1;
    if (unshare(CLONE_NEWNS))
        return fail(failure, "unshare", "CLONE_NEWNS");
    int result = move_into_root(layer, failure);
    if (setns(own_mounts, CLONE_NEWNS))
        report_fatal("setns", "own mount namespace");
    return result;
}

/* Return a detached copy of a mount, to be attached inside the workload's namespace. */
static int clone_mount(const char *path)
{
    return (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | O_CLOEXEC);
}

static int attach_mount(int tree, const char *target)
{
    int result = (int)syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH);

    close(tree);
    return result;
}

/* Mount /proc of the caller's PID namespace, with our boot id over the kernel's. */
static const char *show_processes(int boot_id_tree)
{
    umount2("/proc", MNT_DETACH);
    int failed = mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    if (boot_id_tree >= 0)
        attach_mount(boot_id_tree, BOOT_ID_SHOWN);
    return failed && !report_test_mode ? "mount /proc" : NULL;
}

/* Mount empty /run, /run/lock and /tmp, as systemd's container interface requires: an init takes files there for those of
 * this boot. /run gets a part of the size of /dev/shm, /tmp is a directory of the layer: no more memory is used. */
static const char *mount_for_init(int tmp_tree)
{
    char run_options[96];
    const struct {
        const char *target, *options;
    } mounts[] = {{"/run", run_options}, {"/run/lock", "mode=1777,size=5M"}};

    size_shared_memory(shares.shared - shares.shared / 4);
    snprintf(run_options, sizeof run_options, "mode=0755,size=%llu,nr_inodes=%llu",
             (unsigned long long)shares.shared / 4, (unsigned long long)shares.files / 4);
    for (size_t i = 0; i < sizeof mounts / sizeof mounts[0]; i++) {
        mkdir(mounts[i].target, 0755);
        if (mount("tmpfs", mounts[i].target, "tmpfs", MS_NOSUID | MS_NODEV, mounts[i].options))
            return mounts[i].target;
    }
    mkdir("/tmp", 01777);
    if (tmp_tree < 0 || attach_mount(tmp_tree, "/tmp") ||
        mount(NULL, "/tmp", NULL, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV, NULL))
        return "/tmp";
    return NULL;
}

const char *namespaces_enter(bool is_workload, bool is_init)
{
    if (workload_mounts_fd < 0)
        return "not configured";
    int boot_id_tree = is_workload ? clone_mount(BOOT_ID) : -1;
    int tmp_tree = is_init ? clone_mount(INITS_TMP) : -1;
    if (setns(workload_mounts_fd, CLONE_NEWNS))
        return "setns mount";
    if (!is_workload) {
        if (workload_cgroups >= 0 && setns(workload_cgroups, CLONE_NEWCGROUP))
            return "setns cgroup";
        return NULL;
    }
    /* The view of its cgroup is optional: a workload runs without it too. */
    if (unshare(CLONE_NEWCGROUP) == 0) {
        umount2("/sys/fs/cgroup", MNT_DETACH);
        mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    }
    const char *step = is_init ? mount_for_init(tmp_tree) : NULL;
    return step ? step : show_processes(boot_id_tree);
}

int namespaces_leave(void)
{
    return own_pids < 0 ? -1 : setns(own_pids, CLONE_NEWPID);
}

void namespaces_follow(pid_t pid)
{
    char path[64];

    if (workload_cgroups >= 0)
        close(workload_cgroups);
    workload_cgroups = -1;
    setns(own_pids, CLONE_NEWPID);
    if (!pid) {
        /* /proc of a dead PID namespace is empty: show the agent's to programs that start from now on. */
        int tree = clone_mount(BOOT_ID);
        if (setns(workload_mounts_fd, CLONE_NEWNS) == 0)
            show_processes(tree);
        if (setns(own_mounts, CLONE_NEWNS))
            report_fatal("setns", "own mount namespace");
        return;
    }
    snprintf(path, sizeof path, "/proc/%d/ns/pid", pid);
    int pids = open(path, O_RDONLY | O_CLOEXEC);
    if (pids < 0)
        return; /* it has ended already: SIGCHLD follows */
    setns(pids, CLONE_NEWPID);
    close(pids);
    snprintf(path, sizeof path, "/proc/%d/ns/cgroup", pid);
    workload_cgroups = open(path, O_RDONLY | O_CLOEXEC);
}

int namespaces_set_boot_id(const char *text, size_t length, struct failure *failure)
{
    char line[64];

    if (length > sizeof line - 1)
        return fail_with(failure, EINVAL, "the boot id has %zu bytes", length);
    memcpy(line, text, length);
    line[length++] = '\n';
    if (pwrite(boot_id, line, length, 0) != (ssize_t)length)
        return fail(failure, "write", BOOT_ID);
    return 0;
}
