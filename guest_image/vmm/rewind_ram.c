/*
 * Rewind: the guest's RAM, and the other blocks of memory.
 *
 * The guest's RAM is a private mapping of a file. A page that is written
 * becomes private, and the kernel knows which pages are. The other blocks
 * (firmware, ACPI tables) are small, and are copied.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <sys/mman.h>
#include "qapi/error.h"
#include "exec/cpu-common.h"
#include "exec/exec-all.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "hw/boards.h"
#include "sysemu/tcg.h"
#include "rewind.h"

/* An ioctl of Linux 6.7, which older headers lack. */
struct scan_region {
    uint64_t start, end, categories;
};
struct scan_argument {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask;
    uint64_t return_mask;
};
#define SCAN_PAGEMAP _IOWR('f', 16, struct scan_argument)
#define SCAN_FILE (1 << 2)
#define SCAN_PRESENT (1 << 3)
#define SCAN_SWAPPED (1 << 4)

/* Bits of an entry of /proc/self/pagemap. */
#define ENTRY_FILE (1ull << 61)
#define ENTRY_SWAPPED (1ull << 62)
#define ENTRY_PRESENT (1ull << 63)

#define BATCH 512

typedef struct SavedBlock {
    RAMBlock *block;
    uint8_t *copy;
    size_t size;
} SavedBlock;

static struct {
    uint8_t *host;
    ram_addr_t offset;
    size_t size;
    size_t page_size;
    int fd;
    int pagemap;
    GArray *blocks;  /* of SavedBlock */
} ram;

typedef bool PageVisitor(uint8_t *start, size_t length, void *opaque,
                         Error **errp);

/* Visit the guest's private pages, as the kernel tells them. */
static bool scan_private(PageVisitor *visit, void *opaque, bool *supported,
                         Error **errp)
{
    struct scan_region regions[BATCH];
    uint64_t end = (uintptr_t)ram.host + ram.size;
    struct scan_argument scan = {
        .size = sizeof(scan), .start = (uintptr_t)ram.host, .end = end,
        .vec = (uintptr_t)regions, .vec_len = BATCH,
        .category_inverted = SCAN_FILE, .category_mask = SCAN_FILE,
        .category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
        .return_mask = SCAN_FILE,
    };

    while (scan.start < end) {
        int count = ioctl(ram.pagemap, SCAN_PAGEMAP, &scan);

        *supported = count >= 0 || errno != ENOTTY;
        if (count < 0) {
            error_setg_errno(errp, errno, "cannot scan the page map");
            return false;
        }
        for (int i = 0; i < count; i++) {
            if (!visit((uint8_t *)(uintptr_t)regions[i].start,
                       regions[i].end - regions[i].start, opaque, errp)) {
                return false;
            }
        }
        scan.start = scan.walk_end;
    }
    return true;
}

/* Visit the guest's private pages on a kernel that cannot scan. */
static bool read_private(PageVisitor *visit, void *opaque, Error **errp)
{
    uint64_t entries[BATCH];
    size_t pages = ram.size / ram.page_size;
    size_t first = (uintptr_t)ram.host / ram.page_size;

    for (size_t done = 0; done < pages; done += BATCH) {
        size_t count = MIN(BATCH, pages - done);
        ssize_t size = count * sizeof(entries[0]);

        if (pread(ram.pagemap, entries, size,
                  (first + done) * sizeof(entries[0])) != size) {
            error_setg_errno(errp, errno, "cannot read the page map");
            return false;
        }
        for (size_t i = 0; i < count; i++) {
            if ((entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED)) &&
                !(entries[i] & ENTRY_FILE) &&
                !visit(ram.host + (done + i) * ram.page_size, ram.page_size,
                       opaque, errp)) {
                return false;
            }
        }
    }
    return true;
}

static bool visit_private(PageVisitor *visit, void *opaque, Error **errp)
{
    bool supported = true;
    Error *error = NULL;

    if (scan_private(visit, opaque, &supported, &error)) {
        return true;
    }
    if (supported) {
        error_propagate(errp, error);
        return false;
    }
    error_free(error);
    return read_private(visit, opaque, errp);
}

