#include "status.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "cgroup.h"
#include "logs.h"
#include "memory.h"
#include "namespaces.h"
#include "protocol.h"

enum { NOT_LISTENING = 0, EVERYWHERE = 1, LOOPBACK_ONLY = 2, IPV6_ALONE = 3, TCP_LISTENING = 10, UDP_UNCONNECTED = 7 };

static const struct cgroup_metric {
    const char *name, *file, *key;
} cgroup_metrics[] = {
    {"workload_memory_bytes", "memory.current", NULL},
    {"workload_memory_peak_bytes", "memory.peak", NULL},
    {"workload_cpu_us", "cpu.stat", "usage_usec"},
    {"workload_processes", "pids.current", NULL},
    {"workload_oom_kills", "memory.events", "oom_kill"},
};

static void add_metric(struct reply *reply, const char *name, uint64_t value)
{
    char text[80];

    snprintf(text, sizeof text, "%s=%llu", name, (unsigned long long)value);
    reply_text(reply, FIELD_METRIC, text);
}

static void add_memory(struct reply *reply)
{
    struct memory memory;

    if (!memory_read(&memory))
        return;
    add_metric(reply, "memory_total_bytes", memory.total);
    add_metric(reply, "memory_available_bytes", memory.available);
}

/* Threads that run or wait for a CPU, without the agent: 0 in a guest at rest. */
static void add_runnable(struct reply *reply)
{
    unsigned long long runnable = 0;
    FILE *file = fopen("/proc/loadavg", "re");

    if (file && fscanf(file, "%*s %*s %*s %llu/", &runnable) == 1 && runnable)
        add_metric(reply, "runnable_threads", runnable - 1);
    if (file)
        fclose(file);
}

int status_metrics(const struct body *body, struct reply *reply, struct failure *failure)
{
    struct statvfs layer;
    struct timespec up;
    uint64_t value;

    (void)body;
    (void)failure;
    clock_gettime(CLOCK_BOOTTIME, &up);
    add_metric(reply, "uptime_ms", (uint64_t)up.tv_sec * 1000 + (uint64_t)up.tv_nsec / 1000000);
    add_memory(reply);
    add_runnable(reply);
    for (size_t i = 0; i < sizeof cgroup_metrics / sizeof cgroup_metrics[0]; i++)
        if (cgroup_number(cgroup_metrics[i].file, cgroup_metrics[i].key, &value))
            add_metric(reply, cgroup_metrics[i].name, value);
    if (namespaces_are_made() && statvfs(WORKLOAD_BASE, &layer) == 0) {
        add_metric(reply, "overlay_size_bytes", (uint64_t)layer.f_blocks * layer.f_frsize);
        add_metric(reply, "overlay_used_bytes", (uint64_t)(layer.f_blocks - layer.f_bfree) * layer.f_frsize);
        add_metric(reply, "overlay_files", (uint64_t)layer.f_files);
        add_metric(reply, "overlay_used_files", (uint64_t)(layer.f_files - layer.f_ffree));
    }
    add_metric(reply, "log_dropped_bytes", logs_dropped());
    return 0;
}

/* Addresses in /proc/net are 32-bit words, printed as numbers in the CPU's byte order. */
static bool is_loopback(const char *hex)
{
    unsigned words[4] = {0};
    int count = sscanf(hex, "%8x%8x%8x%8x", &words[0], &words[1], &words[2], &words[3]);

    if (count == 1)
        return (ntohl(words[0]) >> 24) == 127;
    if (words[0] || words[1])
        return false;
    if (ntohl(words[2]) == 0xffff)
        return (ntohl(words[3]) >> 24) == 127;
    return words[2] == 0 && ntohl(words[3]) == 1;
}

/* How a socket listens at `port`, according to one table of /proc/net. */
static int look_in_table(const char *path, uint64_t port, unsigned wanted_state)
{
    char line[512], address[40];
    unsigned local_port, state;
    int result = NOT_LISTENING;
    FILE *table = fopen(path, "re");

    while (table && result != EVERYWHERE && fgets(line, sizeof line, table)) {
        if (sscanf(line, " %*d: %39[0-9A-Fa-f]:%x %*[0-9A-Fa-f]:%*x %x", address, &local_port, &state) != 3)
            continue;
        if (local_port == port && state == wanted_state)
            result = is_loopback(address) ? LOOPBACK_ONLY : EVERYWHERE;
    }
    if (table)
        fclose(table);
    return result;
}

/* Whether nothing listens at a TCP port over IPv4. A socket at :: does, unless it is IPV6_V6ONLY. */
static bool ipv4_is_free(uint64_t port)
{
    const struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool is_free = fd >= 0 && bind(fd, (const struct sockaddr *)&address, sizeof address) == 0;

    if (fd >= 0)
        close(fd);
    return is_free;
}

int status_listening(const struct body *body, struct reply *reply, struct failure *failure)
{
    const char *protocol = body_text(body, FIELD_PROTO);
    bool is_udp = protocol && strcmp(protocol, "udp") == 0;
    unsigned state = is_udp ? UDP_UNCONNECTED : TCP_LISTENING;
    uint64_t port;

    if (!body_number(body, FIELD_PORT, &port) || port == 0 || port > 65535)
        return fail_with(failure, EINVAL, "PORT must be 1 to 65535");
    int four = look_in_table(is_udp ? "/proc/net/udp" : "/proc/net/tcp", port, state);
    int six = four == EVERYWHERE ? NOT_LISTENING : look_in_table(is_udp ? "/proc/net/udp6" : "/proc/net/tcp6", port, state);
    int result = four == EVERYWHERE || six == EVERYWHERE ? EVERYWHERE : four ? four : six;
    if (result == EVERYWHERE && four == NOT_LISTENING && !is_udp && ipv4_is_free(port))
        result = IPV6_ALONE;
    reply_number(reply, FIELD_LISTENING, (uint64_t)result);
    return 0;
}

int status_sync(const struct body *body, struct reply *reply, struct failure *failure)
{
    (void)body;
    (void)reply;
    (void)failure;
    sync();
    return 0;
}
