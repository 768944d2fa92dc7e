#include "tar.h"
int tar_extract(void*r,struct notice*n){(void)r;(void)n;return 1;}
int tar_create(void*r,struct notice*n){(void)r;(void)n;return 1;}
