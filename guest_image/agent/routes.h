/* The route to a peer. */
#ifndef FCVM_ROUTES_H
#define FCVM_ROUTES_H

#include <stdbool.h>

#include "netlink.h"

/* Whether packets for an address leave the guest, or cannot be sent. False for the guest's own addresses, and for devices
 * that lead to another network namespace of the guest. */
bool routes_lead_outside(const struct inet *peer);

#endif
