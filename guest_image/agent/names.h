/* Who the guest is: host name, machine id, and the files in /etc that say so. */
#ifndef FCVM_NAMES_H
#define FCVM_NAMES_H

#include "fields.h"

/* Write all of them, in place of whatever the image has (also symlinks). */
int names_configure(const struct body *body, struct failure *failure);

/* Write those whose fields are there. */
int names_personalise(const struct body *body, struct failure *failure);

/* The lines of /etc/hosts alone, where the body has some. */
int names_set_hosts(const struct body *body, struct failure *failure);

#endif
