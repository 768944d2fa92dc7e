#include "child.h"

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fields.h"
#include "loop.h"
#include "protocol.h"
#include "report.h"

enum {
    CHILDREN_MAX = 2 * PROTOCOL_STREAMS_MAX + 2, /* one a stream, as many that end or are detached, the workload, a hook */
    HANG_UP_MS = 1000
};

static void on_signal(struct source *source, uint32_t events);
static void kill_overdue(void);

static struct child_status *statuses;
static struct child *children;
static struct source signals = {.fd = -1, .ready = on_signal};
static struct alarm kill_alarm = {.ring = kill_overdue};

void child_open(void)
{
    sigset_t all;

    statuses = mmap(NULL, CHILDREN_MAX * sizeof *statuses, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (statuses == MAP_FAILED)
        report_fatal("mmap", "statuses");
    signal(SIGPIPE, SIG_IGN);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    sigemptyset(&all);
    sigaddset(&all, SIGCHLD);
    signals.fd = signalfd(-1, &all, SFD_NONBLOCK | SFD_CLOEXEC);
    if (signals.fd < 0 || loop_add(&signals, EPOLLIN))
        report_fatal("signalfd", "");
}

static struct child_status *take_status(void)
{
    for (unsigned i = 0; i < CHILDREN_MAX; i++) {
        if (statuses[i].used)
            continue;
        statuses[i] = (struct child_status){.used = 1};
        return &statuses[i];
    }
    return NULL;
}

void child_release(struct child *child)
{
    if (child->status)
        child->status->used = 0;
    child->status = NULL;
}

int child_start(struct child *child, struct launch *how, struct failure *failure)
{
    child->status = how->status = take_status();
    if (!child->status)
        return fail_with(failure, EAGAIN, "%d processes run already", CHILDREN_MAX);
    child->pid = launch(how, failure);
    if (child->pid < 0) {
        child->pid = 0;
        child_release(child);
        return -1;
    }
    child->kill_at = 0;
    child->reaped = false;
    child->previous = NULL;
    child->next = children;
    if (children)
        children->previous = child;
    children = child;
    return 0;
}

static void finish(struct child *child)
{
    *(child->previous ? &child->previous->next : &children) = child->next;
    if (child->next)
        child->next->previous = child->previous;
    child->pid = 0;
    child->ended(child, child->wait_status);
}

static void reap(pid_t pid, int wait_status)
{
    struct child *child = children;

    while (child && (child->pid != pid || child->reaped))
        child = child->next;
    if (!child)
        return; /* an orphan that process 1 inherited */
    child->reaped = true;
    child->wait_status = wait_status;
    /* It got SIGHUP, but others of its process group still run: they have the rest of the second. */
    if (child->kill_at && kill(-pid, 0) == 0)
        return;
    finish(child);
}

static void on_signal(struct source *source, uint32_t events)
{
    struct signalfd_siginfo information[16];
    int wait_status;
    pid_t pid;

    (void)events;
    while (read(source->fd, information, sizeof information) > 0)
        ;
    while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0)
        reap(pid, wait_status);
}

void child_reap_now(struct child *child)
{
    int wait_status;

    if (waitpid(child->pid, &wait_status, 0) == child->pid)
        reap(child->pid, wait_status);
}

void child_hang_up(struct child *child)
{
    if (!child->pid || child->reaped || child->kill_at)
        return;
    kill(-child->pid, SIGHUP);
    child->kill_at = loop_now_ms() + HANG_UP_MS;
    if (!kill_alarm.at)
        loop_set_alarm(&kill_alarm, child->kill_at);
}

static void kill_overdue(void)
{
    int64_t now = loop_now_ms(), next_at = 0;
    struct child *next;

    for (struct child *child = children; child; child = next) {
        next = child->next;
        if (!child->kill_at)
            continue;
        if (child->kill_at > now) {
            if (!next_at || child->kill_at < next_at)
                next_at = child->kill_at;
            continue;
        }
        kill(-child->pid, SIGKILL);
        if (child->reaped)
            finish(child);
    }
    if (next_at)
        loop_set_alarm(&kill_alarm, next_at);
}

void child_put_end(struct reply *reply, const struct child *child)
{
    if (WIFSIGNALED(child->wait_status))
        reply_number(reply, FIELD_EXIT_SIGNAL, (uint64_t)WTERMSIG(child->wait_status));
    else
        reply_number(reply, FIELD_EXIT_CODE, (uint64_t)WEXITSTATUS(child->wait_status));
    if (child->status && child->status->text[0])
        reply_text(reply, FIELD_MESSAGE, child->status->text);
}
