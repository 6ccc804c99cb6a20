/* What the test programs share: a verdict for the test, and what no program can go on without. */
#ifndef VERDICT_H
#define VERDICT_H

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096ul
#define MB (1ul << 20)
#define READ_WRITE (PROT_READ | PROT_WRITE)

/* Print "ok key=value ..." or "FAILED key=value ..." and return the exit status that says so. */
static inline int verdict(int ok, const char *format, ...)
{
    va_list values;

    va_start(values, format);
    printf(ok ? "ok " : "FAILED ");
    vprintf(format, values);
    printf("\n");
    va_end(values);
    return !ok;
}

/* Leave with status 2: the test could not be made, which says nothing about the claim. */
static inline void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(2);
}

/* Fresh memory, `flags` beside MAP_ANONYMOUS. */
static inline char *memory(size_t bytes, int flags)
{
    char *place = mmap(NULL, bytes, READ_WRITE, MAP_ANONYMOUS | flags, -1, 0);

    if (place == MAP_FAILED)
        die("mmap");
    return place;
}

/* Seconds of the monotonic clock. */
static inline double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* The next number of a xorshift generator; `*state` must not be 0. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* The numbers 0 to n - 1 in random order, the same at every run. */
static inline uint32_t *shuffled(size_t n)
{
    uint32_t *order = malloc(n * sizeof *order);
    uint64_t random = 88172645463325252ul;

    if (!order)
        die("malloc");
    for (size_t i = 0; i < n; i++)
        order[i] = i;
    for (size_t i = n - 1; i > 0; i--) {
        size_t j = next_random(&random) % (i + 1);
        uint32_t kept = order[i];

        order[i] = order[j];
        order[j] = kept;
    }
    return order;
}

static inline void write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");

    if (!file || fputs(text, file) < 0 || fclose(file))
        die(path);
}

/* The number after `key` in a file of "key value" lines; -1 where it is not there. */
static inline long read_value(const char *path, const char *key)
{
    char line[256];
    long value = -1;
    FILE *file = fopen(path, "r");

    if (!file)
        die(path);
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, key, strlen(key)))
            value = atol(line + strlen(key));
    fclose(file);
    return value;
}

#endif
