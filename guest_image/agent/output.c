#include "output.h"

#include <string.h>

#include "channel.h"
#include "fields.h"
#include "protocol.h"
#include "report.h"

enum {
    CONTROL_MAX = 2097152,    /* REPLY, CLOSE and WINDOW of every stream, and the replies below BACKED_UP */
    CONTROL_BACKED_UP = 49152,
    STAGE_FULL = 32768,       /* no more frames are added; a virtio port takes no more at once */
    STAGE_MAX = STAGE_FULL + PROTOCOL_HEADER + PROTOCOL_PAYLOAD_MAX + 1,
    WRITES_PER_TURN = 8
};

/* Both are far larger than they usually fill. Untouched pages cost nothing. */
static unsigned char control[CONTROL_MAX];
static size_t control_start, control_end;
static size_t control_hold; /* while held: bytes from here on wait */
static bool is_held;
static bool is_accepting;
static unsigned char stage[STAGE_MAX];
static size_t stage_start, stage_end;

static size_t put_frame(unsigned char *at, uint8_t type, uint32_t stream, const void *payload, size_t length)
{
    store_u32(at, (uint32_t)length);
    at[4] = type;
    store_u32(at + 5, stream);
    if (payload)
        memcpy(at + PROTOCOL_HEADER, payload, length);
    at[PROTOCOL_HEADER + length] = 0;
    return PROTOCOL_HEADER + length + 1;
}

static void compact_control(void)
{
    memmove(control, control + control_start, control_end - control_start);
    control_end -= control_start;
    control_hold -= is_held ? control_start : 0;
    control_start = 0;
}

void output_accept(bool has_session)
{
    is_accepting = has_session;
}

void output_control(uint8_t type, uint32_t stream, const void *payload, size_t length)
{
    if (!is_accepting)
        return;
    if (control_end + PROTOCOL_HEADER + length + 1 > CONTROL_MAX)
        compact_control();
    if (control_end + PROTOCOL_HEADER + length + 1 > CONTROL_MAX)
        return; /* impossible: requests are not read while more than CONTROL_BACKED_UP waits */
    control_end += put_frame(control + control_end, type, stream, payload, length);
}

void output_raw(const void *bytes, size_t length)
{
    memcpy(control + control_end, bytes, length);
    control_end += length;
}

void output_reply(uint32_t stream, uint32_t error, const void *fields, size_t length)
{
    unsigned char payload[4 + sizeof((struct reply *)0)->bytes];

    store_u32(payload, error);
    if (length)
        memcpy(payload + 4, fields, length);
    output_control(FRAME_REPLY, stream, payload, 4 + length);
}

void output_window(uint32_t stream, uint8_t channel, uint32_t bytes)
{
    unsigned char payload[5] = {channel};

    store_u32(payload + 1, bytes);
    output_control(FRAME_WINDOW, stream, payload, sizeof payload);
}

void output_close(uint32_t stream, uint32_t error)
{
    unsigned char payload[4];

    store_u32(payload, error);
    output_control(FRAME_CLOSE, stream, payload, sizeof payload);
}

bool output_is_backed_up(void)
{
    return control_end - control_start > CONTROL_BACKED_UP;
}

bool output_is_empty(void)
{
    return stage_start == stage_end && control_start == control_end;
}

unsigned char *output_data_place(size_t *room)
{
    *room = PROTOCOL_PAYLOAD_MAX - 1;
    return stage + stage_end + PROTOCOL_HEADER + 1;
}

void output_data(uint32_t stream, uint8_t channel, size_t length)
{
    stage[stage_end + PROTOCOL_HEADER] = channel;
    stage_end += put_frame(stage + stage_end, FRAME_DATA, stream, NULL, length + 1); /* the payload is already in place */
}

void output_in_turn(uint8_t type, uint32_t stream, const void *payload, size_t length)
{
    stage_end += put_frame(stage + stage_end, type, stream, payload, length);
}

void output_reset(void)
{
    control_start = control_end = 0;
    stage_start = stage_end = 0;
    is_held = false;
}

void output_hold(void)
{
    control_hold = control_end;
    is_held = true;
}

void output_release(void)
{
    is_held = false;
}

static void fill_stage(bool (*next_turn)(void))
{
    size_t waiting = (is_held ? control_hold : control_end) - control_start;
    size_t taken = waiting < STAGE_FULL ? waiting : STAGE_FULL;

    stage_start = stage_end = 0;
    memcpy(stage, control + control_start, taken);
    stage_end = taken;
    control_start += taken;
    if (is_held || control_start < control_end)
        return;
    control_start = control_end = 0;
    /* A turn can queue a control frame, which goes before further data. */
    while (stage_end < STAGE_FULL && control_end == 0 && is_accepting && next_turn())
        ;
}

bool output_pump(bool (*next_turn)(void))
{
    for (int i = 0; i < WRITES_PER_TURN; i++) {
        if (!channel_can_write())
            return false;
        if (stage_start == stage_end)
            fill_stage(next_turn);
        if (stage_start < stage_end)
            stage_start += channel_write(stage + stage_start, stage_end - stage_start);
        else if (is_held || control_start == control_end)
            return false;
    }
    return true;
}
