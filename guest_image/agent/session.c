#include "session.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "channel.h"
#include "fields.h"
#include "output.h"
#include "protocol.h"
#include "report.h"
#include "requests.h"
#include "streams.h"
#include "version.h"
#include "workload.h"

enum {
    INPUT_MAX = 262144, /* an incomplete frame and much behind it; untouched pages cost nothing */
    READ_PER_TURN = 262144,
    NONCE = 16,
    HELLO_SIZE = 4 + NONCE + PROTOCOL_SECRET,
    HELLO_FRAME = PROTOCOL_HEADER + HELLO_SIZE + 1
};

enum session_state { DISCARDING, GREETING, LIVE, SUSPENDED };

struct frame {
    uint8_t type;
    uint32_t stream;
    uint32_t length;
    unsigned char *payload; /* payload[length] is the trailer, and writable */
};

static const unsigned char hello_header[PROTOCOL_HEADER] = {HELLO_SIZE, 0, 0, 0, FRAME_HELLO};
static enum session_state state = DISCARDING;
static unsigned char secret[PROTOCOL_SECRET + 1] = PROTOCOL_BOOT_SECRET;
static unsigned char resume_token[PROTOCOL_SECRET]; /* while SUSPENDED: resumes the session */
static unsigned char input[INPUT_MAX];
static size_t input_start, input_end; /* bytes that are not handled yet */
static size_t searched;               /* no secret begins before this */
static uint64_t offset;               /* of input_start, in this session's input */
static uint32_t highest;              /* stream id that was opened */

static void enter(enum session_state next)
{
    state = next;
    output_accept(state == LIVE || state == SUSPENDED);
}

static void consume(size_t length)
{
    input_start += length;
    offset += length;
    if (searched < input_start)
        searched = input_start;
}

/* End the session with ERROR and discard input up to the secret. For use while a frame is handled. */
static __attribute__((format(printf, 1, 2))) void fault(const char *format, ...)
{
    unsigned char payload[8 + 160];
    va_list arguments;

    for (int i = 0; i < 8; i++)
        payload[i] = (unsigned char)(offset >> (8 * i));
    va_start(arguments, format);
    vsnprintf((char *)payload + 8, sizeof payload - 8, format, arguments);
    va_end(arguments);
    enter(LIVE); /* a host that never sent HELLO gets the ERROR as well */
    output_control(FRAME_ERROR, 0, payload, 8 + strlen((char *)payload + 8));
    enter(DISCARDING);
    streams_end_all(STREAMS_LOST);
}

/* Search for the new secret from the end of the frame that brings it (see consume), also in bytes that were searched for the
 * old one: a host may have sent HELLO and died, and the next one sent HELLO, before the guest read either. */
static void set_secret(const unsigned char *new_secret)
{
    memcpy(secret, new_secret, PROTOCOL_SECRET);
    searched = input_start;
}

/* What a request does to the session. After QUIESCE and SUSPEND only what is queued now is written. */
static void apply(const struct request_effect *effect)
{
    if (effect->malformed.error)
        fault("%s", effect->malformed.text);
    if (effect->next != SESSION_GOES_ON)
        set_secret(effect->secret);
    if (effect->next == SESSION_QUIESCES)
        enter(DISCARDING);
    if (effect->next == SESSION_SUSPENDS) {
        memcpy(resume_token, effect->resume_token, PROTOCOL_SECRET);
        output_hold();
        enter(SUSPENDED);
    }
}

static void begin_session(size_t after_secret)
{
    enum streams_ending how = state == SUSPENDED ? STREAMS_COPIED : STREAMS_LOST;

    enter(GREETING);
    streams_end_all(how);
    output_reset();
    input_start = searched = after_secret;
    offset = 0;
    highest = 0;
}

