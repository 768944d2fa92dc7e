#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "cgroup.h"
#include "child.h"
#include "child_stdio.h"
#include "loop.h"
#include "namespaces.h"
#include "output.h"
#include "program_output.h"
#include "protocol.h"
#include "streams.h"
#include "tar.h"
#include "terminal.h"
#include "write_buffer.h"

enum { DETACHED = 1, ON_TERMINAL = 2 };
enum { ENDED_MAX = 16 };

struct exec {
    struct stream stream;
    struct child child;
    struct source input;
    struct write_buffer buffer;
    struct program_output outputs[2];
    uint8_t turn; /* the output to ask first */
    uint64_t oom_kills; /* of the workload and all commands, before this one */
    bool is_detached;   /* the process goes on without its stream */
    bool is_transfer;   /* of files, of no use without its stream */
    bool has_terminal;
    bool has_ended;
    bool is_orphan; /* the stream is gone */
    bool lives_on;  /* the process goes on without a stream, and ATTACH may give it another one */
    struct exec *next_orphan;
};

static struct exec *orphans; /* those that live on, the latest first */

static void close_pipes(struct exec *exec)
{
    loop_close(&exec->input);
    for (int i = 0; i < 2; i++) {
        program_output_leave(&exec->outputs[i]);
        ring_free(&exec->outputs[i].ring);
    }
    write_buffer_free(&exec->buffer);
}

static void release(struct exec *exec)
{
    close_pipes(exec);
    child_release(&exec->child);
    loop_free(exec);
}

/* Close stdin once the host has sent EOF and everything is written. */
static void settle_input(struct exec *exec)
{
    bool is_empty = write_buffer_flush(&exec->buffer);

    if (exec->buffer.is_broken || (exec->stream.input_ended && is_empty))
        loop_close(&exec->input);
}

/* Keep only the latest ENDED_MAX of those that have ended: the host may never attach to them. */
static void forget_old_orphans(void)
{
    unsigned ended = 0;
    struct exec **link = &orphans;

    while (*link) {
        struct exec *exec = *link;
        ended += exec->has_ended;
        if (exec->has_ended && ended > ENDED_MAX) {
            *link = exec->next_orphan;
            release(exec);
        } else {
            link = &exec->next_orphan;
        }
    }
}

static struct exec *of_input(struct source *source)
{
    return (struct exec *)(void *)((char *)source - offsetof(struct exec, input));
}

static void on_input(struct source *source, uint32_t events)
{
    struct exec *exec = of_input(source);

    if (events & EPOLLERR)
        exec->buffer.is_broken = true;
    settle_input(exec);
}

static void on_output(struct source *source, uint32_t events)
{
    struct program_output *output = (struct program_output *)source;

    (void)events;
    output->is_readable = true;
    if (output->owner->is_orphan)
        program_output_keep(output);
    else
        streams_ready(&output->owner->stream);
}

static void on_end(struct child *child, int wait_status)
{
    struct exec *exec = (struct exec *)(void *)((char *)child - offsetof(struct exec, child));

    (void)wait_status;
    exec->has_ended = true;
    if (exec->is_orphan && !exec->lives_on) {
        release(exec);
        return;
    }
    for (int i = 0; i < 2; i++)
        program_output_end(&exec->outputs[i], exec->has_terminal);
    if (exec->is_orphan)
        forget_old_orphans();
    else
        streams_ready(&exec->stream);
}

static void on_data(struct stream *stream, const unsigned char *bytes, size_t length)
{
    struct exec *exec = (struct exec *)stream;

    write_buffer_put(&exec->buffer, bytes, length);
    if (exec->buffer.is_broken)
        loop_close(&exec->input);
}

static void on_eof(struct stream *stream)
{
    static const unsigned char typed = TERMINAL_END_OF_FILE;
    struct exec *exec = (struct exec *)stream;

    if (exec->has_terminal && exec->input.fd >= 0)
        write_buffer_put(&exec->buffer, &typed, 1);
    settle_input(exec);
}

static void on_resize(struct stream *stream, uint16_t rows, uint16_t columns)
{
    struct exec *exec = (struct exec *)stream;

    if (exec->has_terminal)
        terminal_resize(exec->outputs[0].source.fd, (struct terminal_size){.rows = rows, .columns = columns});
}

