/* The tar formats: ustar headers, PAX records, GNU long names. POSIX.1-2017 pax(1), GNU tar manual "Basic Tar Format". */
#ifndef FCVM_TAR_FORMAT_H
#define FCVM_TAR_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TAR_BLOCK = 512, TAR_PATH = 4096 };

enum tar_type {
    TAR_FILE = '0',
    TAR_HARDLINK = '1',
    TAR_SYMLINK = '2',
    TAR_CHARACTER = '3',
    TAR_BLOCK_DEVICE = '4',
    TAR_DIRECTORY = '5',
    TAR_FIFO = '6',
    TAR_CONTIGUOUS = '7',
    TAR_PAX = 'x',
    TAR_PAX_GLOBAL = 'g',
    TAR_LONG_NAME = 'L',
    TAR_LONG_LINK = 'K'
};

struct tar_entry {
    char type;
    unsigned mode, uid, gid, major, minor;
    uint64_t size;
    int64_t mtime;
    unsigned mtime_ns;
    char path[TAR_PATH];
    char link[TAR_PATH];
};

/* What extended headers say about the entry that follows. */
struct tar_overrides {
    bool has_path, has_link, has_size, has_uid, has_gid, has_mtime;
    struct tar_entry values;
};

/* Decode a header. NULL, or what is wrong with it. */
const char *tar_decode(const unsigned char block[TAR_BLOCK], struct tar_entry *entry);

/* Decode the records of a PAX header. NULL, or what is wrong. */
const char *tar_decode_pax(char *records, size_t length, struct tar_overrides *overrides);
void tar_apply(const struct tar_overrides *overrides, struct tar_entry *entry);

/* Blocks for an entry, with a PAX header in front where ustar has no room. Returns their size. */
enum { TAR_ENCODED_MAX = TAR_BLOCK * 3 + 2 * TAR_PATH + 4 * 64 };
size_t tar_encode(const struct tar_entry *entry, unsigned char blocks[TAR_ENCODED_MAX]);

static inline uint64_t tar_padding(uint64_t size)
{
    return (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK;
}

#endif