/* A secret never begins in a handled frame: secrets hold no zero byte, and frames end in one. */
static void find_secret(void)
{
    unsigned char *found;

    while (input_end - searched >= PROTOCOL_SECRET &&
           (found = memmem(input + searched, input_end - searched, secret, PROTOCOL_SECRET)))
        begin_session((size_t)(found - input) + PROTOCOL_SECRET);
    if (input_end - searched >= PROTOCOL_SECRET)
        searched = input_end - PROTOCOL_SECRET + 1;
}

static void on_hello(const struct frame *frame)
{
    unsigned char welcome[4 + sizeof VERSION_TEXT];

    if (frame->length != HELLO_SIZE || memchr(frame->payload + 4 + NONCE, 0, PROTOCOL_SECRET)) {
        fault("HELLO must have %d bytes and a secret without zero bytes", HELLO_SIZE);
        return;
    }
    set_secret(frame->payload + 4 + NONCE);
    enter(LIVE);
    output_raw(frame->payload + 4, NONCE);
    store_u32(welcome, PROTOCOL_VERSION);
    memcpy(welcome + 4, VERSION_TEXT, sizeof VERSION_TEXT - 1);
    output_control(FRAME_WELCOME, 0, welcome, 4 + sizeof VERSION_TEXT - 1);
    workload_report_end();
    if (load_u32(frame->payload) != PROTOCOL_VERSION)
        fault("the host speaks protocol version %u, the agent %d", load_u32(frame->payload), PROTOCOL_VERSION);
}

static void on_open(const struct frame *frame)
{
    struct request_effect effect = {0};

    if (frame->length < 5 || frame->stream <= highest) {
        fault(frame->length < 5 ? "OPEN is too short" : "OPEN reuses a stream id");
        return;
    }
    uint8_t kind = frame->payload[0];
    uint32_t total = load_u32(frame->payload + 1);
    uint32_t here = frame->length - 5;
    highest = frame->stream;
    if (total > PROTOCOL_BODY_MAX || here > total)
        fault("OPEN has a body of %u bytes, %u of them here", total, here);
    else
        requests_open(frame->stream, kind, total, frame->payload + 5, here, &effect);
    apply(&effect);
}

static bool has_its_shape(const struct frame *frame)
{
    switch (frame->type) {
    case FRAME_BODY:
        return true;
    case FRAME_DATA:
        return frame->length >= 1 && frame->payload[0] == 0;
    case FRAME_EOF:
        return frame->length == 1 && frame->payload[0] == 0;
    case FRAME_WINDOW:
        return frame->length == 5 && frame->payload[0] <= 1;
    case FRAME_CLOSE:
        return frame->length == 4;
    case FRAME_SIGNAL:
        return frame->length == 1;
    case FRAME_RESIZE:
        return frame->length == 4;
    default:
        return false;
    }
}

/* A frame of an open stream, in its shape. -1: malformed. */
static int pass_on(struct stream *stream, const struct frame *frame, struct failure *failure)
{
    switch (frame->type) {
    case FRAME_DATA:
        return streams_take_data(stream, frame->payload + 1, frame->length - 1, failure);
    case FRAME_EOF:
        return streams_take_eof(stream, failure);
    case FRAME_WINDOW:
        return streams_grant(stream, frame->payload[0], load_u32(frame->payload + 1), failure);
    case FRAME_SIGNAL:
        return streams_signal(stream, frame->payload[0], failure);
    case FRAME_RESIZE:
        streams_resize(stream, (uint16_t)load_u16(frame->payload), (uint16_t)load_u16(frame->payload + 2));
        return 0;
    default:
        streams_abandon(stream);
        return 0;
    }
}