static void on_signal(struct stream *stream, int number)
{
    struct exec *exec = (struct exec *)stream;

    if (exec->child.pid && number > 0 && number < NSIG)
        kill(-exec->child.pid, number);
}

static void send_exit(struct exec *exec)
{
    struct reply fields = {0};

    child_put_end(&fields, &exec->child);
    uint64_t oom_kills = cgroup_oom_kills();
    if (oom_kills > exec->oom_kills)
        reply_number(&fields, FIELD_OOM_KILLS, oom_kills - exec->oom_kills);
    output_in_turn(FRAME_EXIT, exec->stream.id, fields.bytes, fields.used);
    streams_end(&exec->stream);
    release(exec);
}

static bool emit(struct stream *stream)
{
    struct exec *exec = (struct exec *)stream;

    for (uint8_t i = 0; i < 2; i++) {
        uint8_t channel = exec->turn ^ i;
        if (program_output_send(&exec->outputs[channel], stream, channel)) {
            exec->turn = channel ^ 1;
            return true;
        }
    }
    if (exec->has_ended && exec->outputs[0].source.fd < 0 && exec->outputs[1].source.fd < 0)
        send_exit(exec);
    return false;
}

static bool lives_on(const struct exec *exec, enum streams_ending why)
{
    return exec->is_detached || (why == STREAMS_COPIED && !exec->is_transfer);
}

static void abandon(struct stream *stream, enum streams_ending why)
{
    struct exec *exec = (struct exec *)stream;

    streams_end(stream);
    exec->is_orphan = true;
    exec->lives_on = lives_on(exec, why);
    if (exec->has_ended && !exec->lives_on) {
        release(exec);
        return;
    }
    loop_close(&exec->input);
    for (int i = 0; i < 2; i++) /* not closed: a process that writes about its SIGHUP must not get SIGPIPE */
        if (exec->outputs[i].source.fd >= 0 && !exec->has_ended)
            program_output_keep(&exec->outputs[i]);
    if (exec->lives_on) {
        exec->next_orphan = orphans;
        orphans = exec;
    } else {
        child_hang_up(&exec->child);
    }
}

static const struct stream_ops ops = {
    .data = on_data, .eof = on_eof, .signal = on_signal, .resize = on_resize, .emit = emit, .abandon = abandon};

static int watch(struct exec *exec, int pipes[3][2])
{
    exec->input = (struct source){.fd = pipes[0][PARENT], .ready = on_input};
    exec->buffer = (struct write_buffer){.stream = &exec->stream, .source = &exec->input};
    for (int i = 0; i < 2; i++)
        exec->outputs[i] = (struct program_output){.source = {.fd = pipes[i + 1][PARENT], .ready = on_output},
                                                   .owner = exec,
                                                   .is_readable = true,
                                                   .closes_at_end = exec->has_terminal || exec->is_transfer};
    if (loop_add(&exec->input, EPOLLOUT))
        return -1;
    if (loop_add(&exec->outputs[0].source, EPOLLIN))
        return -1;
    return exec->has_terminal ? 0 : loop_add(&exec->outputs[1].source, EPOLLIN);
}

static int start(struct exec *exec, struct launch *how, struct terminal_size size, struct failure *failure)
{
    int pipes[3][2];

    if (exec->has_terminal ? child_stdio_terminal(size, pipes, failure) : child_stdio_pipes(pipes, failure))
        return -1;
    how->input = pipes[0][CHILD];
    how->output = pipes[1][CHILD];
    how->errors = pipes[2][CHILD];
    exec->child.ended = on_end;
    int result = child_start(&exec->child, how, failure);
    for (int i = 0; i < 3; i++)
        close(pipes[i][CHILD]);
    if (result) {
        for (int i = 0; i < 3; i++)
            close(pipes[i][PARENT]);
        return result;
    }
    if (watch(exec, pipes)) {
        /* No memory for epoll: end the process. on_end releases the memory. */
        result = fail(failure, "epoll_ctl", "");
        exec->is_orphan = true;
        close_pipes(exec);
        child_hang_up(&exec->child);
    }
    return result;
}

