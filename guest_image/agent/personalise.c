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

static int64_t replied_at_ns; /* on the monotonic clock: the REPLY after which the host sends the time of day; 0: none */

/* body_check has checked the length. */
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
    personalise_thaw(); /* refused: the session and the workload go on */
    return -1;
}

int personalise_suspend(const struct body *body, struct reply *reply, struct failure *failure)
{
    (void)reply;
    if (!has_secret(body, FIELD_SECRET) || !has_secret(body, FIELD_RESUME_TOKEN))
        return fail_with(failure, EINVAL, "SUSPEND needs a SECRET and a RESUME_TOKEN without zero bytes");
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

/* Both ioctls are necessary: after a write to /dev/urandom or RNDADDENTROPY alone, clones get the same random numbers. */
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

/* The host read its clock about half-way between our REPLY and now. Programs misbehave when time runs backwards: a clock that
 * is ahead by less than a second is slowed down instead (adjtime). */
static int set_clock(const struct body *body, struct failure *failure)
{
    uint64_t sent;

    if (!body_number(body, FIELD_REALTIME_NS, &sent))
        return 0;
    int64_t delay = replied_at_ns ? (read_clock(CLOCK_MONOTONIC) - replied_at_ns) / 2 : 0;
    int64_t now = (int64_t)sent + delay, ahead = read_clock(CLOCK_REALTIME) - now;
    const struct timespec time = {.tv_sec = (time_t)(now / NS_PER_S), .tv_nsec = (long)(now % NS_PER_S)};
    const struct timeval back = {.tv_usec = (suseconds_t)(-ahead / 1000)};

    replied_at_ns = 0;
    if (report_test_mode)
        return 0; /* this is the host's clock */
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

/* Only in a guest that gets another identity. A clone that was paused and resumes keeps its connections. */
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
        replied_at_ns = read_clock(CLOCK_MONOTONIC);
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
