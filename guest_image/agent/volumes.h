/* The directories that an image declares as volumes: each a real one, on the file system below the writable layer. */
#ifndef FCVM_VOLUMES_H
#define FCVM_VOLUMES_H

/* For use in the workload's root, in the namespace in which `store`, an empty directory, is mounted. Make each of `paths`
 * (absolute, the outer ones first; NULL ends them) with the image's content, and mount it. What cannot be mounted is
 * reported, and stays a directory of the overlay. */
void volumes_mount(int store, char *const *paths);

#endif
