#include "report.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

bool report_test_mode;
static bool resets;

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
    /* One write per line: under emulation each byte on a serial port costs an exit. */
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
    reboot(resets ? RB_AUTOBOOT : RB_POWER_OFF); /* QEMU ends on either, given -no-reboot */
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

void report_power_off_by_reset(void)
{
    resets = true;
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
