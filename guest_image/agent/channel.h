/* The byte channel to the host: a virtio-serial port, a vsock connection, or in tests a descriptor given by the caller. */
#ifndef FCVM_CHANNEL_H
#define FCVM_CHANNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

void channel_find(void);
void channel_use(int fd);
bool channel_is_vsock(void);

/* Whether a read or write may get anywhere; cleared by EAGAIN, set again by the next edge. */
bool channel_can_read(void);
bool channel_can_write(void);

/* Bytes moved, or 0 when nothing can be moved now. A port that no host has open reads as 0 as well. */
size_t channel_read(void *bytes, size_t size);
size_t channel_write(const void *bytes, size_t size);

#endif
