/* The table of open streams, their credit, and whose turn it is to send. */
#ifndef FCVM_STREAMS_H
#define FCVM_STREAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct stream;

/* Why a stream has no host any more: it was closed, the session was lost, or the machine is a copy of the host's. */
enum streams_ending { STREAMS_CLOSED, STREAMS_LOST, STREAMS_COPIED };

/* What the kinds of streams do. Absent ones: DATA, EOF and SIGNAL are malformed. */
struct stream_ops {
    void (*data)(struct stream *stream, const unsigned char *bytes, size_t length);
    void (*eof)(struct stream *stream);
    void (*signal)(struct stream *stream, int number);
    void (*resize)(struct stream *stream, uint16_t rows, uint16_t columns);
    /* Put at most one frame of the stream into the output. True: ask again when it is its turn. */
    bool (*emit)(struct stream *stream);
    /* Nobody reads it any more. Must call streams_end. */
    void (*abandon)(struct stream *stream, enum streams_ending why);
};

/* First member of every kind's own structure, which the kind gives back (loop_free) after streams_end. */
struct stream {
    const struct stream_ops *ops;
    uint32_t id;
    bool input_ended;     /* the host sent EOF */
    bool waits_for_turn;  /* it is in the list of those that have something to send */
    uint32_t may_receive; /* DATA bytes the host may still send */
    uint32_t consumed;    /* received, used up, and not yet granted again */
    uint64_t may_send[2]; /* by channel */
    struct stream *same_bucket;
    struct stream *next_ready, *previous_ready;
};

bool streams_are_full(void);
void streams_begin(struct stream *stream, uint32_t id, const struct stream_ops *ops);
void streams_end(struct stream *stream);
void streams_end_all(enum streams_ending why);
struct stream *streams_find(uint32_t id);

/* From the host, each checked against the stream's state; a breach ends the session. */
void streams_take_data(struct stream *stream, const unsigned char *bytes, size_t length);
void streams_take_eof(struct stream *stream);
void streams_grant(struct stream *stream, uint8_t channel, uint32_t bytes);
void streams_abandon(struct stream *stream);
void streams_signal(struct stream *stream, int number);
void streams_resize(struct stream *stream, uint16_t rows, uint16_t columns);

/* Bytes of DATA were used up: grant the host as many, in portions. */
void streams_consumed(struct stream *stream, size_t length);

/* It has something to send; put it at the end of the line. */
void streams_ready(struct stream *stream);
struct stream *streams_next_ready(void);
void streams_take_turn(struct stream *stream);

#endif
