/*
 * hostfs_metadata: metadata of files of the host, set from the guest; the host looks afterwards.
 *
 * In the current directory, which the host prepared: `exact` gets times of a nanosecond,
 * `touched` the time of now, the link `link` times of its own.  Then the host replaces `victim`
 * by a symbolic link while it is held here by its name: no change may go through the link.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "verdict.h"

static const struct timespec EXACT[2] = { { 1000000000, 987654321 }, { 1111111111, 123456789 } };
static const struct timespec LATER[2] = { { 1234567890, 1 }, { 1234567890, 2 } };

static int reads_back(const char *path, const struct timespec *times)
{
    struct stat st;

    if (lstat(path, &st))
        die(path);
    return !memcmp(&st.st_atim, &times[0], sizeof *times) &&
           !memcmp(&st.st_mtim, &times[1], sizeof *times);
}

static void wait_for(const char *path)
{
    for (int i = 0; access(path, F_OK); i++) {
        if (i == 1000)
            die(path);
        usleep(10000);
    }
}

int main(void)
{
    if (utimensat(AT_FDCWD, "exact", EXACT, 0) || utimensat(AT_FDCWD, "touched", NULL, 0) ||
        utimensat(AT_FDCWD, "link", LATER, AT_SYMLINK_NOFOLLOW))
        die("utimensat");
    int exact = reads_back("exact", EXACT), link = reads_back("link", LATER);

    /* O_PATH opens nothing on the host, so that the kernel has only the name to work with. */
    int held = open("victim", O_PATH);
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", held);
    write_text("held", "");
    wait_for("replaced");
    int mode = chmod(name, 0600), times = utimensat(AT_FDCWD, name, EXACT, 0);
    int size = truncate(name, 1);
    return verdict(exact && link, "exact=%d link=%d chmod=%d utimes=%d truncate=%d", exact, link,
                   mode, times, size);
}
