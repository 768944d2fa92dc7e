#include "sockets.h"

#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>

#include "network.h"
#include "routes.h"

#ifndef SOCK_DESTROY
#define SOCK_DESTROY 21
#endif

enum { FOUND_MAX = 64, ROUNDS_MAX = 64, TCP_LISTENING = 10, TCP_TIME_WAITING = 6, TCP_CLOSED = 7 };

struct question {
    struct nlmsghdr header;
    struct inet_diag_req_v2 request;
};

static int diag = -1;
static bool usable;
static bool distrust_gateway; /* its address is the guest's own now, and may belong to the network in a clone */
static bool none_at_quiesce; /* a frozen workload makes no connections since */
static struct inet_diag_sockid found[FOUND_MAX];
static unsigned found_count;
static struct inet last_peer; /* the last one whose route was looked up in this dump */

static int ask(uint16_t type, uint16_t flags, uint8_t family, const struct inet_diag_sockid *id)
{
    const uint32_t not_connected = 1U << TCP_LISTENING | 1U << TCP_TIME_WAITING | 1U << TCP_CLOSED;
    struct question question = {
        .header = {.nlmsg_len = sizeof question, .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags},
        .request = {.sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~not_connected}};

    if (id)
        question.request.id = *id;
    return send(diag, &question, sizeof question, 0) == sizeof question ? 0 : -1;
}

static bool is_gateway(const struct inet *peer)
{
    return network_peer() && inet_equal(peer, network_peer());
}

/* An IPv6 socket may have an IPv4 peer. Many consecutive sockets have the same peer. */
static bool leaves(const struct inet *peer)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    static bool last_leaves;
    struct inet plain = *peer;

    if (last_peer.family && inet_equal(&last_peer, peer))
        return last_leaves;
    if (peer->family == AF_INET6 && memcmp(peer->bytes, mapped, sizeof mapped) == 0) {
        plain = (struct inet){.family = AF_INET};
        memcpy(plain.bytes, peer->bytes + 12, 4);
    }
    last_peer = *peer;
    return last_leaves = routes_lead_outside(&plain);
}

static void consider(const struct inet_diag_msg *socket)
{
    struct inet peer = {.family = socket->idiag_family};

    if (found_count == FOUND_MAX)
        return;
    memcpy(peer.bytes, socket->id.idiag_dst, inet_size(&peer));
    if (network_owns(&peer) ? distrust_gateway && is_gateway(&peer) : leaves(&peer))
        found[found_count++] = socket->id;
}

/* One datagram of a dump: 1 when the dump has ended, -1 with errno when it failed. */
static int take_answer(bool collect)
{
    union {
        struct nlmsghdr header;
        unsigned char bytes[8192];
    } answer;
    ssize_t got = recv(diag, answer.bytes, sizeof answer.bytes, 0);
    size_t left = got < 0 ? 0 : (size_t)got;

    if (got < 0)
        return -1;
    for (struct nlmsghdr *header = &answer.header; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
        if (header->nlmsg_type == NLMSG_DONE)
            return 1;
        if (header->nlmsg_type == NLMSG_ERROR) {
            errno = -((const struct nlmsgerr *)NLMSG_DATA(header))->error;
            return errno ? -1 : 1;
        }
        if (collect && header->nlmsg_type == SOCK_DIAG_BY_FAMILY)
            consider(NLMSG_DATA(header));
    }
    return 0;
}

static int dump(uint8_t family)
{
    int end = 0;

    last_peer.family = 0;
    if (ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, NULL))
        return -1;
    while (!end)
        end = take_answer(true);
    /* ENOENT: the kernel has no IPv6. */
    return end > 0 || (family == AF_INET6 && errno == ENOENT) ? 0 : -1;
}

void sockets_probe(void)
{
    diag = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    usable = diag >= 0 && dump(AF_INET) == 0;
}

bool sockets_can_reset(void)
{
    return usable;
}

static int reset_family(uint8_t family, struct failure *failure)
{
    for (int round = 0; round < ROUNDS_MAX; round++) {
        found_count = 0;
        if (dump(family))
            return fail(failure, "dump of", "sockets");
        if (!found_count)
            return 0;
        for (unsigned i = 0; i < found_count; i++) {
            if (ask(SOCK_DESTROY, NLM_F_ACK, family, &found[i]))
                return fail(failure, "send", "SOCK_DESTROY");
            /* ENOENT: the connection has ended. EOPNOTSUPP: the kernel lacks SOCK_DESTROY; the reply says so. */
            if (take_answer(false) < 0 && errno == EOPNOTSUPP)
                usable = false;
        }
        if (!usable)
            return 0;
    }
    return 0;
}

void sockets_note_quiesce(bool ends)
{
    struct failure ignored;

    found_count = 0;
    distrust_gateway = true;
    if (usable && ends && (reset_family(AF_INET, &ignored) || reset_family(AF_INET6, &ignored)))
        found_count = 1;
    none_at_quiesce = usable && dump(AF_INET) == 0 && dump(AF_INET6) == 0 && !found_count;
    distrust_gateway = false;
}

int sockets_reset_foreign(struct failure *failure)
{
    bool is_clean = none_at_quiesce;

    none_at_quiesce = false;
    if (!usable || is_clean)
        return 0;
    return reset_family(AF_INET, failure) || reset_family(AF_INET6, failure) ? -1 : 0;
}
