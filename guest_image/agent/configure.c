#include "configure.h"

#include <errno.h>
#include <stdlib.h>

#include "cgroup.h"
#include "limits.h"
#include "names.h"
#include "namespaces.h"
#include "network.h"
#include "protocol.h"
#include "sockets.h"

static const char *cgroup_name = "workload";

void configure_use_cgroup(const char *name)
{
    cgroup_name = name;
}

int configure(const struct body *body, struct reply *reply, struct failure *failure)
{
    static bool tried;
    char **volumes;
    struct writable_layer layer = {.device = body_text(body, FIELD_UPPER_DEVICE)};
    uint64_t upper_mib = 0, shm_mib = 0;

    (void)reply;
    if (tried)
        return fail_with(failure, EALREADY, "the guest is configured already");
    tried = true;
    body_number(body, FIELD_UPPER_MIB, &upper_mib);
    body_number(body, FIELD_SHM_MIB, &shm_mib);
    layer.shares = memory_share(upper_mib << 20, layer.device != NULL, shm_mib << 20);
    layer.volumes = volumes = body_texts(body, FIELD_VOLUME, 0);
    int made = volumes ? namespaces_make(body_text(body, FIELD_ROOT_DEVICE), &layer, failure)
                       : fail_with(failure, ENOMEM, "no memory for the volumes");
    free(volumes);
    if (made)
        return -1;
    if (cgroup_make(cgroup_name, failure) || names_configure(body, failure) || network_configure(body, failure))
        return -1;
    if (limits_configure(body, failure)) /* after the network: there are sysctls of its NICs */
        return -1;
    sockets_probe();
    return 0;
}
