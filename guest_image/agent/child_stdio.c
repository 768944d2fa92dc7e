#include "child_stdio.h"

#include <fcntl.h>
#include <unistd.h>

static void close_pair(int pair[2])
{
    close(pair[PARENT]);
    close(pair[CHILD]);
}

/* pair[PARENT] is ours and non-blocking, pair[CHILD] the process's. */
static int make_pipe(int pair[2], bool we_read)
{
    int ends[2];

    if (pipe2(ends, O_CLOEXEC))
        return -1;
    pair[PARENT] = ends[we_read ? 0 : 1];
    pair[CHILD] = ends[we_read ? 1 : 0];
    return fcntl(pair[PARENT], F_SETFL, O_NONBLOCK);
}

int child_stdio_pipes(int pipes[3][2], struct failure *failure)
{
    for (int i = 0; i < 3; i++) {
        if (make_pipe(pipes[i], i > 0) == 0)
            continue;
        while (i-- > 0)
            close_pair(pipes[i]);
        return fail(failure, "pipe2", "");
    }
    return 0;
}

int child_stdio_terminal(struct terminal_size size, int pipes[3][2], struct failure *failure)
{
    int program;
    int terminal = terminal_open(size, &program, failure);

    if (terminal < 0)
        return -1;
    pipes[0][PARENT] = fcntl(terminal, F_DUPFD_CLOEXEC, 0);
    pipes[1][PARENT] = terminal;
    pipes[2][PARENT] = -1;
    pipes[0][CHILD] = program;
    pipes[1][CHILD] = fcntl(program, F_DUPFD_CLOEXEC, 0);
    pipes[2][CHILD] = fcntl(program, F_DUPFD_CLOEXEC, 0);
    if (pipes[0][PARENT] >= 0 && pipes[1][CHILD] >= 0 && pipes[2][CHILD] >= 0)
        return 0;
    fail(failure, "fcntl", "F_DUPFD_CLOEXEC");
    for (int i = 0; i < 3; i++)
        close_pair(pipes[i]);
    return -1;
}
