/* The workload's root and mount namespace, and entering the workload's namespaces. */
#ifndef FCVM_NAMESPACES_H
#define FCVM_NAMESPACES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "memory.h"
#include "report.h"

#define WORKLOAD_BASE "/mnt"
#define WORKLOAD_UPPER WORKLOAD_BASE "/upper" /* the writable layer */

/* Tests: the directory that stands for the root device. */
void namespaces_use_directory(const char *path);

/* Where the workload writes: the ext4 file system of a disk, or memory. */
struct writable_layer {
    const char *device; /* NULL: memory */
    struct memory_shares shares;
    char *const *volumes; /* absolute paths, outer ones first; NULL ends them */
};

/* Mount the rootfs under a writable layer, and make the mount namespace. */
int namespaces_make(const char *device, const struct writable_layer *layer, struct failure *failure);
bool namespaces_are_made(void);

/* The workload's root as the agent sees it, for openat2 with RESOLVE_IN_ROOT. */
int namespaces_root(void);

/* In a child: enter the namespaces. The workload itself also mounts its views of /proc and of its cgroup, an init also the
 * directories that must be empty. NULL, or the step that failed. */
const char *namespaces_enter(bool is_workload, bool is_init);

/* Let later children enter the PID and cgroup namespaces of the workload, by its first process `pid`; 0: it has ended. */
void namespaces_follow(pid_t pid);

/* The workload's /dev/pts, for openat. */
int namespaces_terminals(void);

/* Start later children in the agent's own PID namespace. */
int namespaces_leave(void);

/* What the workload reads as /proc/sys/kernel/random/boot_id. */
int namespaces_set_boot_id(const char *text, size_t length, struct failure *failure);

#endif
