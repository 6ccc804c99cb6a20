/*
 * Single-step a program through a fault at nearly every access.
 *
 * It works in 300 MB whose mappings the host may have dropped.  Each step must end in SIGTRAP,
 * none may be lost, and the program must compute the right result.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "verdict.h"

#define PAGES 76800ul
#define ROUNDS 6000ul
#define STEPS 40000
#define RIGHT 42

static size_t scatter(size_t i)
{
    return i * 48271 % PAGES * PAGE;
}

static int compute(void)
{
    char *place = memory(PAGES * PAGE, MAP_PRIVATE);
    uint64_t sum = 0, expected = 0;

    for (uint64_t i = 0; i < PAGES; i++)
        place[scatter(i)] = i;
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    for (uint64_t i = 0; i < ROUNDS; i++) {
        uint64_t j = i * 12289 % PAGES;

        sum += (unsigned char)++place[scatter(j)];
        expected += (unsigned char)(j + 1);
    }
    return sum == expected ? RIGHT : RIGHT + 1;
}

int main(void)
{
    long steps = 0, odd = 0;
    int status;
    pid_t child = fork();

    if (child == 0)
        _exit(compute());
    waitpid(child, &status, 0);
    while (WIFSTOPPED(status) && steps < STEPS && odd < 10) {
        if (ptrace(PTRACE_SINGLESTEP, child, 0, 0))
            die("PTRACE_SINGLESTEP");
        waitpid(child, &status, 0);
        steps++;
        odd += WIFSTOPPED(status) && WSTOPSIG(status) != SIGTRAP;
    }
    if (WIFSTOPPED(status)) {
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
    }
    int result = WIFEXITED(status) ? WEXITSTATUS(status) : -status;
    return verdict(result == RIGHT && steps == STEPS && !odd, "steps=%ld odd=%ld result=%d",
                   steps, odd, result);
}
