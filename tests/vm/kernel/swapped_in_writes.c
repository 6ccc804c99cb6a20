/*
 * read(2) into pages that came back from swap: the kernel's own write must make them dirty.
 *
 * Otherwise the next reclaim drops them as "clean, still in swap", and the data are lost.
 * Makes its own swap: the file `swap` in the current directory on a loop device.
 * Runs as root.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/swap.h>
#include <unistd.h>

#include "verdict.h"

#define PAGES 8192ul
#define SWAP_PAGES 16384u
#define SWAP_FILE "swap"

/* What mkswap writes: version and last page at 1024, the signature at the page's end. */
static void write_swap_header(int fd)
{
    char page[PAGE] = { 0 };
    uint32_t *info = (uint32_t *)(page + 1024);

    info[0] = 1;
    info[1] = SWAP_PAGES - 1;
    memcpy(page + PAGE - 10, "SWAPSPACE2", 10);
    if (ftruncate(fd, SWAP_PAGES * PAGE) || pwrite(fd, page, PAGE, 0) != (ssize_t)PAGE)
        die("writing the swap file");
}

static void turn_swap_on(void)
{
    int file = open(SWAP_FILE, O_RDWR | O_CREAT | O_TRUNC, 0600);
    int loop = open("/dev/loop0", O_RDWR);

    if (file < 0 || loop < 0)
        die("opening the swap file and its loop device");
    write_swap_header(file);
    if (ioctl(loop, LOOP_SET_FD, file) || swapon("/dev/loop0", 0))
        die("swapon");
}

/* Push the pages out to swap; returns how many KB of this process lie there now. */
static long push_out(char *place)
{
    if (madvise(place, PAGES * PAGE, MADV_PAGEOUT))
        die("madvise");
    return read_value("/proc/self/smaps_rollup", "Swap:");
}

int main(void)
{
    turn_swap_on();
    char *place = memory(PAGES * PAGE, MAP_PRIVATE);
    long damaged = 0, lost = 0;
    int ends[2];

    if (pipe(ends))
        die("pipe");
    for (size_t i = 0; i < PAGES; i++)
        *(uint64_t *)(place + i * PAGE) = i + 1;
    long first = push_out(place);

    for (size_t i = 0; i < PAGES; i++) {
        volatile uint64_t *word = (uint64_t *)(place + i * PAGE);
        uint64_t value = *word; /* this read brings the page in: present, writable, clean */

        damaged += value != i + 1;
        value = i + 1000000;
        if (write(ends[1], &value, 8) != 8 || read(ends[0], (void *)word, 8) != 8)
            die("through the pipe");
    }
    long second = push_out(place);
    for (size_t i = 0; i < PAGES; i++)
        lost += *(uint64_t *)(place + i * PAGE) != i + 1000000;
    return verdict(!damaged && !lost && first > 0 && second > 0,
                   "pages=%lu damaged=%ld lost=%ld swapped_kb=%ld swapped_again_kb=%ld",
                   PAGES, damaged, lost, first, second);
}
