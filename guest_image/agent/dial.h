/* Sockets for ports of the workload, as a peer on its network would have them. */
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

/* A non-blocking socket of a type from which PORT at ADDRESS, the target, can be reached; -1 where there is none. */
int dial(const struct body *body, int type, struct target *target, struct failure *failure);

#endif
