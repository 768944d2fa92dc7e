/* Bodies of requests and replies: lists of u16 tag | u32 length | bytes. */
#ifndef FCVM_FIELDS_H
#define FCVM_FIELDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "report.h"

struct field {
    uint16_t tag;
    uint32_t length;
    char *bytes; /* with a final zero that is not part of the length */
};

struct body {
    struct field *fields;
    size_t count;
    struct field few[48]; /* where `fields` points unless there are more */
};

static inline uint32_t load_u16(const unsigned char *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8;
}

static inline uint32_t load_u32(const unsigned char *at)
{
    return load_u16(at) | load_u16(at + 2) << 16;
}

static inline void store_u32(unsigned char *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

/* Split `length` bytes at `bytes` in place; bytes[length] must be writable. False: not a list of fields (or no memory). */
bool body_parse(struct body *body, unsigned char *bytes, size_t length);
void body_free(struct body *body);

const struct field *body_find(const struct body *body, uint16_t tag);
size_t body_count(const struct body *body, uint16_t tag);

/* The field's text, or NULL when it is absent. Text with a zero inside counts as malformed: see body_check. */
const char *body_text(const struct body *body, uint16_t tag);
bool body_number(const struct body *body, uint16_t tag, uint64_t *value);

/* A NULL-terminated array of the texts under `tag` with room for `spare` more; the caller frees it. NULL: no memory. */
char **body_texts(const struct body *body, uint16_t tag, size_t spare);

/* Numbers are 8 bytes, texts hold no zero, MAC, ENTROPY and SECRET have their size. */
int body_check(const struct body *body, struct failure *failure);

/* Fields of a reply under construction; what does not fit is left out. */
struct reply {
    size_t used;
    unsigned char bytes[6144];
};

void reply_bytes(struct reply *reply, uint16_t tag, const void *bytes, size_t length);
void reply_text(struct reply *reply, uint16_t tag, const char *text);
void reply_number(struct reply *reply, uint16_t tag, uint64_t value);

#endif
