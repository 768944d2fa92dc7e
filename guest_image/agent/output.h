/* Frames on their way to the host: control frames first, then one frame of each stream in turn. */
#ifndef FCVM_OUTPUT_H
#define FCVM_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stream;

/* Queue a control frame; dropped without a session. */
void output_control(uint8_t type, uint32_t stream, const void *payload, size_t length);

/* REPLY{errno, fields}. */
void output_reply(uint32_t stream, uint32_t error, const void *fields, size_t length);
void output_window(uint32_t stream, uint8_t channel, uint32_t bytes);
void output_close(uint32_t stream, uint32_t error);

/* Bytes that are no frame: the nonce. */
void output_raw(const void *bytes, size_t length);

/* Whether so much control waits that no further request should be read. */
bool output_is_backed_up(void);

/* Whether everything queued has been written. */
bool output_is_empty(void);

/* For a stream whose turn it is: a place for the bytes of one DATA frame, at least `*room` of them, then the frame. */
unsigned char *output_data_place(size_t *room);
void output_data(uint32_t stream, uint8_t channel, size_t length);

/* For a stream whose turn it is: EOF and EXIT, which follow the stream's DATA. */
void output_in_turn(uint8_t type, uint32_t stream, const void *payload, size_t length);

/* Drop everything, half-written frames as well. */
void output_reset(void);

/* Write what is queued so far and nothing of what is queued from now on, until it is released. */
void output_hold(void);
void output_release(void);

/* Write until nothing is left or the channel is full. True: stopped early to let others run. */
bool output_pump(void);

#endif
