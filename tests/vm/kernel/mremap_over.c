/*
 * mremap(MREMAP_FIXED) over 4 MB of touched pages: what was there must be gone.
 *
 * The move replaces whole page tables.  A kernel that forgets to tell the host about the old
 * entries leaves the old pages readable.
 */
#define _GNU_SOURCE
#include "verdict.h"

#define LENGTH (4 * MB)

int main(void)
{
    /* Aligned to a page table's 2 MB, so that the move takes tables and not single entries. */
    char *area = mmap(NULL, 64 * MB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *target = (char *)(((uintptr_t)area + 16 * MB) & ~(2 * MB - 1));
    char *source = target + 16 * MB;
    long stale = 0;

    mprotect(target, LENGTH, READ_WRITE);
    mprotect(source, LENGTH, READ_WRITE);
    for (size_t i = 0; i < LENGTH; i += PAGE)
        target[i] = 'T';
    source[0] = source[2 * MB] = 'S';

    if (mremap(source, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, target) != target)
        die("mremap");
    for (size_t i = 0; i < LENGTH; i += PAGE)
        stale += target[i] == 'T';
    int moved = target[0] == 'S' && target[2 * MB] == 'S';
    return verdict(!stale && moved, "stale=%ld pages=%lu moved=%d", stale, LENGTH / PAGE, moved);
}
