/* Frames on their way to the host: control frames first, then one frame of each stream in turn. */
#ifndef FCVM_OUTPUT_H
#define FCVM_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Accept frames from now on, or drop them: there is a session, or there is none. What is queued is written in either case. */
void output_accept(bool has_session);

/* Queue a control frame; dropped without a session. */
void output_control(uint8_t type, uint32_t stream, const void *payload, size_t length);

/* REPLY{errno, fields}. */
void output_reply(uint32_t stream, uint32_t error, const void *fields, size_t length);
void output_window(uint32_t stream, uint8_t channel, uint32_t bytes);
void output_close(uint32_t stream, uint32_t error);

/* Bytes outside of frames: the nonce. */
void output_raw(const void *bytes, size_t length);

/* Whether so many control frames wait that no further request should be read. */
bool output_is_backed_up(void);

/* Whether everything queued has been written. */
bool output_is_empty(void);

/* For a stream whose turn it is: return a place for the `*room` bytes of one DATA frame, then send the frame. */
unsigned char *output_data_place(size_t *room);
void output_data(uint32_t stream, uint8_t channel, size_t length);

/* For a stream whose turn it is: a frame that follows the stream's DATA (EOF, EXIT, a late REPLY). */
void output_in_turn(uint8_t type, uint32_t stream, const void *payload, size_t length);

/* Drop everything, also half-written frames. */
void output_reset(void);

/* Write only what is queued now. Frames that are queued later wait for output_release. */
void output_hold(void);
void output_release(void);

/* Write until nothing is left or the channel is full. `next_turn` lets one stream put a frame in; false: no stream waits.
 * True: stopped early to let others run. */
bool output_pump(bool (*next_turn)(void));

#endif
