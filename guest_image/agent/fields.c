#include "fields.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "protocol.h"

enum { FIELD_HEADER = 6 };

static bool count_fields(const unsigned char *bytes, size_t length, size_t *count)
{
    *count = 0;
    while (length) {
        if (length < FIELD_HEADER)
            return false;
        size_t size = load_u32(bytes + 2);
        if (size > length - FIELD_HEADER)
            return false;
        bytes += FIELD_HEADER + size;
        length -= FIELD_HEADER + size;
        ++*count;
    }
    return true;
}

bool body_parse(struct body *body, unsigned char *bytes, size_t length)
{
    size_t count;

    body->count = 0;
    body->fields = body->few;
    if (!count_fields(bytes, length, &count))
        return false;
    if (count > sizeof body->few / sizeof body->few[0])
        body->fields = malloc(count * sizeof *body->fields);
    if (!body->fields)
        return false;
    while (body->count < count) {
        struct field *field = &body->fields[body->count++];
        field->tag = (uint16_t)load_u16(bytes);
        field->length = load_u32(bytes + 2);
        field->bytes = (char *)bytes + FIELD_HEADER;
        bytes[0] = 0; /* this header is read: its first byte becomes the final zero of the field before */
        bytes += FIELD_HEADER + field->length;
    }
    bytes[0] = 0;
    return true;
}

void body_free(struct body *body)
{
    if (body->fields != body->few)
        free(body->fields);
    body->fields = NULL;
}

const struct field *body_find(const struct body *body, uint16_t tag)
{
    for (size_t i = 0; i < body->count; i++)
        if (body->fields[i].tag == tag)
            return &body->fields[i];
    return NULL;
}

size_t body_count(const struct body *body, uint16_t tag)
{
    size_t count = 0;

    for (size_t i = 0; i < body->count; i++)
        count += body->fields[i].tag == tag;
    return count;
}

const char *body_text(const struct body *body, uint16_t tag)
{
    const struct field *field = body_find(body, tag);

    return field ? field->bytes : NULL;
}

static uint64_t load_u64(const char *bytes)
{
    const unsigned char *at = (const unsigned char *)bytes;

    return load_u32(at) | (uint64_t)load_u32(at + 4) << 32;
}

bool body_number(const struct body *body, uint16_t tag, uint64_t *value)
{
    const struct field *field = body_find(body, tag);

    if (!field)
        return false;
    *value = load_u64(field->bytes);
    return true;
}

char **body_texts(const struct body *body, uint16_t tag, size_t spare)
{
    char **texts = calloc(body_count(body, tag) + spare + 1, sizeof *texts);
    size_t used = 0;

    for (size_t i = 0; texts && i < body->count; i++)
        if (body->fields[i].tag == tag)
            texts[used++] = body->fields[i].bytes;
    return texts;
}

/* The size a field must have, or 0 for a text. */
static uint32_t fixed_size(uint16_t tag)
{
    switch (tag) {
    case FIELD_REALTIME_NS:
    case FIELD_UPPER_MIB:
    case FIELD_SHM_MIB:
    case FIELD_PORT:
    case FIELD_SIGNAL:
    case FIELD_FLAGS:
    case FIELD_PID:
    case FIELD_PEER_GATEWAY:
    case FIELD_ROWS:
    case FIELD_COLUMNS:
        return 8;
    case FIELD_MAC:
        return 6;
    case FIELD_ENTROPY:
        return 32;
    case FIELD_SECRET:
    case FIELD_RESUME_TOKEN:
        return PROTOCOL_SECRET;
    default:
        return 0;
    }
}

int body_check(const struct body *body, struct failure *failure)
{
    for (size_t i = 0; i < body->count; i++) {
        const struct field *field = &body->fields[i];
        uint32_t size = fixed_size(field->tag);
        if (size && field->length != size)
            return fail_with(failure, EINVAL, "field %u has %u bytes, not %u", field->tag, field->length, size);
        if (!size && memchr(field->bytes, 0, field->length))
            return fail_with(failure, EINVAL, "field %u has a zero byte in its text", field->tag);
    }
    return 0;
}

void reply_bytes(struct reply *reply, uint16_t tag, const void *bytes, size_t length)
{
    unsigned char *at = reply->bytes + reply->used;

    if (length > sizeof reply->bytes - reply->used || sizeof reply->bytes - reply->used - length < FIELD_HEADER)
        return;
    at[0] = (unsigned char)tag;
    at[1] = (unsigned char)(tag >> 8);
    store_u32(at + 2, (uint32_t)length);
    memcpy(at + FIELD_HEADER, bytes, length);
    reply->used += FIELD_HEADER + length;
}

void reply_text(struct reply *reply, uint16_t tag, const char *text)
{
    reply_bytes(reply, tag, text, strlen(text));
}

void reply_number(struct reply *reply, uint16_t tag, uint64_t value)
{
    unsigned char bytes[8];

    store_u32(bytes, (uint32_t)value);
    store_u32(bytes + 4, (uint32_t)(value >> 32));
    reply_bytes(reply, tag, bytes, sizeof bytes);
}
