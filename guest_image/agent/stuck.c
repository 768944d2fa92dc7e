#include "stuck.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { NAMED_MAX = 5 };

struct look {
    const char *group;
    char *names;
    size_t size, used;
    unsigned uninterruptible, running;
};

static bool read_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, size - 1);

    if (fd >= 0)
        close(fd);
    if (got <= 0)
        return false;
    text[got] = 0;
    return true;
}

static bool is_in_group(const struct look *look, const char *process)
{
    char path[64], text[4096];
    size_t length = strlen(look->group);

    snprintf(path, sizeof path, "/proc/%.16s/cgroup", process);
    const char *line = read_text(path, text, sizeof text) ? strstr(text, "0::/") : NULL;
    return line && strncmp(line + 3, look->group, length) == 0 && strchr("/\n", line[3 + length]);
}

static void name(struct look *look, const char *stat, const char *process)
{
    const char *begin = strchr(stat, '('), *end = strrchr(stat, ')');

    if (look->uninterruptible + look->running > NAMED_MAX || look->used >= look->size)
        return;
    int put = snprintf(look->names + look->used, look->size - look->used, "%s%.*s (pid %.16s)",
                       look->used ? ", " : "", (int)(end - begin - 1), begin + 1, process);
    look->used += put > 0 ? (size_t)put : 0;
}

static void look_at_task(struct look *look, const char *process, const char *task)
{
    char path[96], stat[512];

    snprintf(path, sizeof path, "/proc/%.16s/task/%.16s/stat", process, task);
    const char *end = read_text(path, stat, sizeof stat) ? strrchr(stat, ')') : NULL;
    if (!end || !strchr(stat, '(') || !end[1] || !strchr("DR", end[2]))
        return;
    *(end[2] == 'D' ? &look->uninterruptible : &look->running) += 1;
    name(look, stat, process);
}

static void look_at_process(struct look *look, const char *process)
{
    char path[64];

    if (!is_in_group(look, process))
        return;
    snprintf(path, sizeof path, "/proc/%.16s/task", process);
    DIR *tasks = opendir(path);
    struct dirent *task;
    while (tasks && (task = readdir(tasks)))
        if (isdigit((unsigned char)task->d_name[0]))
            look_at_task(look, process, task->d_name);
    if (tasks)
        closedir(tasks);
}

bool stuck_in_kernel(const char *group, char *names, size_t size)
{
    struct look look = {.group = group, .names = names, .size = size};
    DIR *processes = opendir("/proc");
    struct dirent *process;

    names[0] = 0;
    while (processes && (process = readdir(processes)))
        if (isdigit((unsigned char)process->d_name[0]))
            look_at_process(&look, process->d_name);
    if (processes)
        closedir(processes);
    return look.uninterruptible && !look.running;
}
