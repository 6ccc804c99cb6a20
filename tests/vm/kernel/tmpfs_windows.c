/*
 * Files on tmpfs: windows of memory must not show in them.
 *
 * quota: sparse pages of a shared mapping take what they take, and no more, of the limit of a
 * small tmpfs.  hole: reading one page of a hole allocates at most that page and is no change.
 * private: a private mapping follows the file until it is written itself.  Runs as root.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "verdict.h"

#define PLACE "/dev/shm/small"
#define WINDOW 65536ul
#define SPARSE_PAGES 200

static sigjmp_buf after_fault;

static void on_fault(int signal)
{
    siglongjmp(after_fault, signal);
}

static int new_file(const char *name, off_t length)
{
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);

    if (fd < 0 || ftruncate(fd, length))
        die(name);
    return fd;
}

static char *map(int fd, size_t length, int how)
{
    char *place = mmap(NULL, length, READ_WRITE, how, fd, 0);

    if (place == MAP_FAILED)
        die("mmap");
    return place;
}

static long allocated_kb(int fd)
{
    struct stat st;

    if (fstat(fd, &st))
        die("fstat");
    return st.st_blocks / 2;
}

/* How many of SPARSE_PAGES pages, one in each window, fit into 1 MB (256 pages). */
static int fill_quota(long *kb)
{
    int fd = new_file(PLACE "/sparse", SPARSE_PAGES * WINDOW);
    char *place = map(fd, SPARSE_PAGES * WINDOW, MAP_SHARED);
    volatile int reached = 0;

    if (!sigsetjmp(after_fault, 1))
        for (; reached < SPARSE_PAGES; reached++)
            place[reached * WINDOW] = 1;
    *kb = allocated_kb(fd);
    munmap(place, SPARSE_PAGES * WINDOW);
    close(fd);
    unlink(PLACE "/sparse");
    return reached;
}

static int read_of_hole_changes_file(long *kb)
{
    int fd = new_file(PLACE "/hole", 512 << 10);
    char *place = map(fd, 512 << 10, MAP_SHARED);
    struct stat before, after;

    fstat(fd, &before);
    usleep(50000);
    (void)*(volatile char *)(place + 0x18000);
    fstat(fd, &after);
    *kb = allocated_kb(fd);
    unlink(PLACE "/hole");
    return memcmp(&before.st_mtim, &after.st_mtim, sizeof before.st_mtim) != 0;
}

/* Whether a private mapping shows a later write to the file, in pages read before and not. */
static int private_follows_file(void)
{
    static char bytes[WINDOW];
    int fd = new_file(PLACE "/private", WINDOW);
    char *place = map(fd, WINDOW, MAP_PRIVATE);

    memset(bytes, 'o', WINDOW);
    if (pwrite(fd, bytes, WINDOW, 0) != (ssize_t)WINDOW)
        die("pwrite");
    (void)*(volatile char *)place;
    memset(bytes, 'n', WINDOW);
    if (pwrite(fd, bytes, WINDOW, 0) != (ssize_t)WINDOW)
        die("pwrite");
    return place[0] == 'n' && place[5 * PAGE] == 'n';
}

int main(void)
{
    long quota_kb, hole_kb;

    mkdir(PLACE, 0700);
    if (mount("small", PLACE, "tmpfs", 0, "size=1m"))
        die("mount");
    signal(SIGBUS, on_fault);
    signal(SIGSEGV, on_fault);
    int reached = fill_quota(&quota_kb);
    int changed = read_of_hole_changes_file(&hole_kb);
    int follows = private_follows_file();
    int ok = reached == SPARSE_PAGES && quota_kb == SPARSE_PAGES * 4 && !changed &&
             hole_kb <= 4 && follows;
    return verdict(ok, "reached=%d quota_kb=%ld hole_kb=%ld hole_changed=%d private_follows=%d",
                   reached, quota_kb, hole_kb, changed, follows);
}
