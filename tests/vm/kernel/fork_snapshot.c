/*
 * A child must not see what its parent writes after the fork.
 *
 * On CPU 0 a thread counts without pause, on CPU 1 the main thread forks: the writer's CPU must
 * have lost its right to write the page before the child looks at it.  Needs two CPUs.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include "verdict.h"

#define FORKS 60

static volatile unsigned long *counter;

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
}

static void *count(void *unused)
{
    pin(0);
    for (;;)
        (*counter)++;
    return unused;
}

static int child_sees_change(void)
{
    unsigned long first = *counter;

    for (volatile int i = 0; i < 1000000; i++)
        ;
    return *counter != first;
}

int main(void)
{
    pthread_t thread;
    int seen = 0;

    pin(1);
    counter = (unsigned long *)memory(PAGE, MAP_PRIVATE);
    if (pthread_create(&thread, NULL, count, NULL))
        die("pthread_create");
    usleep(100000);
    unsigned long start = *counter;
    for (int i = 0; i < FORKS; i++) {
        int status;
        pid_t child = fork();

        if (child == 0)
            _exit(child_sees_change());
        if (waitpid(child, &status, 0) != child)
            die("waitpid");
        seen += status != 0;
    }
    int counting = *counter != start;
    int failed = verdict(!seen && counting, "forks=%d seen=%d counting=%d", FORKS, seen, counting);
    fflush(stdout);
    _exit(failed);
}