/* The frames of streams: everything but HELLO and OPEN. */
static void on_stream_frame(const struct frame *frame)
{
    struct stream *stream = streams_find(frame->stream);
    struct request_effect effect = {0};

    if (frame->stream == 0 || frame->stream > highest)
        fault("a frame of type %u for stream %u, which was never opened", frame->type, frame->stream);
    else if (!has_its_shape(frame))
        fault("malformed frame of type %u, %u bytes", frame->type, frame->length);
    else if (stream && frame->type == FRAME_BODY) /* without a stream: it has ended */
        requests_continue(stream, frame->payload, frame->length, &effect);
    else if (stream)
        pass_on(stream, frame, &effect.malformed);
    apply(&effect);
}

static void on_frame(const struct frame *frame)
{
    if (state == GREETING && (frame->type != FRAME_HELLO || frame->stream != 0))
        fault("the first frame must be HELLO");
    else if (state == GREETING)
        on_hello(frame);
    else if (frame->type == FRAME_OPEN)
        on_open(frame);
    else
        on_stream_frame(frame);
}

/* A host may have died in the middle of its secret, with the next host's secret right behind. Where the end of a secret is
 * like its beginning, the first match mixes the two, and the true match overlaps it. */
static bool find_overlapping_secret(void)
{
    for (size_t shift = 1; shift < PROTOCOL_SECRET; shift++) {
        size_t common = PROTOCOL_SECRET - shift;
        if (memcmp(secret + shift, secret, common) == 0 && memcmp(input + input_start, secret + common, shift) == 0) {
            begin_session(input_start + shift);
            return true;
        }
    }
    return false;
}

/* Resume a suspended session once its host sends the resume token. */
static bool find_resume_token(void)
{
    unsigned char *at = input + input_start;
    unsigned char *found = memmem(at, input_end - input_start, resume_token, PROTOCOL_SECRET);

    if (!found)
        return false;
    consume((size_t)(found - at) + PROTOCOL_SECRET);
    output_release();
    enter(LIVE);
    return true;
}

/* Handle the next frame if it is complete. */
static bool take_frame(void)
{
    unsigned char *at = input + input_start;
    size_t here = input_end - input_start;

    if (state == SUSPENDED)
        return find_resume_token();
    if (state == DISCARDING || here < (state == GREETING ? HELLO_FRAME : PROTOCOL_HEADER))
        return false;
    if (state == GREETING && memcmp(at, hello_header, sizeof hello_header) != 0 && find_overlapping_secret())
        return true;
    struct frame frame = {at[4], load_u32(at + 5), load_u32(at), at + PROTOCOL_HEADER};
    if (frame.length > PROTOCOL_PAYLOAD_MAX) {
        fault("frame of type %u has %u bytes", frame.type, frame.length);
        return false;
    }
    if (here < PROTOCOL_HEADER + (size_t)frame.length + 1 || output_is_backed_up())
        return false;
    if (frame.payload[frame.length] != 0) {
        /* Not consumed: the next host's secret may begin in what looks like the end of this frame. */
        fault("frame of type %u does not end in zero", frame.type);
        return false;
    }
    on_frame(&frame);
    consume(PROTOCOL_HEADER + (size_t)frame.length + 1);
    return true;
}

static void handle_input(void)
{
    do {
        find_secret(); /* again after each frame: HELLO and QUIESCE change what to look for */
    } while (take_frame());
    if (state == DISCARDING || state == SUSPENDED)
        input_start = searched;
    if (input_start == input_end)
        input_start = input_end = searched = 0;
}

static void make_room(void)
{
    memmove(input, input + input_start, input_end - input_start);
    searched -= input_start;
    input_end -= input_start;
    input_start = 0;
}

bool session_read(void)
{
    size_t taken = 0, got;

    handle_input(); /* frames may be left from when too many replies waited */
    while (taken < READ_PER_TURN) {
        if (input_end == INPUT_MAX)
            make_room();
        if (input_end == INPUT_MAX)
            return false; /* full of requests, which wait for the host to read replies */
        got = channel_read(input + input_end, INPUT_MAX - input_end);
        if (!got)
            return false;
        input_end += got;
        taken += got;
        handle_input();
    }
    return true;
}
