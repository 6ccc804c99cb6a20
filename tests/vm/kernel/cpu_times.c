/* Time in the program counts as user time, time in the kernel as system time. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "verdict.h"

#define SECONDS 1.0

struct times {
    double user, system;
};

static struct times used(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return (struct times){
        usage.ru_utime.tv_sec + usage.ru_utime.tv_usec / 1e6,
        usage.ru_stime.tv_sec + usage.ru_stime.tv_usec / 1e6,
    };
}

static void compute(void)
{
    for (volatile int i = 0; i < 10000000; i++)
        ;
}

static void keep_the_kernel_busy(void)
{
    static char bytes[4 * MB];
    static int zero = -1;

    if (zero < 0)
        zero = open("/dev/zero", O_RDONLY);
    if (read(zero, bytes, sizeof bytes) < 0)
        die("/dev/zero");
}

static struct times measure(void (*work)(void))
{
    struct times before = used();
    double end = now() + SECONDS;

    while (now() < end)
        work();
    struct times after = used();
    return (struct times){ after.user - before.user, after.system - before.system };
}

int main(void)
{
    struct times program = measure(compute), kernel = measure(keep_the_kernel_busy);
    /* A tick goes to whoever runs next on a busy host: only the order of magnitude is sure. */
    int ok = program.user > 5 * program.system && kernel.system > 0.1 &&
             kernel.system > 3 * program.system;

    return verdict(ok, "program_user=%.2f program_system=%.2f kernel_user=%.2f kernel_system=%.2f",
                   program.user, program.system, kernel.user, kernel.system);
}
