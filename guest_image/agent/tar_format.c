#include "tar_format.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], unused[12];
};

_Static_assert(sizeof(struct header) == TAR_BLOCK, "a header is one block");

/* Octal text, or (GNU) a big-endian number behind a byte 0x80. Negative and longer numbers count as wrong. */
static bool parse_number(const char *text, size_t size, uint64_t *value)
{
    const unsigned char *bytes = (const unsigned char *)text;
    size_t i = 0;

    *value = 0;
    if (bytes[0] == 0x80) {
        for (i = 1; i < size; i++) {
            if (*value >> 55)
                return false;
            *value = *value << 8 | bytes[i];
        }
        return true;
    }
    while (i < size && text[i] == ' ')
        i++;
    for (; i < size && text[i] >= '0' && text[i] <= '7'; i++)
        *value = *value << 3 | (uint64_t)(text[i] - '0');
    return i == size || text[i] == 0 || text[i] == ' ';
}

static bool parse_small(const char *text, size_t size, unsigned *value)
{
    uint64_t number;

    if (!parse_number(text, size, &number) || number > UINT32_MAX)
        return false;
    *value = (unsigned)number;
    return true;
}

static unsigned sum_block(const unsigned char *block)
{
    const size_t from = offsetof(struct header, checksum);
    unsigned sum = 0;

    for (size_t i = 0; i < TAR_BLOCK; i++)
        sum += i >= from && i < from + sizeof ((struct header *)0)->checksum ? ' ' : block[i];
    return sum;
}

const char *tar_decode(const unsigned char block[TAR_BLOCK], struct tar_entry *entry)
{
    struct header header;
    unsigned sum;
    uint64_t mtime;

    memcpy(&header, block, sizeof header);
    memset(entry, 0, sizeof *entry);
    if (!parse_small(header.checksum, sizeof header.checksum, &sum) || sum != sum_block(block))
        return "the stream is not a tar archive, or is damaged (checksum)";
    entry->type = header.type ? header.type : TAR_FILE;
    if (!parse_number(header.size, sizeof header.size, &entry->size) || entry->size > INT64_MAX ||
        !parse_number(header.mtime, sizeof header.mtime, &mtime) || mtime > INT64_MAX ||
        !parse_small(header.mode, sizeof header.mode, &entry->mode) ||
        !parse_small(header.uid, sizeof header.uid, &entry->uid) ||
        !parse_small(header.gid, sizeof header.gid, &entry->gid) ||
        !parse_small(header.major, sizeof header.major, &entry->major) ||
        !parse_small(header.minor, sizeof header.minor, &entry->minor))
        return "a field of a header is not a number";
    entry->mtime = (int64_t)mtime;
    bool has_prefix = memcmp(header.magic, "ustar", 6) == 0 && header.prefix[0];
    snprintf(entry->path, sizeof entry->path, "%.155s%s%.100s", has_prefix ? header.prefix : "", has_prefix ? "/" : "",
             header.name);
    snprintf(entry->link, sizeof entry->link, "%.100s", header.link);
    size_t length = strlen(entry->path);
    if (entry->type == TAR_FILE && length && entry->path[length - 1] == '/')
        entry->type = TAR_DIRECTORY; /* formats before ustar have no type for directories */
    return NULL;
}

static bool copy_text(char into[TAR_PATH], const char *text, size_t length)
{
    if (length >= TAR_PATH || memchr(text, 0, length))
        return false;
    memcpy(into, text, length);
    into[length] = 0;
    return true;
}

/* "seconds[.fraction]", possibly negative. */
static bool parse_time(const char *text, struct tar_entry *entry)
{
    char *end;

    entry->mtime = strtoll(text, &end, 10);
    entry->mtime_ns = 0;
    if (end == text)
        return false;
    if (*end != '.')
        return *end == 0;
    unsigned scale = 100000000;
    for (end++; *end >= '0' && *end <= '9'; end++, scale /= 10)
        entry->mtime_ns += scale * (unsigned)(*end - '0');
    if (*text == '-' && entry->mtime_ns) {
        entry->mtime--;
        entry->mtime_ns = 1000000000 - entry->mtime_ns;
    }
    return *end == 0;
}

static bool parse_decimal(const char *text, uint64_t limit, uint64_t *value)
{
    char *end;

    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == 0 && *value <= limit;
}

static const char *take_record(const char *key, const char *value, size_t length, struct tar_overrides *overrides)
{
    struct tar_entry *values = &overrides->values;
    uint64_t number = 0;
    bool good = true;

    if (strcmp(key, "path") == 0)
        good = overrides->has_path = copy_text(values->path, value, length);
    else if (strcmp(key, "linkpath") == 0)
        good = overrides->has_link = copy_text(values->link, value, length);
    else if (strcmp(key, "size") == 0)
        good = overrides->has_size = parse_decimal(value, INT64_MAX, &values->size);
    else if (strcmp(key, "mtime") == 0)
        good = overrides->has_mtime = parse_time(value, values);
    else if (strcmp(key, "uid") == 0 || strcmp(key, "gid") == 0) {
        good = parse_decimal(value, UINT32_MAX - 1, &number);
        *(key[0] == 'u' ? &values->uid : &values->gid) = (unsigned)number;
        *(key[0] == 'u' ? &overrides->has_uid : &overrides->has_gid) = true;
    } else if (strncmp(key, "GNU.sparse.", 11) == 0)
        return "sparse entries are not supported";
    return good ? NULL : "a PAX record is malformed or its path too long";
}

