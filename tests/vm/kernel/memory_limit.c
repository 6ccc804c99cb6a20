/*
 * The limit of a memory cgroup holds, and windows of memory do not bring it nearer.
 *
 * In a group of 64 MB: 48 MB must fit; 2,048 pages that lie 64 KB apart (8 MB, but 128 MB of
 * windows) must fit; 128 MB must be refused by SIGKILL.  Runs as root.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "verdict.h"

#define ROOT "/sys/fs/cgroup"
#define GROUP ROOT "/limited"
#define LIMIT (64 * MB)

/* Touch `bytes` of memory in steps, in a process inside the group; its wait status. */
static int touch(size_t bytes, size_t step)
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        write_text(GROUP "/cgroup.procs", "0");
        char *place = memory(bytes, MAP_PRIVATE | MAP_NORESERVE);
        long wrong = 0;

        for (size_t i = 0; i < bytes; i += step)
            place[i] = (char)(i / step) | 1;
        for (size_t i = 0; i < bytes; i += step)
            wrong += place[i] != ((char)(i / step) | 1);
        _exit(wrong != 0);
    }
    if (waitpid(child, &status, 0) != child)
        die("waitpid");
    return status;
}

int main(void)
{
    char limit[32];

    mkdir(GROUP, 0755);
    write_text(ROOT "/cgroup.subtree_control", "+memory");
    snprintf(limit, sizeof limit, "%lu", LIMIT);
    write_text(GROUP "/memory.max", limit);

    int dense = touch(48 * MB, PAGE), sparse = touch(128 * MB, 65536);
    int killed = touch(128 * MB, PAGE);
    long peak = read_value(GROUP "/memory.peak", "");
    int ok = !dense && !sparse && WIFSIGNALED(killed) && WTERMSIG(killed) == SIGKILL &&
             peak <= (long)LIMIT;
    return verdict(ok, "dense=%d sparse=%d killed_by=%d peak_kb=%ld", dense, sparse,
                   WTERMSIG(killed), peak >> 10);
}
