#include "directories.h"

#include <string.h>
#include <sys/stat.h>

void directories_make(const char *path)
{
    char part[4096];
    size_t length = strlen(path);

    if (length >= sizeof part)
        return;
    memcpy(part, path, length + 1);
    for (size_t i = 1; i <= length; i++) {
        if (part[i] != '/' && part[i] != 0)
            continue;
        char kept = part[i];
        part[i] = 0;
        mkdir(part, 0755);
        part[i] = kept;
    }
}
