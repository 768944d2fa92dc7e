#include "program_output.h"

#include <limits.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "output.h"
#include "protocol.h"
#include "spill.h"
#include "streams.h"

void program_output_end(struct program_output *output, bool is_terminal)
{
    /* Processes that the program has left running may hold a pipe open for ever. A terminal is hung up with the program and
     * ends by itself, after the bytes that are still in the kernel. */
    int waiting = is_terminal ? INT_MAX : 0;

    if (output->source.fd >= 0 && !is_terminal)
        ioctl(output->source.fd, FIONREAD, &waiting);
    output->left = (uint32_t)waiting;
    output->is_readable = output->has_ended = true;
}

void program_output_keep(struct program_output *output)
{
    ssize_t got = ring_fill(&output->ring, output->source.fd);

    if (got == 0)
        loop_close(&output->source);
    else if (got > 0)
        loop_again(&output->source, EPOLLIN); /* a program that writes without end must not keep the agent here */
}

/* A process that the program has left running may still write here, and a closed pipe would kill that process. */
void program_output_leave(struct program_output *output)
{
    if (output->source.fd < 0)
        return;
    if (output->closes_at_end)
        loop_close(&output->source);
    else
        spill_take(&output->source);
}

static size_t smaller(size_t size, uint64_t limit)
{
    return size > limit ? (size_t)limit : size;
}

static bool send_ring(struct program_output *output, struct stream *stream, uint8_t channel)
{
    size_t size;
    unsigned char *place = output_data_place(&size);

    size = ring_take(&output->ring, place, smaller(size, stream->may_send[channel]));
    if (!size)
        return false;
    stream->may_send[channel] -= size;
    output_data(stream->id, channel, size);
    return true;
}

bool program_output_send(struct program_output *output, struct stream *stream, uint8_t channel)
{
    size_t size;
    unsigned char *place = output_data_place(&size);

    if (output->ring.used)
        return send_ring(output, stream, channel);
    if (output->source.fd < 0 || !output->is_readable)
        return false;
    if (output->has_ended)
        size = smaller(size, output->left);
    if (output->has_ended && !size)
        program_output_leave(output);
    size = smaller(size, stream->may_send[channel]);
    if (!size)
        return false;
    ssize_t got = read(output->source.fd, place, size);
    if (got > 0) {
        stream->may_send[channel] -= (uint64_t)got;
        output->left -= output->has_ended ? (uint32_t)got : 0;
        output_data(stream->id, channel, (size_t)got);
        return true;
    }
    output->is_readable = false;
    if (got < 0 && !output->has_ended)
        return false;
    if (got < 0)
        program_output_leave(output);
    else
        loop_close(&output->source);
    output_in_turn(FRAME_EOF, stream->id, &channel, 1);
    return true;
}
