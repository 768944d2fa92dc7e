/* The guest agent: process 1 of the VM. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "boot.h"
#include "cgroup.h"
#include "channel.h"
#include "child.h"
#include "configure.h"
#include "logs.h"
#include "loop.h"
#include "memory.h"
#include "namespaces.h"
#include "output.h"
#include "report.h"
#include "session.h"
#include "streams.h"
#include "version.h"
#include "workload.h"

struct options {
    int channel_fd; /* -1: find the channel of the VM */
    const char *root;
    const char *cgroup;
};

static _Noreturn void show_usage(void)
{
    fputs("usage: agent [--version] [--channel-fd N --root DIR --cgroup NAME --no-reboot]\n", stderr);
    exit(2);
}

static struct options parse_options(int count, char **arguments)
{
    struct options options = {.channel_fd = -1};

    for (int i = 1; i < count; i++) {
        const char *value = i + 1 < count ? arguments[i + 1] : NULL;
        if (strcmp(arguments[i], "--version") == 0) {
            puts(VERSION_TEXT);
            exit(0);
        }
        if (strcmp(arguments[i], "--no-reboot") == 0) {
            report_test_mode = true;
            continue;
        }
        if (!value)
            show_usage();
        if (strcmp(arguments[i], "--channel-fd") == 0)
            options.channel_fd = atoi(value);
        else if (strcmp(arguments[i], "--root") == 0)
            options.root = value;
        else if (strcmp(arguments[i], "--cgroup") == 0)
            options.cgroup = value;
        else
            show_usage();
        i++;
    }
    return options;
}

/* A process that a sanitiser starts at exit must not join the workload's PID namespace. */
static void leave_namespaces(void)
{
    namespaces_leave();
}

/* Only for tests: the kernel passes unknown words of its command line to /init, which ignores them. */
static void set_up_test(const struct options *options)
{
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    atexit(cgroup_remove);
    atexit(leave_namespaces);
    if (options->root)
        namespaces_use_directory(options->root);
    if (options->cgroup)
        configure_use_cgroup(options->cgroup);
}

static _Noreturn void serve(void)
{
    bool is_busy = false;

    for (;;) {
        loop_turn(is_busy);
        bool was_backed_up = output_is_backed_up();
        is_busy = session_read();
        is_busy |= output_pump(streams_take_turn);
        is_busy |= logs_pump(); /* after the other two: they make room in the ring */
        is_busy |= output_pump(streams_take_turn);
        is_busy |= was_backed_up && !output_is_backed_up(); /* requests that waited can be served */
        if (workload_wants_power_off() && output_is_empty())
            report_power_off();
    }
}

int main(int count, char **arguments)
{
    bool is_init = getpid() == 1 && count >= 1 && strcmp(arguments[0], "/init") == 0;
    struct options options = {.channel_fd = -1};

    umask(0);
    if (!is_init)
        options = parse_options(count, arguments);
    if (report_test_mode) {
        set_up_test(&options);
    } else {
        boot_mount();
        boot_load_modules();
    }
    boot_raise_limits();
    loop_open();
    child_open();
    if (!report_test_mode)
        memory_end_thrashing();
    if (options.channel_fd >= 0)
        channel_use(options.channel_fd);
    else
        channel_find();
    report("serving, " VERSION_TEXT);
    serve();
}
