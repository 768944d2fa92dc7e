#include "directories.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

int directories_make(int base, const char *path)
{
    char part[4096];
    size_t length = strlen(path);

    if (length >= sizeof part) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(part, path, length + 1);
    for (size_t i = 1; i <= length; i++) {
        if (part[i] != '/' && part[i] != 0)
            continue;
        char kept = part[i];
        part[i] = 0;
        if (mkdirat(base, part, 0755) && errno != EEXIST)
            return -1;
        part[i] = kept;
    }
    return 0;
}
