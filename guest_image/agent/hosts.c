#include "hosts.h"

#include <stdbool.h>
#include <string.h>

/* The line at `at` with its newline, or what is left of the text. */
static size_t line_length(const char *at, size_t left)
{
    const char *newline = memchr(at, '\n', left);

    return newline ? (size_t)(newline - at) + 1 : left;
}

/* Find a line in a text, whose last line may lack the newline. NULL: it is not there. */
static char *find_line(char *text, size_t length, const char *line, size_t size)
{
    size_t bare = size - (size && line[size - 1] == '\n');

    while (length) {
        size_t next = line_length(text, length);
        if (next - (text[next - 1] == '\n') == bare && memcmp(text, line, bare) == 0)
            return text;
        text += next;
        length -= next;
    }
    return NULL;
}

static bool has_line(const char *text, const char *line, size_t size)
{
    return find_line((char *)text, strlen(text), line, size) != NULL;
}

size_t hosts_merge(char *text, size_t length, const char *before, const char *after)
{
    size_t size;

    for (; *before && *after; before += size, after += size) { /* a new member of a network comes last */
        size = line_length(before, strlen(before));
        if (strncmp(before, after, size) != 0)
            break;
    }
    for (const char *line = before; *line; line += size) {
        size = line_length(line, strlen(line));
        char *found = has_line(after, line, size) ? NULL : find_line(text, length, line, size);
        if (!found)
            continue; /* it is in `after` too, or the workload has changed it */
        size_t gone = line_length(found, length - (size_t)(found - text));
        length -= gone;
        memmove(found, found + gone, length - (size_t)(found - text));
    }
    if (length && text[length - 1] != '\n')
        text[length++] = '\n';
    for (const char *line = after; *line; line += size) {
        size = line_length(line, strlen(line));
        if (has_line(before, line, size))
            continue;
        memcpy(text + length, line, size);
        length += size;
    }
    return length;
}
