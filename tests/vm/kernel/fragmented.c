/*
 * fragmented MEGABYTES: touch memory when only single free pages are left.
 *
 * Every second page of MEGABYTES is freed again, so that no window of 64 KB can be contiguous.
 * 60 MB must then be had from what is free, without reclaim and with right contents.
 */
#define _GNU_SOURCE
#include "verdict.h"

#define MORE (60 * MB)

static long reclaimed(void)
{
    return read_value("/proc/vmstat", "pgsteal_direct ");
}

int main(int count, char **words)
{
    if (count != 2)
        return 2;
    size_t pages = atol(words[1]) * MB / PAGE;
    char *place = memory(pages * PAGE, MAP_PRIVATE);
    long wrong = 0;

    for (size_t i = 0; i < pages; i++)
        place[i * PAGE] = (char)i | 1;
    for (size_t i = 0; i < pages; i += 2)
        madvise(place + i * PAGE, PAGE, MADV_DONTNEED);

    long before = reclaimed();
    double start = now();
    char *more = memory(MORE, MAP_PRIVATE);
    for (size_t i = 0; i < MORE; i += PAGE)
        more[i] = (char)(i / PAGE) | 1;
    double seconds = now() - start;

    for (size_t i = 0; i < MORE; i += PAGE)
        wrong += more[i] != ((char)(i / PAGE) | 1);
    for (size_t i = 0; i < pages; i++)
        wrong += place[i * PAGE] != (i % 2 ? ((char)i | 1) : 0);
    long stolen = reclaimed() - before;
    return verdict(!wrong, "wrong=%ld reclaimed=%ld seconds=%.2f", wrong, stolen, seconds);
}
