/*
 * micro [CASE...]: small costs of a system, each printed as "case value", lower is better.
 *
 * Microseconds each for a system call, a spawn of /bin/true with wait, the first touch of a page
 * and a file made and removed on tmpfs; milliseconds for a fixed piece of computing, by one
 * process and by two at once.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul

static char page[PAGE];

static double microseconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void system_call(void)
{
    syscall(SYS_getppid);
}

static void spawn(void)
{
    char *words[] = { "true", NULL }, *environment[] = { NULL };
    pid_t child;

    if (posix_spawn(&child, "/bin/true", NULL, NULL, words, environment))
        exit(2);
    waitpid(child, NULL, 0);
}

static void file(void)
{
    int fd = open("/dev/shm/micro", O_WRONLY | O_CREAT | O_TRUNC, 0600);

    if (fd < 0 || write(fd, page, PAGE) != (ssize_t)PAGE)
        exit(2);
    close(fd);
    unlink("/dev/shm/micro");
}

static void touch(void)
{
    static char *place, *end;

    if (place == end) {
        if (place)
            munmap(place - 64 * PAGE * 64, 64 * PAGE * 64);
        place = mmap(NULL, 64 * PAGE * 64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
        madvise(place, 64 * PAGE * 64, MADV_NOHUGEPAGE);
        end = place + 64 * PAGE * 64;
    }
    *place = 1;
    place += PAGE;
}

static void compute(void)
{
    for (volatile long i = 0; i < 100000000; i++)
        ;
}

static void compute_twice(void)
{
    pid_t child = fork();

    compute();
    if (child == 0)
        _exit(0);
    waitpid(child, NULL, 0);
}

static const struct {
    const char *name;
    void (*work)(void);
    int times;
    double unit; /* microseconds */
} cases[] = {
    { "syscall", system_call, 20000, 1 }, { "spawn", spawn, 200, 1 },
    { "touch", touch, 16384, 1 },         { "file", file, 2000, 1 },
    { "cpu", compute, 1, 1000 },          { "cpu2", compute_twice, 1, 1000 },
};

static int wanted(const char *name, int count, char **words)
{
    for (int i = 1; i < count; i++)
        if (!strcmp(words[i], name))
            return 1;
    return count == 1;
}

int main(int count, char **words)
{
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!wanted(cases[i].name, count, words))
            continue;
        double start = microseconds();

        for (int j = 0; j < cases[i].times; j++)
            cases[i].work();
        printf("%s %.3f\n", cases[i].name,
               (microseconds() - start) / cases[i].times / cases[i].unit);
        fflush(stdout);
    }
    return 0;
}
