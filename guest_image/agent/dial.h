/* Sockets for ports of the workload, as a peer on its network would use them. */
#ifndef FCVM_DIAL_H
#define FCVM_DIAL_H

#include <netinet/in.h>
#include <sys/socket.h>

#include "fields.h"

struct target {
    union {
        struct sockaddr any;
        struct sockaddr_in four;
        struct sockaddr_in6 six;
    } address;
    socklen_t size;
};

/* Return a non-blocking socket from which the target, PORT at ADDRESS, can be reached; -1: there is none. */
int dial(const struct body *body, int type, struct target *target, struct failure *failure);

#endif
