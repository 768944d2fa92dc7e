#include "network.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "names.h"
#include "protocol.h"

enum { JOINED_MAX = 8 }; /* NICs besides the first */

static unsigned loopback, interface;
static struct inet address, gateway;
static uint8_t mac[6];
static bool has_mac, peer_is_own;
static char interface_name[IF_NAMESIZE];

const struct inet *network_address(void)
{
    return &address;
}

const struct inet *network_peer(void)
{
    return peer_is_own && gateway.family ? &gateway : NULL;
}

bool network_owns(const struct inet *other)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    static const uint8_t loopback6[16] = {[15] = 1};
    struct inet plain = *other;

    if (plain.family == AF_INET6 && memcmp(plain.bytes, mapped, sizeof mapped) == 0) {
        plain = (struct inet){.family = AF_INET};
        memcpy(plain.bytes, other->bytes + 12, 4);
    }
    if (plain.family == AF_INET ? plain.bytes[0] == 127 : memcmp(plain.bytes, loopback6, 16) == 0)
        return true;
    return inet_equal(&plain, &address) || (network_peer() && inet_equal(&plain, &gateway));
}

bool network_is_interface(unsigned index)
{
    return index == interface && interface != loopback;
}

static int parse_field(const struct body *body, uint16_t tag, struct inet *value, struct failure *failure)
{
    const char *text = body_text(body, tag);
    struct inet parsed;

    if (!text || !*text)
        return 0;
    if (!inet_parse(text, &parsed))
        return fail_with(failure, EINVAL, "\"%.60s\" is not an IP address", text);
    *value = parsed;
    return 0;
}

static void set_option(const char *family, const char *device, const char *option, const char *value)
{
    char path[160];

    snprintf(path, sizeof path, "/proc/sys/net/%s/conf/%s/%s", family, device, option);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* no IPv6 here */
    ssize_t ignored = write(fd, value, strlen(value));
    (void)ignored;
    close(fd);
}

/* Find the interface by name, else make a dummy device, else use the loopback device. */
static void find_interface(const char *name)
{
    struct failure failure;

    interface = if_nametoindex(name);
    if (interface)
        return;
    netlink_begin();
    netlink_dummy(name);
    if (netlink_commit(&failure) == 0)
        interface = if_nametoindex(name);
    if (!interface) {
        report("no interface %s and no dummy device (%s): its address goes to lo", name, failure.text);
        interface = loopback;
    }
}

static void set_options(const char *name)
{
    /* Otherwise removing an address also removes newer ones of its subnet. */
    set_option("ipv4", "all", "promote_secondaries", "1");
    /* Peers that know the base's MAC learn the clone's at once. */
    set_option("ipv4", name, "arp_notify", "1");
    /* The link has no IPv6, which would take time at each change of the MAC, in every clone. */
    set_option("ipv6", name, "disable_ipv6", "1");
}

static struct inet host_only(const struct inet *from)
{
    struct inet host = *from;

    host.prefix = (uint8_t)(inet_size(&host) * 8);
    return host;
}

static int read_fields(const struct body *body, struct failure *failure)
{
    const struct field *new_mac = body_find(body, FIELD_MAC);
    uint64_t own = peer_is_own;

    if (parse_field(body, FIELD_ADDRESS, &address, failure) || parse_field(body, FIELD_GATEWAY, &gateway, failure))
        return -1;
    body_number(body, FIELD_PEER_GATEWAY, &own);
    peer_is_own = own != 0;
    if (new_mac) {
        memcpy(mac, new_mac->bytes, sizeof mac);
        has_mac = true;
    }
    return 0;
}

static void add_gateway(void)
{
    if (!gateway.family)
        return;
    struct inet host = host_only(&gateway);
    if (peer_is_own)
        netlink_address(true, loopback, &host);
    else if (interface != loopback)
        netlink_default_route(interface, &gateway);
}

int network_configure(const struct body *body, struct failure *failure)
{
    const char *name = body_text(body, FIELD_INTERFACE);

    if (read_fields(body, failure))
        return -1;
    loopback = if_nametoindex("lo");
    netlink_begin();
    netlink_link(loopback, NULL, true);
    if (netlink_commit(failure))
        return -1;
    if (!name || !*name)
        return 0;
    if (strlen(name) >= IF_NAMESIZE || strchr(name, '/'))
        return fail_with(failure, EINVAL, "\"%.40s\" is not an interface name", name);
    strcpy(interface_name, name);
    find_interface(name);
    set_options(name);
    netlink_begin();
    netlink_link(interface, has_mac && interface != loopback ? mac : NULL, true);
    if (address.family)
        netlink_address(true, interface, &address);
    add_gateway();
    return netlink_commit(failure);
}

/* The last address of a private network's NIC: a fork of the clone joins with another one. */
static struct inet *joined_address(unsigned index)
{
    static struct joined {
        unsigned index;
        struct inet address;
    } joined[JOINED_MAX];
    unsigned i = 0;

    while (i < JOINED_MAX - 1 && joined[i].index && joined[i].index != index)
        i++;
    joined[i].index = index;
    return &joined[i].address;
}