static int begin(uint32_t id, struct launch *how, uint64_t flags, struct terminal_size size, struct failure *failure)
{
    struct reply reply = {0};

    if (!namespaces_are_made())
        return fail_with(failure, EINVAL, "the guest is not configured");
    if (cgroup_is_frozen())
        return fail_with(failure, EBUSY, "the workload is frozen: PERSONALISE comes first");
    struct exec *exec = calloc(1, sizeof *exec);
    if (!exec)
        return fail_with(failure, ENOMEM, "no memory for a stream");
    exec->oom_kills = cgroup_oom_kills();
    exec->is_detached = flags & DETACHED;
    exec->is_transfer = how->run != NULL;
    exec->has_terminal = how->has_terminal = flags & ON_TERMINAL;
    if (start(exec, how, size, failure)) {
        if (!exec->is_orphan)
            free(exec);
        return -1;
    }
    streams_begin(&exec->stream, id, &ops);
    reply_number(&reply, FIELD_PID, (uint64_t)exec->child.status->pid);
    output_reply(id, 0, reply.bytes, reply.used);
    return 0;
}

int exec_open(uint32_t id, const struct body *body, struct failure *failure)
{
    uint64_t flags = 0, rows = 0, columns = 0;

    if (!body_count(body, FIELD_ARG))
        return fail_with(failure, EINVAL, "EXEC has no ARG");
    body_number(body, FIELD_FLAGS, &flags);
    body_number(body, FIELD_ROWS, &rows);
    body_number(body, FIELD_COLUMNS, &columns);
    struct terminal_size size = {.rows = (uint16_t)rows, .columns = (uint16_t)columns};
    struct launch how = {.arguments = body_texts(body, FIELD_ARG, 0),
                         .environment = body_texts(body, FIELD_ENV, 2),
                         .directory = body_text(body, FIELD_CWD),
                         .user = body_text(body, FIELD_USER)};
    int result = how.arguments && how.environment ? begin(id, &how, flags, size, failure)
                                                  : fail_with(failure, ENOMEM, "no memory for the arguments");
    free(how.arguments);
    free(how.environment);
    return result;
}

int exec_attach(uint32_t id, const struct body *body, struct failure *failure)
{
    struct exec **link = &orphans;
    struct reply reply = {0};
    char text[48];
    uint64_t pid = 0;

    body_number(body, FIELD_PID, &pid);
    while (*link && (uint64_t)(*link)->child.status->pid != pid)
        link = &(*link)->next_orphan;
    struct exec *exec = *link;
    if (!exec)
        return fail_with(failure, ESRCH, "no command without a stream has process id %llu", (unsigned long long)pid);
    *link = exec->next_orphan;
    exec->is_orphan = exec->lives_on = false;
    exec->stream = (struct stream){0};
    streams_begin(&exec->stream, id, &ops);
    reply_number(&reply, FIELD_PID, pid);
    snprintf(text, sizeof text, "dropped_bytes=%llu",
             (unsigned long long)(exec->outputs[0].ring.dropped + exec->outputs[1].ring.dropped));
    reply_text(&reply, FIELD_METRIC, text);
    output_reply(id, 0, reply.bytes, reply.used);
    streams_ready(&exec->stream);
    return 0;
}

static int open_tar(uint32_t id, const struct body *body, int (*run)(void *, struct child_status *), struct failure *failure)
{
    struct tar_request request = {.path = body_text(body, FIELD_PATH), .user = body_text(body, FIELD_USER)};
    struct launch how = {.run = run, .argument = &request};

    body_number(body, FIELD_FLAGS, &request.flags);
    if (!request.path || !*request.path)
        return fail_with(failure, EINVAL, "no PATH");
    return begin(id, &how, 0, (struct terminal_size){0}, failure);
}

int exec_open_tar_in(uint32_t id, const struct body *body, struct failure *failure)
{
    return open_tar(id, body, tar_extract, failure);
}

int exec_open_tar_out(uint32_t id, const struct body *body, struct failure *failure)
{
    return open_tar(id, body, tar_create, failure);
}
