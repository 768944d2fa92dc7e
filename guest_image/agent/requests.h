/* Requests: collecting their bodies, and the table of verbs and streams. */
#ifndef FCVM_REQUESTS_H
#define FCVM_REQUESTS_H

#include <stddef.h>
#include <stdint.h>

#include "protocol.h"
#include "streams.h"

/* What a request does to the session that it came in. */
struct request_effect {
    struct failure malformed; /* error 0: it is well-formed */
    enum { SESSION_GOES_ON, SESSION_QUIESCES, SESSION_SUSPENDS } next;
    unsigned char secret[PROTOCOL_SECRET];       /* of QUIESCE and SUSPEND */
    unsigned char resume_token[PROTOCOL_SECRET]; /* of SUSPEND */
};

/* Begin a request with the first `here` of the `total` bytes of its body, then add further bytes. The request is served once
 * its body is complete. `effect` is all zero before. */
void requests_open(uint32_t id, uint8_t kind, uint32_t total, unsigned char *bytes, uint32_t here,
                   struct request_effect *effect);
void requests_continue(struct stream *stream, const unsigned char *bytes, uint32_t length, struct request_effect *effect);

#endif
