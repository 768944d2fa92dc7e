/* Errors: reported to the console, to the host, or both. */
#ifndef FCVM_REPORT_H
#define FCVM_REPORT_H

#include <stdbool.h>
#include <stdnoreturn.h>

/* Why a request was refused: an errno, and one line that names the call and its subject. */
struct failure {
    int error;
    char text[200];
};

/* Tests run the agent as an ordinary process: steps that a container forbids are reported, and nothing powers off. */
extern bool report_test_mode;

void report(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Print call, subject and errno, then power off: the guest cannot work without this step. */
noreturn void report_fatal(const char *call, const char *subject);

noreturn void report_power_off(void);

/* Power off by a reset from now on: Firecracker has no power management, and only a reset ends it. */
void report_power_off_by_reset(void);

/* Record the current errno; returns -1, so that callers can `return fail(...)`. */
int fail(struct failure *failure, const char *call, const char *subject);

/* Record an errno of our own choice with a sentence. */
int fail_with(struct failure *failure, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* For set-up steps that a test's container may forbid: report the failure and return 0 in a test, else fail(). */
int fail_unless_test(struct failure *failure, const char *call, const char *subject);

#endif
