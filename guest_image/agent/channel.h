/* The byte channel to the host: a virtio-serial port, a vsock connection, or in tests a descriptor given by the caller. */
#ifndef FCVM_CHANNEL_H
#define FCVM_CHANNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

void channel_find(void);
void channel_use(int fd);

/* Whether a read or write may succeed: false after EAGAIN, true after the next event. */
bool channel_can_read(void);
bool channel_can_write(void);

/* Bytes moved, or 0 when nothing can be moved now. A port that no host has open also reads as 0. */
size_t channel_read(void *bytes, size_t size);
size_t channel_write(const void *bytes, size_t size);

#endif