/* Find the guest's RAM, which must be a private mapping of a file. */
static bool find_ram(Error **errp)
{
    RAMBlock *block = current_machine->ram ? current_machine->ram->ram_block
                                           : NULL;

    if (!block || qemu_ram_get_fd(block) < 0 || qemu_ram_is_shared(block)) {
        error_setg(errp, "the guest's RAM is no private mapping of a file");
        return false;
    }
    ram.host = qemu_ram_get_host_addr(block);
    ram.offset = qemu_ram_get_offset(block);
    ram.size = qemu_ram_get_used_length(block);
    ram.page_size = qemu_ram_pagesize(block);
    ram.fd = qemu_ram_get_fd(block);
    if (ram.page_size != qemu_real_host_page_size()) {
        error_setg(errp, "the guest's RAM has huge pages");
        return false;
    }
    return true;
}

/* See that private pages are as in the file: a rewind brings the file's. */
static bool compare_with_file(uint8_t *start, size_t length, void *opaque,
                              Error **errp)
{
    g_autofree uint8_t *page = g_malloc(ram.page_size);

    for (uint8_t *at = start; at < start + length; at += ram.page_size) {
        if (pread(ram.fd, page, ram.page_size, at - ram.host) !=
                (ssize_t)ram.page_size ||
            memcmp(page, at, ram.page_size)) {
            error_setg(errp, "the guest's RAM differs from its file at 0x%zx",
                       (size_t)(at - ram.host));
            return false;
        }
    }
    return true;
}

static void invalidate_code(ram_addr_t start, size_t length)
{
    if (tcg_enabled()) {
        tb_invalidate_phys_range(start, start + length);
    }
}

static bool drop_pages(uint8_t *start, size_t length, void *opaque,
                       Error **errp)
{
    size_t *pages = opaque;

    if (madvise(start, length, MADV_DONTNEED) < 0) {
        error_setg_errno(errp, errno, "cannot drop pages");
        return false;
    }
    invalidate_code(ram.offset + (start - ram.host), length);
    *pages += length / ram.page_size;
    return true;
}

static int copy_block(RAMBlock *block, void *opaque)
{
    uint8_t *host = qemu_ram_get_host_addr(block);
    size_t size = qemu_ram_get_used_length(block);
    SavedBlock saved = { .block = block, .size = size };

    if (host != ram.host) {
        saved.copy = g_memdup2(host, size);
        g_array_append_val(ram.blocks, saved);
    }
    return 0;
}

static bool restore_blocks(Error **errp)
{
    for (guint i = 0; i < ram.blocks->len; i++) {
        SavedBlock *saved = &g_array_index(ram.blocks, SavedBlock, i);
        uint8_t *host = qemu_ram_get_host_addr(saved->block);

        if (qemu_ram_get_used_length(saved->block) != saved->size) {
            error_setg(errp, "the size of %s changed",
                       qemu_ram_get_idstr(saved->block));
            return false;
        }
        if (memcmp(host, saved->copy, saved->size)) {
            memcpy(host, saved->copy, saved->size);
            invalidate_code(qemu_ram_get_offset(saved->block), saved->size);
        }
    }
    return true;
}

bool rewind_ram_save(Error **errp)
{
    if (!find_ram(errp)) {
        return false;
    }
    ram.pagemap = qemu_open("/proc/self/pagemap", O_RDONLY, errp);
    if (ram.pagemap < 0) {
        return false;
    }
    if (!visit_private(compare_with_file, NULL, errp)) {
        qemu_close(ram.pagemap);
        return false;
    }
    ram.blocks = g_array_new(false, false, sizeof(SavedBlock));
    qemu_ram_foreach_block(copy_block, NULL);
    return true;
}

bool rewind_ram_restore(size_t *pages, Error **errp)
{
    return visit_private(drop_pages, pages, errp) && restore_blocks(errp);
}
