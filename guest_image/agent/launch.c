#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cgroup.h"
#include "directories.h"
#include "limits.h"
#include "namespaces.h"
#include "users.h"

enum {
    EXIT_CANNOT_START = 126,
    EXIT_NOT_FOUND = 127,
    AWAIT_SLICE_MS = 5,
    AWAIT_SLICES = 100
};

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

/* As in linux/sched.h, whose other contents clash with sched.h in some libraries. */
struct clone_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

static void publish(struct child_status *status)
{
    __atomic_store_n(&status->pid, (int)getpid(), __ATOMIC_RELEASE);
    syscall(SYS_futex, &status->pid, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Wait until the child has published its PID, has died before that, or is held up too long (in a frozen cgroup). */
static void await_pid(const struct child_status *status, pid_t pid)
{
    const struct timespec slice = {.tv_nsec = AWAIT_SLICE_MS * 1000000L};
    siginfo_t end;

    for (int i = 0; i < AWAIT_SLICES && !__atomic_load_n(&status->pid, __ATOMIC_ACQUIRE); i++) {
        if (syscall(SYS_futex, &status->pid, FUTEX_WAIT, 0, &slice, NULL, 0) == 0 || errno != ETIMEDOUT)
            continue;
        end.si_pid = 0;
        if (waitid(P_PID, (id_t)pid, &end, WEXITED | WNOHANG | WNOWAIT) || end.si_pid)
            return;
    }
}

static _Noreturn void give_up(struct child_status *status, const char *call, const char *subject, int code)
{
    child_status_fail(status, call, subject);
    publish(status);
    _exit(code);
}

static void restore_defaults(void)
{
    sigset_t none;

    signal(SIGPIPE, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(022);
}

/* Make the workload's directory if it is missing. Any other must exist. */
static void enter_directory(const struct launch *launch)
{
    const char *directory = launch->directory && *launch->directory ? launch->directory : "/";

    if (chdir(directory) == 0)
        return;
    if (errno == ENOENT && launch->is_workload)
        directories_make(AT_FDCWD, directory);
    if (chdir(directory))
        give_up(launch->status, "chdir", directory, EXIT_CANNOT_START);
}

/* Let the user open /dev/stdout, which is the pipe or terminal: its owner would be root. */
static void give_pipes(uid_t user)
{
    struct stat status;

    for (int fd = 0; user && fd <= 2; fd++) {
        bool is_ours = fstat(fd, &status) == 0 && (S_ISFIFO(status.st_mode) || isatty(fd));
        if (is_ours && fchown(fd, user, (gid_t)-1))
            return;
    }
}

static const char *get_variable(char **environment, const char *name)
{
    size_t length = strlen(name);

    for (; *environment; environment++)
        if (strncmp(*environment, name, length) == 0 && (*environment)[length] == '=')
            return *environment + length + 1;
    return NULL;
}

/* `environment` has room for two more: see launch(). */
static void complete_environment(char **environment, const char *home)
{
    static char home_variable[4096 + 8];
    static char path_variable[] = "PATH=" DEFAULT_PATH;
    char **end = environment;

    while (*end)
        end++;
    if (!get_variable(environment, "PATH"))
        *end++ = path_variable;
    if (!get_variable(environment, "HOME")) {
        snprintf(home_variable, sizeof home_variable, "HOME=%s", home);
        *end++ = home_variable;
    }
    *end = NULL;
}

/* Like execvpe, but do not run a file of unknown format with a shell: container runtimes do not either. */
static void search_and_execute(char **arguments, char **environment)
{
    char candidate[4096];
    bool found = false;

    if (strchr(arguments[0], '/')) {
        execve(arguments[0], arguments, environment);
        return;
    }
    for (const char *path = get_variable(environment, "PATH"); path; path = *path ? path + 1 : NULL) {
        int length = (int)strcspn(path, ":");
        snprintf(candidate, sizeof candidate, "%.*s%s%s", length, path, length ? "/" : "./", arguments[0]);
        execve(candidate, arguments, environment);
        if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
            return;
        found |= errno == EACCES;
        path += length;
        if (!*path)
            break;
    }
    errno = found ? EACCES : ENOENT;
}

static _Noreturn void run_program(const struct launch *launch)
{
    struct user user;
    const char *program = launch->arguments[0];

    if (users_find(launch->user, &user, launch->status) || limits_apply(launch->status))
        _exit(EXIT_CANNOT_START);
    enter_directory(launch);
    give_pipes(user.id);
    if (users_become(&user))
        give_up(launch->status, "becoming user", launch->user ? launch->user : "root", EXIT_CANNOT_START);
    complete_environment(launch->environment, user.home);
    search_and_execute(launch->arguments, launch->environment);
    int code = errno == ENOENT ? EXIT_NOT_FOUND : EXIT_CANNOT_START;
    if (errno == ENOENT && strchr(program, '/') && access(program, F_OK) == 0)
        child_status_fail_with(launch->status, "exec %s: the interpreter or loader it names is missing", program);
    else
        child_status_fail(launch->status, "exec", program);
    _exit(code);
}

static _Noreturn void be_child(const struct launch *launch, bool in_cgroup)
{
    if (!in_cgroup && !launch->is_hook)
        cgroup_enter();
    setsid();
    if (dup2(launch->input, 0) < 0 || dup2(launch->output, 1) < 0 || dup2(launch->errors, 2) < 0)
        give_up(launch->status, "dup2", "", EXIT_CANNOT_START);
    if (launch->has_terminal && ioctl(0, TIOCSCTTY, 0))
        give_up(launch->status, "ioctl", "TIOCSCTTY", EXIT_CANNOT_START);
    const char *step = namespaces_enter(launch->is_workload, launch->is_init);
    if (step)
        give_up(launch->status, "entering the workload's namespaces:", step, EXIT_CANNOT_START);
    publish(launch->status);
    restore_defaults();
    if (!launch->run)
        run_program(launch);
    syscall(SYS_close_range, 3U, ~0U, 0U);
    _exit(launch->run(launch->argument, launch->status));
}

static pid_t fork_into(uint64_t flags, int cgroup)
{
    struct clone_arguments arguments = {.flags = flags, .exit_signal = SIGCHLD};

    if (cgroup >= 0) {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = (uint64_t)cgroup;
    }
    return (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
}

pid_t launch(const struct launch *launch, struct failure *failure)
{
    uint64_t flags = launch->is_workload ? CLONE_NEWPID : 0;
    int cgroup = launch->is_hook ? -1 : cgroup_fd();
    bool in_cgroup = cgroup >= 0;

    /* Straight into the cgroup: moving a process there later can take a kernel-wide lock for milliseconds. */
    pid_t pid = fork_into(flags, cgroup);
    if (pid < 0 && errno == EBUSY && in_cgroup)
        pid = fork_into(flags, cgroup = cgroup_side_fd());
    if (pid < 0 && in_cgroup) {
        in_cgroup = false;
        pid = fork_into(flags, -1);
    }
    /* The workload is ending: its PID namespace takes no more processes, and SIGCHLD has not come yet. */
    if (pid < 0 && errno == ENOMEM && namespaces_leave() == 0)
        pid = fork_into(flags, in_cgroup ? cgroup : -1);
    if (pid == 0)
        be_child(launch, in_cgroup);
    if (pid < 0)
        return fail(failure, "clone3", launch->run ? "" : launch->arguments[0]);
    if (launch->is_init)
        cgroup_hand_over();
    await_pid(launch->status, pid);
    return pid;
}