/* An IPv6 address needs no removal: turning IPv6 off has removed it. */
static int join_address(unsigned index, const char *text, struct failure *failure)
{
    struct inet own, *before = joined_address(index);

    if (!inet_parse(text, &own))
        return fail_with(failure, EINVAL, "\"%.60s\" is not an IP address", text);
    if (own.family == AF_INET6) {
        netlink_address(true, index, &own);
    } else if (!inet_equal(before, &own)) {
        if (before->family)
            netlink_address(false, index, before);
        netlink_address(true, index, &own);
        *before = own;
    }
    return 0;
}

/* A private network has no router to ask and no duplicate addresses. */
static void turn_on_ipv6(const char *name)
{
    set_option("ipv6", name, "accept_ra", "0");
    set_option("ipv6", name, "router_solicitations", "0");
    set_option("ipv6", name, "accept_dad", "0");
    set_option("ipv6", name, "disable_ipv6", "0");
}

/* On a private network the switch completes no checksum and segments no frame: turn the offloads off. */
static void make_frames_whole(const char *name)
{
    static const uint32_t offloads[] = {ETHTOOL_STXCSUM, ETHTOOL_SSG, ETHTOOL_STSO, ETHTOOL_SUFO, ETHTOOL_SGSO};
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {0};

    if (control < 0)
        return;
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    for (size_t i = 0; i < sizeof offloads / sizeof *offloads; i++) {
        struct ethtool_value off = {.cmd = offloads[i]};

        request.ifr_data = (void *)&off;
        ioctl(control, SIOCETHTOOL, &request); /* refused by a NIC without this offload */
    }
    close(control);
}

int network_join(const struct body *body, struct reply *reply, struct failure *failure)
{
    const char *name = body_text(body, FIELD_INTERFACE);
    const struct field *own_mac = body_find(body, FIELD_MAC);

    (void)reply;
    if (names_set_hosts(body, failure))
        return -1;
    if (!name || !*name)
        return 0;
    unsigned index = strlen(name) < IF_NAMESIZE ? if_nametoindex(name) : 0;
    if (!index)
        return fail_with(failure, ENODEV, "there is no interface %.40s", name);
    set_options(name);
    make_frames_whole(name);
    netlink_begin();
    netlink_link(index, own_mac ? (const uint8_t *)own_mac->bytes : NULL, true);
    if (netlink_commit(failure))
        return -1;
    turn_on_ipv6(name); /* after the MAC, from which the kernel derives a link-local address */
    netlink_begin();
    for (size_t i = 0; i < body->count; i++)
        if (body->fields[i].tag == FIELD_ADDRESS && join_address(index, body->fields[i].bytes, failure))
            return -1;
    return netlink_commit(failure);
}

/* Give up the gateway's address once, before the snapshot, instead of in every clone. */
int network_forget_peer(const struct body *body, struct failure *failure)
{
    struct inet host = host_only(&gateway);
    uint64_t keeps = 0;

    body_number(body, FIELD_PEER_GATEWAY, &keeps);
    if (keeps || !peer_is_own || !gateway.family || interface == loopback)
        return 0;
    peer_is_own = false;
    netlink_begin();
    netlink_address(false, loopback, &host);
    netlink_flush_neighbours(interface);
    add_gateway();
    return netlink_commit(failure);
}

/* By ioctl: kernel code that runs for the first time in a clone is slow, and netlink runs far more of it. */
static int change_mac(const uint8_t *old_mac, bool had_mac, struct failure *failure)
{
    static int control = -1;
    struct ifreq request = {.ifr_hwaddr.sa_family = ARPHRD_ETHER};

    if (!has_mac || interface == loopback || (had_mac && memcmp(mac, old_mac, sizeof mac) == 0))
        return 0;
    if (control < 0)
        control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    memcpy(request.ifr_name, interface_name, sizeof request.ifr_name);
    memcpy(request.ifr_hwaddr.sa_data, mac, sizeof mac);
    if (control < 0 || ioctl(control, SIOCSIFHWADDR, &request))
        return fail(failure, "setting the MAC of", interface_name);
    return 0;
}

/* Add new addresses before removing the old ones, so that the interface always has one. */
int network_personalise(const struct body *body, struct failure *failure)
{
    const struct inet old_address = address, old_gateway = gateway;
    const bool old_own = peer_is_own, had_mac = has_mac;
    uint8_t old_mac[6];

    memcpy(old_mac, mac, sizeof mac);
    if (read_fields(body, failure))
        return -1;
    if (!interface)
        return 0;
    if (change_mac(old_mac, had_mac, failure))
        return -1;
    netlink_begin();
    bool moved = !inet_equal(&address, &old_address);
    if (moved)
        netlink_address(true, interface, &address);
    if (moved || peer_is_own != old_own || !inet_equal(&gateway, &old_gateway)) {
        struct inet old_host = host_only(&old_gateway);
        if (old_own && old_gateway.family)
            netlink_address(false, loopback, &old_host);
        if (!body_find(body, FIELD_MAC))
            netlink_flush_neighbours(interface);
        if (moved && old_address.family)
            netlink_address(false, interface, &old_address);
        add_gateway(); /* last: removing an address removes the routes through it */
    }
    return netlink_commit(failure);
}