const char *tar_decode_pax(char *records, size_t length, struct tar_overrides *overrides)
{
    /* Each record is "LENGTH KEY=VALUE\n", LENGTH counting all of it. */
    while (length) {
        size_t digits = 0, size = 0;
        while (digits < length && digits < 9 && records[digits] >= '0' && records[digits] <= '9')
            size = size * 10 + (size_t)(records[digits++] - '0');
        if (!digits || size > length || size < digits + 3 || records[digits] != ' ' || records[size - 1] != '\n')
            return "a PAX header is malformed";
        records[size - 1] = 0;
        char *key = records + digits + 1;
        char *equals = memchr(key, '=', size - digits - 1);
        if (!equals)
            return "a PAX record has no value";
        *equals = 0;
        const char *wrong = take_record(key, equals + 1, (size_t)(records + size - 1 - equals - 1), overrides);
        if (wrong)
            return wrong;
        records += size;
        length -= size;
    }
    return NULL;
}

void tar_apply(const struct tar_overrides *overrides, struct tar_entry *entry)
{
    const struct tar_entry *values = &overrides->values;

    if (overrides->has_path)
        memcpy(entry->path, values->path, sizeof entry->path);
    if (overrides->has_link)
        memcpy(entry->link, values->link, sizeof entry->link);
    if (overrides->has_size)
        entry->size = values->size;
    if (overrides->has_uid)
        entry->uid = values->uid;
    if (overrides->has_gid)
        entry->gid = values->gid;
    if (overrides->has_mtime) {
        entry->mtime = values->mtime;
        entry->mtime_ns = values->mtime_ns;
    }
}

/* Octal with a final zero. A number without room is 0 here and in a PAX record. */
static bool put_number(char *at, size_t size, uint64_t value)
{
    bool fits = value < 1ULL << (3 * (size - 1));

    snprintf(at, size, "%0*llo", (int)size - 1, fits ? (unsigned long long)value : 0ULL);
    return fits;
}

static void put_header(const struct tar_entry *entry, unsigned char *block)
{
    struct header header;

    memset(&header, 0, sizeof header);
    memcpy(header.name, entry->path, strnlen(entry->path, sizeof header.name));
    memcpy(header.link, entry->link, strnlen(entry->link, sizeof header.link));
    put_number(header.mode, sizeof header.mode, entry->mode);
    put_number(header.uid, sizeof header.uid, entry->uid);
    put_number(header.gid, sizeof header.gid, entry->gid);
    put_number(header.size, sizeof header.size, entry->size);
    put_number(header.mtime, sizeof header.mtime, entry->mtime < 0 ? UINT64_MAX : (uint64_t)entry->mtime);
    put_number(header.major, sizeof header.major, entry->major);
    put_number(header.minor, sizeof header.minor, entry->minor);
    header.type = entry->type;
    memcpy(header.magic, "ustar", 6);
    memcpy(header.version, "00", 2);
    memcpy(block, &header, sizeof header);
    snprintf(header.checksum, sizeof header.checksum, "%06o", sum_block(block));
    memcpy(block, &header, sizeof header);
}

static size_t put_record(char *at, const char *key, const char *value)
{
    /* The length counts its own digits: try until it fits. */
    size_t body = strlen(key) + strlen(value) + 3, length = body;
    char digits[24];

    while (length != body + (size_t)snprintf(digits, sizeof digits, "%zu", length))
        length = body + strlen(digits);
    return (size_t)sprintf(at, "%zu %s=%s\n", length, key, value);
}

static size_t put_number_record(char *at, const char *key, int64_t value)
{
    char text[24];

    snprintf(text, sizeof text, "%lld", (long long)value);
    return put_record(at, key, text);
}

static size_t put_records(const struct tar_entry *entry, char *at)
{
    const unsigned small = 1U << 21;
    const int64_t large = 1LL << 33;
    size_t used = 0;

    if (strlen(entry->path) > sizeof ((struct header *)0)->name)
        used += put_record(at + used, "path", entry->path);
    if (strlen(entry->link) > sizeof ((struct header *)0)->link)
        used += put_record(at + used, "linkpath", entry->link);
    if (entry->size >= (uint64_t)large)
        used += put_number_record(at + used, "size", (int64_t)entry->size);
    if (entry->uid >= small)
        used += put_number_record(at + used, "uid", entry->uid);
    if (entry->gid >= small)
        used += put_number_record(at + used, "gid", entry->gid);
    if (entry->mtime < 0 || entry->mtime >= large)
        used += put_number_record(at + used, "mtime", entry->mtime);
    return used;
}

size_t tar_encode(const struct tar_entry *entry, unsigned char blocks[TAR_ENCODED_MAX])
{
    static struct tar_entry extended;
    size_t records = put_records(entry, (char *)blocks + TAR_BLOCK), used = 0;

    if (records) {
        extended = (struct tar_entry){.type = TAR_PAX, .mode = 0644, .size = records, .path = "PaxHeader"};
        put_header(&extended, blocks);
        used = TAR_BLOCK + records;
        memset(blocks + used, 0, tar_padding(records));
        used += tar_padding(records);
    }
    put_header(entry, blocks + used);
    return used + TAR_BLOCK;
}
