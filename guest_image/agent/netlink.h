/* A batch of rtnetlink messages, sent in one call. */
#ifndef FCVM_NETLINK_H
#define FCVM_NETLINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "report.h"

struct inet {
    uint8_t family; /* AF_INET, AF_INET6, or 0 for none */
    uint8_t prefix;
    uint8_t bytes[16];
};

/* "10.0.2.15/24"; without a prefix length the whole address is the prefix. */
bool inet_parse(const char *text, struct inet *address);
size_t inet_size(const struct inet *address);
bool inet_equal(const struct inet *one, const struct inet *other);

void netlink_begin(void);

/* Change a link. NULL as `mac` and false as `up` leave each as it is. */
void netlink_link(unsigned index, const uint8_t *mac, bool up);
void netlink_dummy(const char *name);
void netlink_address(bool add, unsigned index, const struct inet *address);
void netlink_default_route(unsigned index, const struct inet *gateway);

/* Forget every IPv4 neighbour of the link. Setting a MAC does so too. */
void netlink_flush_neighbours(unsigned index);

/* Send the batch. EEXIST and EADDRNOTAVAIL are no failures: the wanted state is there. */
int netlink_commit(struct failure *failure);

#endif
