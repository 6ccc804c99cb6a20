/*
 * Loaded into mkfs.erofs.  A squashfs without any extended attribute answers EOPNOTSUPP when it
 * is asked for a file's, also through an overlay; mkfs.erofs 1.5 gives up on that.  Here it is
 * what it means: this file has none.
 */
#include <errno.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

ssize_t llistxattr(const char *path, char *list, size_t size)
{
    ssize_t length = syscall(SYS_llistxattr, path, list, size);

    return length < 0 && errno == EOPNOTSUPP ? 0 : length;
}
