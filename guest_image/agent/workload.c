#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cgroup.h"
#include "child.h"
#include "logs.h"
#include "loop.h"
#include "namespaces.h"
#include "output.h"
#include "protocol.h"

static void on_end(struct child *child, int wait_status);

static struct child workload = {.ended = on_end};
static bool started, ended, is_init, wants_power_off;
static uint64_t oom_kills_reported;

static void send_event(uint8_t event, const struct reply *fields)
{
    unsigned char payload[1 + sizeof fields->bytes];

    payload[0] = event;
    memcpy(payload + 1, fields->bytes, fields->used);
    output_control(FRAME_EVENT, 0, payload, 1 + fields->used);
}

static void report_oom(void)
{
    struct reply fields = {0};
    uint64_t kills = cgroup_oom_kills();

    if (kills == oom_kills_reported)
        return;
    oom_kills_reported = kills;
    reply_number(&fields, FIELD_OOM_KILLS, kills);
    send_event(EVENT_OOM, &fields);
}

void workload_report_end(void)
{
    struct reply fields = {0};

    if (!ended)
        return;
    child_put_end(&fields, &workload);
    reply_number(&fields, FIELD_OOM_KILLS, oom_kills_reported);
    send_event(EVENT_WORKLOAD_EXIT, &fields);
}

static void on_end(struct child *child, int wait_status)
{
    (void)child;
    (void)wait_status;
    ended = true;
    namespaces_follow(0);
    logs_end();
    report_oom();
    workload_report_end();
}

static int launch_with_output(struct launch *how, struct failure *failure)
{
    int output[2];

    if (pipe2(output, O_CLOEXEC))
        return fail(failure, "pipe2", "for the log");
    fcntl(output[0], F_SETFL, O_NONBLOCK);
    how->output = how->errors = output[1]; /* one pipe keeps the order of lines */
    int result = child_start(&workload, how, failure);
    close(output[1]);
    if (result || logs_follow(output[0])) {
        close(output[0]);
        return result ? result : fail(failure, "epoll_ctl", "log");
    }
    started = true;
    is_init = how->is_init;
    namespaces_follow(workload.pid);
    cgroup_watch_oom(report_oom);
    return 0;
}

static int start(struct launch *how, struct reply *reply, struct failure *failure)
{
    how->input = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (how->input < 0)
        return fail(failure, "open", "/dev/null");
    int result = launch_with_output(how, failure);
    close(how->input);
    if (result == 0)
        reply_number(reply, FIELD_PID, (uint64_t)workload.status->pid);
    return result;
}

int workload_start(const struct body *body, struct reply *reply, struct failure *failure)
{
    enum { IS_INIT = 4 };
    uint64_t flags = 0;

    if (started)
        return fail_with(failure, EALREADY, "the workload was started already");
    if (!namespaces_are_made())
        return fail_with(failure, EINVAL, "the guest is not configured");
    if (!body_count(body, FIELD_ARG))
        return fail_with(failure, EINVAL, "START has no ARG");
    body_number(body, FIELD_FLAGS, &flags);
    struct launch how = {.arguments = body_texts(body, FIELD_ARG, 0),
                         .environment = body_texts(body, FIELD_ENV, 2),
                         .directory = body_text(body, FIELD_CWD),
                         .user = body_text(body, FIELD_USER),
                         .is_workload = true,
                         .is_init = flags & IS_INIT};
    int result = how.arguments && how.environment ? start(&how, reply, failure)
                                                  : fail_with(failure, ENOMEM, "no memory for the arguments");
    free(how.arguments);
    free(how.environment);
    return result;
}

pid_t workload_init(void)
{
    return is_init && !ended ? workload.pid : 0;
}

static const char *state_name(void)
{
    if (ended)
        return "exited";
    if (cgroup_is_frozen())
        return "frozen";
    return started ? "running" : "idle";
}

int workload_status(const struct body *body, struct reply *reply, struct failure *failure)
{
    (void)body;
    (void)failure;
    reply_text(reply, FIELD_STATE, state_name());
    if (ended)
        child_put_end(reply, &workload);
    reply_number(reply, FIELD_OOM_KILLS, cgroup_oom_kills());
    return 0;
}

int workload_stop(const struct body *body, struct reply *reply, struct failure *failure)
{
    uint64_t number = SIGTERM;

    (void)reply;
    body_number(body, FIELD_SIGNAL, &number);
    if (!workload.pid)
        return fail_with(failure, ESRCH, "the workload does not run");
    if (number >= NSIG || kill(workload.pid, (int)number))
        return fail_with(failure, EINVAL, "cannot send signal %llu", (unsigned long long)number);
    return 0;
}

static void power_off_unread(void)
{
    report_power_off();
}

int workload_power_off(const struct body *body, struct reply *reply, struct failure *failure)
{
    enum { REPLY_MS = 500 };
    static struct alarm patience = {.ring = power_off_unread};

    (void)body;
    (void)reply;
    (void)failure;
    wants_power_off = true;
    loop_set_alarm(&patience, loop_now_ms() + REPLY_MS);
    return 0;
}

bool workload_wants_power_off(void)
{
    return wants_power_off;
}
