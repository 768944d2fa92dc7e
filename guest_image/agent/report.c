#include "report.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "channel.h"

bool report_test_mode;

void report(const char *format, ...)
{
    char line[320] = "fcvm-agent: ";
    const size_t start = strlen(line);
    va_list arguments;

    va_start(arguments, format);
    int length = vsnprintf(line + start, sizeof line - start - 1, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    size_t end = strlen(line);
    line[end++] = '\n';
    /* One write per line: a serial port under emulation costs an exit per byte already. */
    ssize_t ignored = write(STDERR_FILENO, line, end);
    (void)ignored;
}

noreturn void report_fatal(const char *call, const char *subject)
{
    report("fatal: %s %s: %s (errno %d)", call, subject, strerror(errno), errno);
    report_power_off();
}

noreturn void report_power_off(void)
{
    if (report_test_mode)
        exit(0);
    sync();
    /* Firecracker has no power management: only a reset ends it. QEMU ends on either, given -no-reboot. */
    reboot(channel_is_vsock() ? RB_AUTOBOOT : RB_POWER_OFF);
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

int fail(struct failure *failure, const char *call, const char *subject)
{
    int error = errno;

    return fail_with(failure, error, "%s %s: %s", call, subject, strerror(error));
}

int fail_with(struct failure *failure, int error, const char *format, ...)
{
    va_list arguments;

    failure->error = error ? error : EIO;
    va_start(arguments, format);
    vsnprintf(failure->text, sizeof failure->text, format, arguments);
    va_end(arguments);
    return -1;
}

int fail_unless_test(struct failure *failure, const char *call, const char *subject)
{
    if (!report_test_mode)
        return fail(failure, call, subject);
    report("test mode goes on without %s %s: %s", call, subject, strerror(errno));
    return 0;
}
