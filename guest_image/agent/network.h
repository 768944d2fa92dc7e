/* The guest's network: loopback, one interface with an address, and the gateway's address, which may be the guest's own. */
#ifndef FCVM_NETWORK_H
#define FCVM_NETWORK_H

#include "fields.h"
#include "netlink.h"

int network_configure(const struct body *body, struct failure *failure);
int network_personalise(const struct body *body, struct failure *failure);
int network_join(const struct body *body, struct reply *reply, struct failure *failure);
int network_forget_peer(const struct body *body, struct failure *failure);

/* The interface's address (family 0: none), and the gateway's address if it is the guest's own, else NULL. */
const struct inet *network_address(void);
const struct inet *network_peer(void);

/* Whether an address is one of the guest's own. */
bool network_owns(const struct inet *address);

/* Whether a device is the interface of that address (a dummy device in a VM without a NIC). */
bool network_is_interface(unsigned index);

#endif
