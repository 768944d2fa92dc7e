/* The table of open streams, their credit, and whose turn it is to send. */
#ifndef FCVM_STREAMS_H
#define FCVM_STREAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "report.h"

struct stream;

/* Why a stream has lost its host: it was closed, the session was lost, or the guest runs in a copy of the VM. */
enum streams_ending { STREAMS_CLOSED, STREAMS_LOST, STREAMS_COPIED };

/* What a kind of stream does. Without the function, DATA, EOF and SIGNAL are malformed. */
struct stream_ops {
    void (*data)(struct stream *stream, const unsigned char *bytes, size_t length);
    void (*eof)(struct stream *stream);
    void (*signal)(struct stream *stream, int number);
    void (*resize)(struct stream *stream, uint16_t rows, uint16_t columns);
    /* Put at most one frame into the output. True: the stream waits for another turn. */
    bool (*emit)(struct stream *stream);
    /* The host no longer reads the stream. Must call streams_end. */
    void (*abandon)(struct stream *stream, enum streams_ending why);
};

/* First member of every kind's own structure, which the kind frees (loop_free) after streams_end. */
struct stream {
    const struct stream_ops *ops;
    uint32_t id;
    bool input_ended;     /* the host sent EOF */
    bool waits_for_turn;  /* it is in the line of streams that have something to send */
    uint32_t may_receive; /* DATA bytes the host may still send */
    uint32_t consumed;    /* DATA bytes used up and not granted again yet */
    uint64_t may_send[2]; /* by channel */
    struct stream *same_bucket;
    struct stream *next_ready, *previous_ready;
};

bool streams_are_full(void);
void streams_begin(struct stream *stream, uint32_t id, const struct stream_ops *ops);
void streams_end(struct stream *stream);
void streams_end_all(enum streams_ending why);
struct stream *streams_find(uint32_t id);

/* Pass on what came from the host. -1: the stream's state does not allow the frame, which is malformed. */
int streams_take_data(struct stream *stream, const unsigned char *bytes, size_t length, struct failure *failure);
int streams_take_eof(struct stream *stream, struct failure *failure);
int streams_grant(struct stream *stream, uint8_t channel, uint32_t bytes, struct failure *failure);
int streams_signal(struct stream *stream, int number, struct failure *failure);
void streams_abandon(struct stream *stream);
void streams_resize(struct stream *stream, uint16_t rows, uint16_t columns);

/* Bytes of DATA were used up: grant them to the host again, in portions. */
void streams_consumed(struct stream *stream, size_t length);

/* The stream has something to send: put it at the end of the line. */
void streams_ready(struct stream *stream);

/* Let the first stream of the line send at most one frame. False: no stream waits. */
bool streams_take_turn(void);

#endif
