#include "hook.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "loop.h"
#include "protocol.h"

enum { HOOK_MS = 10000, SAID_MAX = 120 };

struct hook {
    struct child child;
    bool ended;
    char said[SAID_MAX + 1]; /* the end of what it printed */
    size_t said_length;
};

static void on_end(struct child *child, int wait_status)
{
    struct hook *hook = (struct hook *)child;

    (void)wait_status;
    hook->ended = true;
}

static void keep_tail(struct hook *hook, const char *bytes, size_t length)
{
    if (length > SAID_MAX) {
        bytes += length - SAID_MAX;
        length = SAID_MAX;
    }
    size_t kept = hook->said_length + length > SAID_MAX ? SAID_MAX - length : hook->said_length;
    memmove(hook->said, hook->said + hook->said_length - kept, kept);
    memcpy(hook->said + kept, bytes, length);
    hook->said_length = kept + length;
    hook->said[hook->said_length] = 0;
}

static void read_output(struct hook *hook, int fd)
{
    char bytes[1024];
    ssize_t got;

    while ((got = read(fd, bytes, sizeof bytes)) > 0)
        keep_tail(hook, bytes, (size_t)got);
}

/* Without the event loop: nothing else may happen to the guest before its identity is complete. */
static bool wait_for_end(struct hook *hook, int output)
{
    struct pollfd changes[2] = {{.fd = output, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
    int64_t deadline = loop_now_ms() + HOOK_MS, left = HOOK_MS;

    changes[1].fd = (int)syscall(SYS_pidfd_open, hook->child.pid, 0);
    while (left > 0 && poll(changes, 2, (int)left) >= 0) {
        read_output(hook, output);
        if (changes[0].revents & POLLHUP)
            changes[0].fd = -1;
        if (changes[1].revents || kill(hook->child.pid, 0))
            break;
        left = deadline - loop_now_ms();
    }
    close(changes[1].fd);
    if (left <= 0)
        kill(-hook->child.pid, SIGKILL);
    child_reap_now(&hook->child);
    return left > 0;
}

static int judge(const struct hook *hook, bool in_time, struct failure *failure)
{
    const char *name = hook->child.status->text;
    int wait_status = hook->child.wait_status;

    if (!in_time)
        return fail_with(failure, ETIMEDOUT, "the hook took more than %d s: %s", HOOK_MS / 1000, hook->said);
    if (*name)
        return fail_with(failure, ENOEXEC, "the hook could not start: %.150s", name);
    if (WIFSIGNALED(wait_status))
        return fail_with(failure, ECHILD, "the hook died of signal %d: %s", WTERMSIG(wait_status), hook->said);
    if (WEXITSTATUS(wait_status))
        return fail_with(failure, ECHILD, "the hook ended with %d: %s", WEXITSTATUS(wait_status), hook->said);
    return 0;
}

static int run(char **arguments, char **environment, struct failure *failure)
{
    static struct hook hook;
    int output[2];
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

    if (null < 0 || pipe2(output, O_CLOEXEC))
        return fail(failure, "pipe2", "");
    fcntl(output[0], F_SETFL, O_NONBLOCK);
    hook = (struct hook){.child = {.ended = on_end}};
    struct launch how = {.arguments = arguments,
                         .environment = environment,
                         .input = null,
                         .output = output[1],
                         .errors = output[1],
                         .is_hook = true};
    int result = child_start(&hook.child, &how, failure);
    close(output[1]);
    close(null);
    if (result == 0) {
        result = judge(&hook, wait_for_end(&hook, output[0]), failure);
        child_release(&hook.child);
    }
    close(output[0]);
    return result;
}

int hook_run(const struct body *body, struct failure *failure)
{
    if (!body_count(body, FIELD_ARG))
        return 0;
    char **arguments = body_texts(body, FIELD_ARG, 0);
    char **environment = body_texts(body, FIELD_ENV, 2);
    int result = arguments && environment ? run(arguments, environment, failure)
                                          : fail_with(failure, ENOMEM, "no memory for the hook's arguments");
    free(arguments);
    free(environment);
    return result;
}
