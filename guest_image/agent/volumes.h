/* The volumes of an image: each is a directory on the file system of the writable layer, not of the overlay. */
#ifndef FCVM_VOLUMES_H
#define FCVM_VOLUMES_H

/* In the workload's root, in the namespace in which `store`, an empty directory, is mounted: make each of `paths` (absolute,
 * the outer ones first; NULL ends them) with the image's content, and mount it. A volume that cannot be mounted is reported
 * and stays a directory of the overlay. */
void volumes_mount(int store, char *const *paths);

#endif
