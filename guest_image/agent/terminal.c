#include "terminal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "namespaces.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

int terminal_open(struct terminal_size size, int *program, struct failure *failure)
{
    int unlocked = 0;
    int terminal = openat(namespaces_terminals(), "ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);

    if (terminal < 0)
        return fail(failure, "open", "/dev/pts/ptmx");
    /* Not by name: in the agent's own devpts the name belongs to another terminal or to none. */
    *program = ioctl(terminal, TIOCSPTLCK, &unlocked) ? -1 : ioctl(terminal, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*program < 0) {
        fail(failure, "ioctl", "TIOCGPTPEER");
        close(terminal);
        return -1;
    }
    terminal_resize(terminal, size);
    return terminal;
}

void terminal_resize(int terminal, struct terminal_size size)
{
    const struct winsize cells = {.ws_row = size.rows, .ws_col = size.columns};

    if (size.rows && size.columns)
        ioctl(terminal, TIOCSWINSZ, &cells);
}
