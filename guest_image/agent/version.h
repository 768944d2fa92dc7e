/* Which build this is. guest_image/build defines AGENT_DIGEST as the digest of the sources. */
#ifndef FCVM_VERSION_H
#define FCVM_VERSION_H

#ifndef AGENT_DIGEST
#define AGENT_DIGEST "unknown"
#endif

#define VERSION_TEXT "fcvm-agent-build:" AGENT_DIGEST

#endif
