#include "routes.h"

#include <dirent.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/netlink.h>
#include <linux/rtnetlink.h>

#include "network.h"

enum { DEEPEST = 8 };

struct question {
    struct nlmsghdr header;
    struct rtmsg route;
    struct rtattr attribute;
    uint8_t peer[16];
};

static int ask(const struct inet *peer)
{
    static int netlink = -1;
    size_t size = inet_size(peer);
    struct question question = {
        .header = {.nlmsg_type = RTM_GETROUTE, .nlmsg_flags = NLM_F_REQUEST},
        .route = {.rtm_family = peer->family, .rtm_dst_len = (uint8_t)(size * 8)},
        .attribute = {.rta_type = RTA_DST, .rta_len = (uint16_t)RTA_LENGTH(size)}};

    memcpy(question.peer, peer->bytes, size);
    question.header.nlmsg_len = (uint32_t)(sizeof question - sizeof question.peer + size);
    if (netlink < 0)
        netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (netlink < 0 || send(netlink, &question, question.header.nlmsg_len, 0) < 0)
        return -1;
    return netlink;
}

/* The device through which a peer is reached; 0: the guest itself, -1: unreachable. */
static int find_device(const struct inet *peer)
{
    union {
        struct nlmsghdr header;
        unsigned char bytes[2048];
    } answer;
    int netlink = ask(peer);
    ssize_t got = netlink < 0 ? -1 : recv(netlink, answer.bytes, sizeof answer.bytes, 0);

    if (got < (ssize_t)NLMSG_LENGTH(sizeof(struct rtmsg)) || answer.header.nlmsg_type != RTM_NEWROUTE)
        return -1;
    const struct rtmsg *route = NLMSG_DATA(&answer.header);
    if (route->rtm_type == RTN_LOCAL)
        return 0;
    size_t left = RTM_PAYLOAD(&answer.header);
    for (const struct rtattr *part = RTM_RTA(route); RTA_OK(part, left); part = RTA_NEXT(part, left)) {
        int device;
        if (part->rta_type != RTA_OIF)
            continue;
        memcpy(&device, RTA_DATA(part), sizeof device);
        return device;
    }
    return -1;
}

/* Whether a device is a NIC of the VM, or a VLAN or bridge above one. */
static bool is_nic(const char *device, int depth)
{
    char path[128];
    bool found;

    snprintf(path, sizeof path, "/sys/class/net/%.32s/device", device);
    if (access(path, F_OK) == 0)
        return true;
    snprintf(path, sizeof path, "/sys/class/net/%.32s", device);
    DIR *entries = depth < DEEPEST ? opendir(path) : NULL;
    struct dirent *entry;
    for (found = false; !found && entries && (entry = readdir(entries));)
        if (strncmp(entry->d_name, "lower_", 6) == 0)
            found = is_nic(entry->d_name + 6, depth + 1);
    if (entries)
        closedir(entries);
    return found;
}

bool routes_lead_outside(const struct inet *peer)
{
    char name[IF_NAMESIZE];
    int device = find_device(peer);

    if (device <= 0)
        return device < 0;
    if (network_is_interface((unsigned)device))
        return true;
    return !if_indextoname((unsigned)device, name) || is_nic(name, 0);
}
