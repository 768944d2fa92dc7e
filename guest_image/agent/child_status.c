#include "child_status.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void child_status_fail_with(struct child_status *status, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(status->text, sizeof status->text, format, arguments);
    va_end(arguments);
}

void child_status_fail(struct child_status *status, const char *call, const char *subject)
{
    child_status_fail_with(status, "%s %s: %s", call, subject, strerror(errno));
}
