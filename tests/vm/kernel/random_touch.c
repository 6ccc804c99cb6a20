/*
 * random_touch MODE MEGABYTES: touch much memory in random order, then verify every page.
 *
 * Each run of contiguous pages costs the guest's process one mapping on the host, of which it
 * may have 65,530 by default: a kernel that keeps them all dies or spins beyond 256 MB.
 * Modes: private, shared, forked (parent and child each with its own version), threaded (each
 * thread verifies what another wrote), scattered (a file whose pages lie in memory in random
 * order, so that each needs a mapping of its own).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "verdict.h"

#define THREADS 4

static char *place;
static size_t pages;
static uint32_t *order;
static long wrong;

static uint64_t *word(size_t page)
{
    return (uint64_t *)(place + page * PAGE + page * 64 % 4032);
}

static uint64_t value(size_t page, uint64_t version)
{
    return page * 1000003 + version;
}

static void fill(size_t from, size_t to, uint64_t version)
{
    for (size_t i = from; i < to; i++)
        *word(order[i]) = value(order[i], version);
}

static long errors(size_t from, size_t to, uint64_t version)
{
    long found = 0;

    for (size_t i = from; i < to; i++)
        found += *word(order[i]) != value(order[i], version);
    return found;
}

static void one_process(int flags)
{
    place = memory(pages * PAGE, flags);
    fill(0, pages, 1);
    wrong = errors(0, pages, 1);
}

/* The child changes half of the pages; neither may see the other's. */
static void forked(void)
{
    size_t half = pages / 2;
    int status;

    one_process(MAP_PRIVATE);
    pid_t child = fork();
    if (child == 0) {
        long found = errors(0, pages, 1);

        fill(0, half, 2);
        found += errors(0, half, 2) + errors(half, pages, 1);
        _exit(found != 0);
    }
    wrong += errors(0, pages, 1);
    if (waitpid(child, &status, 0) != child)
        die("waitpid");
    wrong += errors(0, pages, 1) + (status != 0);
}

static pthread_barrier_t filled;

static void *fill_and_check_neighbour(void *argument)
{
    size_t me = (size_t)argument, other = (me + 1) % THREADS, share = pages / THREADS;

    fill(me * share, (me + 1) * share, 1);
    pthread_barrier_wait(&filled);
    __sync_fetch_and_add(&wrong, errors(other * share, (other + 1) * share, 1));
    return NULL;
}

static void threaded(void)
{
    pthread_t threads[THREADS];

    place = memory(pages * PAGE, MAP_PRIVATE);
    pthread_barrier_init(&filled, NULL, THREADS);
    for (size_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, fill_and_check_neighbour, (void *)i))
            die("pthread_create");
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

static void scattered(void)
{
    int fd = open("/dev/shm/scattered", O_RDWR | O_CREAT | O_TRUNC, 0600);
    char page[PAGE];

    if (fd < 0 || ftruncate(fd, pages * PAGE))
        die("/dev/shm/scattered");
    for (size_t i = 0; i < pages; i++) {
        memset(page, 0, PAGE);
        *(uint64_t *)(page + order[i] * 64ul % 4032) = value(order[i], 1);
        if (pwrite(fd, page, PAGE, order[i] * PAGE) != (ssize_t)PAGE)
            die("pwrite");
    }
    place = mmap(NULL, pages * PAGE, READ_WRITE, MAP_SHARED, fd, 0);
    if (place == MAP_FAILED)
        die("mmap");
    wrong = errors(0, pages, 1);
    fill(0, pages, 2);
    wrong += errors(0, pages, 2);
    unlink("/dev/shm/scattered");
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    const char *mode = words[1];
    double start = now();

    pages = atol(words[2]) * MB / PAGE;
    order = shuffled(pages);
    if (!strcmp(mode, "private"))
        one_process(MAP_PRIVATE);
    else if (!strcmp(mode, "shared"))
        one_process(MAP_SHARED);
    else if (!strcmp(mode, "forked"))
        forked();
    else if (!strcmp(mode, "threaded"))
        threaded();
    else if (!strcmp(mode, "scattered"))
        scattered();
    else
        return 2;
    return verdict(!wrong, "pages=%lu wrong=%ld seconds=%.2f", pages, wrong, now() - start);
}
