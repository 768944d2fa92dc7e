/* By which way a peer is reached. */
#ifndef FCVM_ROUTES_H
#define FCVM_ROUTES_H

#include <stdbool.h>

#include "netlink.h"

/* Whether what is sent to an address leaves the guest, or cannot be sent: not for the guest's own addresses, nor by a
 * device that leads to another network namespace of the guest. */
bool routes_lead_outside(const struct inet *peer);

#endif
