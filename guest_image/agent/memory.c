#include "memory.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "loop.h"

enum {
    WINDOW_MS = 1000,
    PATIENCE_MS = 900, /* two consecutive windows */
    FILE_BYTES = 1024, /* memory of an empty file: inode and name, in the tmpfs and for a while in the overlay */
    SHARED_BYTES = 65 << 20 /* a container's /dev/shm has 64 MiB */
};

static int sysrq = -1;

bool memory_read(struct memory *memory)
{
    static const char total[] = "MemTotal:", available[] = "MemAvailable:";
    char line[128];
    bool has_total = false, has_available = false; /* 0 available is a valid answer */
    FILE *file = fopen("/proc/meminfo", "re");

    while (file && !(has_total && has_available) && fgets(line, sizeof line, file)) {
        if (strncmp(line, total, sizeof total - 1) == 0) {
            memory->total = strtoull(line + sizeof total - 1, NULL, 10) * 1024;
            has_total = true;
        } else if (strncmp(line, available, sizeof available - 1) == 0) {
            memory->available = strtoull(line + sizeof available - 1, NULL, 10) * 1024;
            has_available = true;
        }
    }
    if (file)
        fclose(file);
    return has_total && has_available;
}

/* So little is available that the kernel drops pages of programs and reads them again at once. Droppable caches count as
 * available. */
static bool is_exhausted(void)
{
    struct memory memory;

    return memory_read(&memory) && memory.available < memory.total / 16;
}

static void on_pressure(struct source *source, uint32_t events)
{
    static int64_t since, last;
    int64_t now = loop_now_ms();

    if (events & EPOLLERR) {
        loop_close(source);
        return;
    }
    if (!is_exhausted())
        since = 0;
    else if (!since || now - last > 2 * WINDOW_MS)
        since = now;
    else if (now - since >= PATIENCE_MS) {
        ssize_t ignored = write(sysrq, "f", 1); /* run the kernel's out-of-memory killer */
        (void)ignored;
        since = 0;
    }
    last = now;
}

/* Without swap, the kernel drops pages of programs for minutes before its own out-of-memory killer runs. */
void memory_end_thrashing(void)
{
    static struct source pressure = {.ready = on_pressure};
    static const char trigger[] = "some 400000 1000000"; /* us of stall in a window */

    sysrq = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
    pressure.fd = open("/proc/pressure/memory", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (pressure.fd < 0)
        return; /* the kernel has no CONFIG_PSI */
    if (sysrq < 0 || write(pressure.fd, trigger, sizeof trigger) < 0 || loop_add(&pressure, EPOLLPRI))
        loop_close(&pressure);
}

static uint64_t smaller(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

struct memory_shares memory_share(uint64_t layer, bool is_on_disk, uint64_t shared)
{
    struct memory memory;

    if (!memory_read(&memory))
        return (struct memory_shares){.layer = layer, .shared = shared};
    bool is_wanted = shared != 0;
    uint64_t available = memory.available;
    uint64_t all = available - available / 6; /* the rest is for processes */
    if (!is_wanted)
        shared = smaller(SHARED_BYTES, available / 8 * 3);
    uint64_t left = shared < all ? all - shared : all / 8; /* so much shared memory leaves little for the layer */
    layer = is_on_disk ? 0 : smaller(layer ? layer : available / 2, left);
    if (!is_wanted && shared < (available - layer) / 2)
        shared = smaller((available - layer) / 2, all - layer);
    return (struct memory_shares){.layer = layer, .shared = shared, .files = available / 4 / FILE_BYTES};
}
