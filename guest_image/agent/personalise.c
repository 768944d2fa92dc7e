#include "personalise.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "cgroup.h"
#include "hook.h"
#include "names.h"
#include "namespaces.h"
#include "network.h"
#include "protocol.h"
#include "sockets.h"

enum { ENTROPY = 32, NS_PER_S = 1000000000, STAYS_FROZEN = 16 };

static int64_t told_at_ns; /* on the monotonic clock: when the host was told that it may tell the time; 0 at any other */


/* Its length was checked with the body. */
static bool has_secret(const struct body *body, uint16_t tag)
{
    const struct field *secret = body_find(body, tag);

    return secret && !memchr(secret->bytes, 0, PROTOCOL_SECRET);
}

int personalise_quiesce(const struct body *body, struct reply *reply, struct failure *failure)
{
    (void)reply;
    if (!has_secret(body, FIELD_SECRET))
        return fail_with(failure, EINVAL, "QUIESCE needs a SECRET without zero bytes");
    if (cgroup_freeze(failure))
        return -1;
    sockets_note_quiesce(true);
    if (network_forget_peer(body, failure) == 0)
        return 0;
    personalise_thaw(); /* refused: the session goes on, and so does the workload */
    return -1;
}

int personalise_park(const struct body *body, struct reply *reply, struct failure *failure)
{
    (void)reply;
    if (!has_secret(body, FIELD_SECRET) || !has_secret(body, FIELD_RETURN))
        return fail_with(failure, EINVAL, "PARK needs a SECRET and a RETURN without zero bytes");
    if (cgroup_freeze(failure))
        return -1;
    sockets_note_quiesce(false);
    return 0;
}

int personalise_freeze(const struct body *body, struct reply *reply, struct failure *failure)
{
    (void)body;
    (void)reply;
    return cgroup_freeze(failure);
}

/* Writing to /dev/urandom is not enough, nor is the first of the two calls alone: clones then still agree. */
static int stir_random_numbers(const struct body *body, struct failure *failure)
{
    static int device = -1;
    const struct field *entropy = body_find(body, FIELD_ENTROPY);
    union {
        struct rand_pool_info pool;
        unsigned char bytes[sizeof(struct rand_pool_info) + ENTROPY];
    } added = {.pool = {.entropy_count = ENTROPY * 8, .buf_size = ENTROPY}};

    if (!entropy)
        return 0;
    memcpy(added.bytes + sizeof(struct rand_pool_info), entropy->bytes, ENTROPY);
    if (device < 0)
        device = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return fail(failure, "open", "/dev/urandom");
    if (ioctl(device, RNDADDENTROPY, &added) || ioctl(device, RNDRESEEDCRNG))
        return fail_unless_test(failure, "ioctl", "/dev/urandom");
    return 0;
}

static int64_t read_clock(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * NS_PER_S + time.tv_nsec;
}

/* The host took the time between our reply and now, about half-way. Programs take it ill when time runs back: what is
 * less than a second is worked off by the kernel, a two-thousandth part at a time. */
static int set_clock(const struct body *body, struct failure *failure)
{
    uint64_t told;

    if (!body_number(body, FIELD_REALTIME_NS, &told))
        return 0;
    int64_t way = told_at_ns ? (read_clock(CLOCK_MONOTONIC) - told_at_ns) / 2 : 0;
    int64_t now = (int64_t)told + way, ahead = read_clock(CLOCK_REALTIME) - now;
    const struct timespec time = {.tv_sec = (time_t)(now / NS_PER_S), .tv_nsec = (long)(now % NS_PER_S)};
    const struct timeval back = {.tv_usec = (suseconds_t)(-ahead / 1000)};

    told_at_ns = 0;
    if (report_test_mode)
        return 0; /* it would be the host's clock */
    if (ahead >= 0 && ahead < NS_PER_S)
        adjtime(&back, NULL);
    else if (clock_settime(CLOCK_REALTIME, &time))
        return fail(failure, "clock_settime", "CLOCK_REALTIME");
    return 0;
}

static int set_boot_id(const struct body *body, struct failure *failure)
{
    const struct field *id = body_find(body, FIELD_BOOT_ID);

    return id ? namespaces_set_boot_id(id->bytes, id->length, failure) : 0;
}

/* Only in a guest that becomes another one: whoever was paused and goes on keeps its connections. */
static int reset_connections(const struct body *body, struct reply *reply, struct failure *failure)
{
    if (!body_find(body, FIELD_ENTROPY) && !body_find(body, FIELD_MAC))
        return 0;
    if (sockets_reset_foreign(failure))
        return -1;
    if (!sockets_can_reset())
        reply_text(reply, FIELD_MESSAGE, "connections to peers outside were kept: the kernel has no tcp_diag");
    return 0;
}

bool personalise_leaves_frozen(const struct body *body)
{
    uint64_t flags = 0;

    body_number(body, FIELD_FLAGS, &flags);
    if (flags & STAYS_FROZEN)
        told_at_ns = read_clock(CLOCK_MONOTONIC);
    return flags & STAYS_FROZEN;
}

int personalise(const struct body *body, struct reply *reply, struct failure *failure)
{
    if (!namespaces_are_made())
        return fail_with(failure, EINVAL, "the guest is not configured");
    if (stir_random_numbers(body, failure) || set_clock(body, failure))
        return -1;
    if (names_personalise(body, failure) || set_boot_id(body, failure) || network_personalise(body, failure))
        return -1;
    return reset_connections(body, reply, failure) || hook_run(body, failure) ? -1 : 0;
}

void personalise_thaw(void)
{
    struct failure failure = {0};

    if (cgroup_thaw(&failure))
        report("%s", failure.text);
}
