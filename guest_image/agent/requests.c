#include "requests.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "accept.h"
#include "configure.h"
#include "connect.h"
#include "exec.h"
#include "fields.h"
#include "status.h"
#include "logs.h"
#include "loop.h"
#include "output.h"
#include "network.h"
#include "personalise.h"
#include "protocol.h"
#include "report.h"
#include "workload.h"

enum { BODIES_MAX = 8 * PROTOCOL_BODY_MAX }; /* bytes of all incomplete bodies */

/* A stream whose body is still arriving. */
struct incoming {
    struct stream stream;
    uint8_t kind;
    uint32_t total, here;
    unsigned char *bytes;
};

/* A verb fills in the reply. A stream begins by itself and sends its REPLY later. */
typedef int verb(const struct body *body, struct reply *reply, struct failure *failure);
typedef int opener(uint32_t id, const struct body *body, struct failure *failure);

static const struct request_kind {
    uint8_t kind;
    verb *verb;
    opener *opener;
} kinds[] = {
    {KIND_CONFIGURE, configure, NULL},
    {KIND_START, workload_start, NULL},
    {KIND_STATUS, workload_status, NULL},
    {KIND_METRICS, status_metrics, NULL},
    {KIND_QUIESCE, personalise_quiesce, NULL},
    {KIND_PERSONALISE, personalise, NULL},
    {KIND_LISTENING, status_listening, NULL},
    {KIND_STOP, workload_stop, NULL},
    {KIND_POWEROFF, workload_power_off, NULL},
    {KIND_SYNC, status_sync, NULL},
    {KIND_FREEZE, personalise_freeze, NULL},
    {KIND_JOIN, network_join, NULL},
    {KIND_SUSPEND, personalise_suspend, NULL},
    {KIND_EXEC, NULL, exec_open},
    {KIND_CONNECT, NULL, connect_open},
    {KIND_LOGS, NULL, logs_open},
    {KIND_TAR_IN, NULL, exec_open_tar_in},
    {KIND_TAR_OUT, NULL, exec_open_tar_out},
    {KIND_ATTACH, NULL, exec_attach},
    {KIND_ACCEPT, NULL, accept_open},
};

static size_t incoming_bytes;

static void refuse(uint32_t id, const struct failure *failure)
{
    struct reply reply = {0};

    reply_text(&reply, FIELD_MESSAGE, failure->text);
    output_reply(id, (uint32_t)failure->error, reply.bytes, reply.used);
}

static const struct request_kind *find_kind(uint8_t kind)
{
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (kinds[i].kind == kind)
            return &kinds[i];
    return NULL;
}

static void copy_secret(unsigned char *to, const struct body *body, uint16_t tag)
{
    memcpy(to, body_find(body, tag)->bytes, PROTOCOL_SECRET);
}

/* What follows the REPLY of a verb. */
static void follow_up(uint8_t kind, const struct body *body, struct request_effect *effect)
{
    if (kind == KIND_PERSONALISE) {
        bool stays_frozen = personalise_leaves_frozen(body);
        output_pump(streams_take_turn); /* ahead of the thaw: the first instructions of the workload are the slowest */
        if (!stays_frozen)
            personalise_thaw();
    }
    if (kind == KIND_QUIESCE || kind == KIND_SUSPEND)
        copy_secret(effect->secret, body, FIELD_SECRET);
    if (kind == KIND_SUSPEND)
        copy_secret(effect->resume_token, body, FIELD_RESUME_TOKEN);
    effect->next = kind == KIND_QUIESCE   ? SESSION_QUIESCES
                   : kind == KIND_SUSPEND ? SESSION_SUSPENDS
                                          : SESSION_GOES_ON;
}

static int serve(uint32_t id, uint8_t kind, const struct body *body, struct request_effect *effect,
                 struct failure *failure)
{
    const struct request_kind *request = find_kind(kind);
    struct reply reply;

    if (!request)
        return fail_with(failure, ENOSYS, "no such request: %u", kind);
    if (body_check(body, failure))
        return -1;
    if (request->opener)
        return request->opener(id, body, failure);
    reply.used = 0;
    if (request->verb(body, &reply, failure))
        return -1;
    output_reply(id, 0, reply.bytes, reply.used);
    follow_up(kind, body, effect);
    return 0;
}

/* Serve a request whose body is complete. bytes[length] is writable. */
static void run(uint32_t id, uint8_t kind, unsigned char *bytes, size_t length, struct request_effect *effect)
{
    struct failure failure = {0};
    struct body body;

    if (!body_parse(&body, bytes, length)) {
        fail_with(&effect->malformed, EPROTO, "the body of stream %u is not a list of fields", id);
        return;
    }
    if (serve(id, kind, &body, effect, &failure))
        refuse(id, &failure);
    body_free(&body);
}

static void abandon(struct stream *stream, enum streams_ending why)
{
    struct incoming *incoming = (struct incoming *)stream;

    (void)why;
    incoming_bytes -= incoming->total;
    free(incoming->bytes);
    streams_end(stream);
    loop_free(incoming);
}

static const struct stream_ops incoming_ops = {.abandon = abandon};

static int collect(uint32_t id, uint8_t kind, uint32_t total, const unsigned char *bytes, uint32_t here,
                   struct failure *failure)
{
    if (incoming_bytes + total > BODIES_MAX)
        return fail_with(failure, EAGAIN, "too many unfinished requests: their bodies would be %zu bytes",
                         incoming_bytes + total);
    struct incoming *incoming = calloc(1, sizeof *incoming);
    unsigned char *place = malloc((size_t)total + 1);
    if (!incoming || !place) {
        free(incoming);
        free(place);
        return fail_with(failure, ENOMEM, "no memory for a body of %u bytes", total);
    }
    incoming->bytes = place;
    incoming->kind = kind;
    incoming->total = total;
    incoming->here = here;
    incoming_bytes += total;
    memcpy(place, bytes, here);
    streams_begin(&incoming->stream, id, &incoming_ops);
    return 0;
}

void requests_open(uint32_t id, uint8_t kind, uint32_t total, unsigned char *bytes, uint32_t here,
                   struct request_effect *effect)
{
    struct failure failure = {0};

    if (streams_are_full())
        fail_with(&failure, EAGAIN, "%d streams are open already", PROTOCOL_STREAMS_MAX);
    else if (here == total)
        run(id, kind, bytes, total, effect);
    else
        collect(id, kind, total, bytes, here, &failure);
    if (failure.error)
        refuse(id, &failure);
}

void requests_continue(struct stream *stream, const unsigned char *bytes, uint32_t length, struct request_effect *effect)
{
    struct incoming *incoming = (struct incoming *)stream;

    if (stream->ops != &incoming_ops || length > incoming->total - incoming->here) {
        fail_with(&effect->malformed, EPROTO, "BODY beyond what stream %u announced", stream->id);
        return;
    }
    memcpy(incoming->bytes + incoming->here, bytes, length);
    incoming->here += length;
    if (incoming->here < incoming->total)
        return;
    uint32_t id = stream->id;
    uint8_t kind = incoming->kind;
    uint32_t total = incoming->total;
    unsigned char *body = incoming->bytes;
    incoming_bytes -= total;
    streams_end(stream); /* the request begins another stream under the same id */
    loop_free(incoming);
    run(id, kind, body, total, effect);
    free(body);
}
