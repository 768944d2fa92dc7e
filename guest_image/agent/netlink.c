#include "netlink.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>

enum { BATCH_MAX = 4096, MESSAGES_MAX = 32 };

static int netlink = -1;
static union {
    struct nlmsghdr header; /* for the alignment */
    unsigned char bytes[BATCH_MAX];
} batch;
static size_t batch_size, last_start;
static const char *labels[MESSAGES_MAX];
static uint32_t messages;

bool inet_parse(const char *text, struct inet *address)
{
    char host[64];
    size_t length = strcspn(text, "/");

    memset(address, 0, sizeof *address);
    if (length >= sizeof host)
        return false;
    memcpy(host, text, length);
    host[length] = 0;
    address->family = strchr(host, ':') ? AF_INET6 : AF_INET;
    if (inet_pton(address->family, host, address->bytes) != 1)
        return false;
    unsigned long bits = inet_size(address) * 8;
    address->prefix = (uint8_t)bits;
    if (!text[length])
        return true;
    char *end;
    unsigned long prefix = strtoul(text + length + 1, &end, 10);
    if (end == text + length + 1 || *end || prefix > bits)
        return false;
    address->prefix = (uint8_t)prefix;
    return true;
}

size_t inet_size(const struct inet *address)
{
    return address->family == AF_INET6 ? 16 : 4;
}

bool inet_equal(const struct inet *one, const struct inet *other)
{
    return one->family == other->family && memcmp(one->bytes, other->bytes, sizeof one->bytes) == 0;
}

void netlink_begin(void)
{
    batch_size = last_start = 0;
    messages = 0;
}

static void *append(size_t size)
{
    size_t start = NLMSG_ALIGN(batch_size);

    if (start + size > BATCH_MAX)
        abort(); /* batches are far smaller */
    memset(batch.bytes + batch_size, 0, start + size - batch_size);
    batch_size = start + size;
    return batch.bytes + start;
}

static struct nlmsghdr *last_message(void)
{
    return (struct nlmsghdr *)(void *)(batch.bytes + last_start);
}

static void end_message(void)
{
    last_message()->nlmsg_len = (uint32_t)(batch_size - last_start);
}

static void *begin_message(const char *label, uint16_t type, uint16_t flags, size_t size)
{
    if (messages >= MESSAGES_MAX)
        abort();
    struct nlmsghdr *header = append(NLMSG_HDRLEN);
    last_start = (size_t)((unsigned char *)header - batch.bytes);
    header->nlmsg_type = type;
    header->nlmsg_flags = NLM_F_REQUEST | flags;
    header->nlmsg_seq = ++messages;
    labels[messages - 1] = label;
    void *body = append(size);
    end_message();
    return body;
}

static struct rtattr *add_attribute(uint16_t type, const void *bytes, size_t size)
{
    struct rtattr *attribute = append(RTA_LENGTH(size));

    attribute->rta_type = type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(size);
    if (size)
        memcpy(RTA_DATA(attribute), bytes, size);
    end_message();
    return attribute;
}

void netlink_link(unsigned index, const uint8_t *mac, bool up)
{
    struct ifinfomsg *link = begin_message("setting the link", RTM_NEWLINK, 0, sizeof *link);

    link->ifi_index = (int)index;
    if (up)
        link->ifi_flags = link->ifi_change = IFF_UP;
    if (mac)
        add_attribute(IFLA_ADDRESS, mac, 6);
}

void netlink_flush_neighbours(unsigned index)
{
    for (int pass = 0; pass < 2; pass++) {
        struct ifinfomsg *link = begin_message("flushing neighbours", RTM_NEWLINK, 0, sizeof *link);
        link->ifi_index = (int)index;
        link->ifi_change = IFF_NOARP; /* on and off again: the kernel drops the table at each change */
        link->ifi_flags = pass == 0 ? IFF_NOARP : 0;
    }
}

void netlink_dummy(const char *name)
{
    begin_message("making a dummy device", RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, sizeof(struct ifinfomsg));
    add_attribute(IFLA_IFNAME, name, strlen(name) + 1);
    struct rtattr *information = add_attribute(IFLA_LINKINFO, NULL, 0);
    add_attribute(IFLA_INFO_KIND, "dummy", 5);
    information->rta_len = (uint16_t)(batch.bytes + batch_size - (unsigned char *)information);
}

void netlink_address(bool add, unsigned index, const struct inet *address)
{
    const uint32_t flags = IFA_F_NODAD | IFA_F_PERMANENT;
    struct ifaddrmsg *message = begin_message(add ? "adding the address" : "removing the old address",
                                              add ? RTM_NEWADDR : RTM_DELADDR, add ? NLM_F_CREATE : 0, sizeof *message);

    message->ifa_family = address->family;
    message->ifa_prefixlen = address->prefix;
    message->ifa_index = index;
    message->ifa_scope = address->family == AF_INET6 && address->bytes[0] == 0xfe ? RT_SCOPE_LINK : RT_SCOPE_UNIVERSE;
    add_attribute(IFA_LOCAL, address->bytes, inet_size(address));
    if (address->family == AF_INET6)
        add_attribute(IFA_FLAGS, &flags, sizeof flags);
}

void netlink_default_route(unsigned index, const struct inet *gateway)
{
    struct rtmsg *route =
        begin_message("setting the default route", RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof *route);

    route->rtm_family = gateway->family;
    route->rtm_table = RT_TABLE_MAIN;
    route->rtm_protocol = RTPROT_STATIC;
    route->rtm_scope = RT_SCOPE_UNIVERSE;
    route->rtm_type = RTN_UNICAST;
    route->rtm_flags = RTNH_F_ONLINK;
    add_attribute(RTA_GATEWAY, gateway->bytes, inet_size(gateway));
    add_attribute(RTA_OIF, &index, sizeof index);
}

static bool is_harmless(int error)
{
    return error == 0 || error == EEXIST || error == EADDRNOTAVAIL;
}

int netlink_commit(struct failure *failure)
{
    union {
        struct nlmsghdr header;
        unsigned char bytes[BATCH_MAX];
    } answer;
    int result = 0;
    uint32_t answered = 0;

    if (!messages)
        return 0;
    last_message()->nlmsg_flags |= NLM_F_ACK; /* the other messages are answered only when they fail */
    if (netlink < 0)
        netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (netlink < 0 || send(netlink, batch.bytes, batch_size, 0) != (ssize_t)batch_size)
        return fail(failure, "netlink", labels[0]);
    while (answered != messages) {
        ssize_t got = recv(netlink, answer.bytes, sizeof answer.bytes, 0);
        if (got < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)) || answer.header.nlmsg_type != NLMSG_ERROR)
            return fail(failure, "netlink answer to", labels[0]);
        const struct nlmsgerr *verdict = NLMSG_DATA(&answer.header);
        answered = answer.header.nlmsg_seq;
        if (is_harmless(-verdict->error) || answered - 1 >= messages || result)
            continue;
        errno = -verdict->error;
        result = fail(failure, "netlink:", labels[answered - 1]);
    }
    return result;
}
