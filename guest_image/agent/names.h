/* The identity of the guest: host name, machine id, and their files in /etc. */
#ifndef FCVM_NAMES_H
#define FCVM_NAMES_H

#include "fields.h"

/* Write all of them, in place of the files or symlinks of the image. */
int names_configure(const struct body *body, struct failure *failure);

/* Write those whose fields are there. */
int names_personalise(const struct body *body, struct failure *failure);

/* Write only the lines of /etc/hosts, if the body has some. */
int names_set_hosts(const struct body *body, struct failure *failure);

#endif
