#include "dial.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "network.h"
#include "protocol.h"

static void fill_target(struct target *into, const struct inet *from, uint16_t port)
{
    memset(into, 0, sizeof *into);
    into->address.any.sa_family = from->family;
    if (from->family == AF_INET6) {
        into->address.six.sin6_port = htons(port);
        memcpy(&into->address.six.sin6_addr, from->bytes, 16);
        into->size = sizeof into->address.six;
    } else {
        into->address.four.sin_port = htons(port);
        memcpy(&into->address.four.sin_addr, from->bytes, 4);
        into->size = sizeof into->address.four;
    }
}

static int choose_host(const struct body *body, struct inet *host, struct failure *failure)
{
    const char *text = body_text(body, FIELD_ADDRESS);

    *host = *network_address();
    if (text && *text && !inet_parse(text, host))
        return fail_with(failure, EINVAL, "\"%.60s\" is not an IP address", text);
    if (!host->family)
        return fail_with(failure, EADDRNOTAVAIL, "the guest has no address to connect to");
    return 0;
}

/* Bind to the gateway's address, where the guest has that address. */
static int choose_source(int fd, const struct inet *host, struct failure *failure)
{
    const int on = 1;
    const struct inet *peer = network_peer();
    struct target source;

    if (!peer || peer->family != host->family || !network_owns(host) || host->bytes[0] == 127)
        return 0;
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    fill_target(&source, peer, 0);
    return bind(fd, &source.address.any, source.size) ? fail(failure, "bind", "to the gateway's address") : 0;
}

int dial(const struct body *body, int type, struct target *target, struct failure *failure)
{
    struct inet host;
    uint64_t port = 0;

    if (!body_number(body, FIELD_PORT, &port) || port == 0 || port > 65535)
        return fail_with(failure, EINVAL, "PORT must be 1 to 65535");
    if (choose_host(body, &host, failure))
        return -1;
    int fd = socket(host.family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return fail(failure, "socket", "");
    fill_target(target, &host, (uint16_t)port);
    if (choose_source(fd, &host, failure) == 0)
        return fd;
    close(fd);
    return -1;
}
