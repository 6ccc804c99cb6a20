/*
 * sparse read|write MEGABYTES STEP: touch one page in each STEP bytes.
 *
 * The kernel populates aligned windows of 64 KB.  Reading must cost no memory at all; writing
 * may cost a whole window while there is plenty, and must fall back to single pages before the
 * memory runs out: so more windows than fit must pass, with every value kept.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "verdict.h"

static long resident_kb(void)
{
    return read_value("/proc/self/status", "VmRSS:");
}

int main(int count, char **words)
{
    if (count != 4)
        return 2;
    int writing = !strcmp(words[1], "write");
    size_t length = atol(words[2]) * MB, step = atol(words[3]);
    char *place = memory(length, MAP_PRIVATE | MAP_NORESERVE);
    long touched = 0, wrong = 0, before = resident_kb();

    for (size_t i = 0; i < length; i += step, touched++) {
        if (writing)
            place[i] = (char)(i / step) | 1;
        else
            wrong += place[i] != 0;
    }
    long grown = resident_kb() - before;
    for (size_t i = 0; writing && i < length; i += step)
        wrong += place[i] != ((char)(i / step) | 1);
    return verdict(!wrong, "touched=%ld wrong=%ld grown_kb=%ld", touched, wrong, grown);
}
