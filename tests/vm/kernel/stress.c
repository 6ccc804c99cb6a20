/*
 * stress THREADS MEGABYTES SECONDS: random operations on memory, each result verified.
 *
 * Each thread has an area of its own and a table of what each page must hold.  It writes,
 * reads, drops (MADV_DONTNEED), protects, moves (mremap), forks, and passes pages through
 * pipes, while a timer interrupts everything and its handler writes to memory as well.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "verdict.h"

#define MOST_THREADS 16
#define TIMER_PAGES 4096ul

struct area {
    char *place;
    size_t pages;
    uint32_t *version; /* of each page; 0: never written, reads as zero */
    uint32_t last;     /* version given last */
    uint64_t random;
    int pipe[2];
};

static size_t area_pages;
static double deadline;
static long bad, operations, faults, forks;
static volatile sig_atomic_t alarms;
static char *timer_area;

static __thread sigjmp_buf after_fault;
static __thread volatile sig_atomic_t fault_expected;

static void on_fault(int signal)
{
    static const char message[] = "a fault that nobody expected\n";

    (void)signal;
    if (fault_expected)
        siglongjmp(after_fault, 1);
    _exit(write(2, message, sizeof message - 1) > 0 ? 99 : 98);
}

static void on_alarm(int signal)
{
    (void)signal;
    alarms++;
    timer_area[alarms * 7919ul % TIMER_PAGES * PAGE]++;
}

static void complain(const char *what, size_t page, uint64_t got, uint64_t wanted)
{
    fprintf(stderr, "%s, page %zu: %lx instead of %lx\n", what, page, got, wanted);
    if (__sync_add_and_fetch(&bad, 1) > 5)
        _exit(1);
}

static uint64_t *word(struct area *a, size_t page)
{
    return (uint64_t *)(a->place + page * PAGE + page * 64 % 4032);
}

static uint64_t wanted(struct area *a, size_t page)
{
    return a->version[page] ? page * 1000003 + a->version[page] : 0;
}

static void change(struct area *a, size_t page)
{
    a->version[page] = ++a->last;
    *word(a, page) = wanted(a, page);
}

static void check(struct area *a, size_t page)
{
    uint64_t got = *word(a, page);

    if (got != wanted(a, page))
        complain("memory", page, got, wanted(a, page));
}

static size_t any_page(struct area *a)
{
    return next_random(&a->random) % a->pages;
}

/* 1 to `most` pages from `page` on, as many as there are. */
static size_t some_pages(struct area *a, size_t page, size_t most)
{
    size_t count = next_random(&a->random) % most + 1;

    return page + count > a->pages ? a->pages - page : count;
}

static void drop(struct area *a)
{
    size_t page = any_page(a), count = some_pages(a, page, 32);

    if (madvise(a->place + page * PAGE, count * PAGE, MADV_DONTNEED))
        die("madvise");
    memset(&a->version[page], 0, count * sizeof *a->version);
}

/* Take a right away and show that its use faults, in the same page that could be used before. */
static void protect(struct area *a, int left)
{
    size_t page = any_page(a), count = some_pages(a, page, 16);

    if (mprotect(a->place + page * PAGE, count * PAGE, left))
        return; /* no more mappings in this process: the split was refused */
    if (left & PROT_READ)
        check(a, page);
    fault_expected = 1;
    if (sigsetjmp(after_fault, 1)) {
        __sync_fetch_and_add(&faults, 1);
    } else if (left & PROT_READ) {
        *(volatile uint64_t *)word(a, page) = 1;
        complain("a write passed in read-only memory", page, 0, 0);
    } else {
        (void)*(volatile uint64_t *)word(a, page);
        complain("a read passed in forbidden memory", page, 0, 0);
    }
    fault_expected = 0;
    if (mprotect(a->place + page * PAGE, count * PAGE, READ_WRITE))
        die("mprotect back");
    check(a, page);
    change(a, page);
}

/* The kernel reads the page, then writes it. */
static void pass_through_pipe(struct area *a)
{
    size_t page = any_page(a);
    uint64_t value;

    if (write(a->pipe[1], word(a, page), 8) != 8 || read(a->pipe[0], &value, 8) != 8)
        die("pipe");
    if (value != wanted(a, page))
        complain("what the kernel read", page, value, wanted(a, page));
    a->version[page] = ++a->last;
    value = wanted(a, page);
    if (write(a->pipe[1], &value, 8) != 8 || read(a->pipe[0], word(a, page), 8) != 8)
        die("pipe");
}

static void move(struct area *a)
{
    size_t bytes = a->pages * PAGE;
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *target = mmap(NULL, bytes, PROT_NONE, kind, -1, 0);
    char *moved = mremap(a->place, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target);

    if (moved == MAP_FAILED)
        munmap(target, bytes); /* areas with several protections cannot be moved at once */
    else
        a->place = moved;
    check(a, any_page(a));
}

static void fork_and_change(struct area *a)
{
    int status;
    pid_t child = fork();

    if (child == 0) {
        for (int i = 0; i < 300; i++) {
            size_t page = any_page(a);

            if (*word(a, page) != wanted(a, page))
                _exit(1);
            change(a, page);
        }
        _exit(0);
    }
    __sync_fetch_and_add(&forks, 1);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (status)
        complain("the child's memory, wait status", 0, status, 0);
}

/* Rare operations are those that touch the whole area. */
static void do_something(struct area *a)
{
    unsigned int what = next_random(&a->random) % 100;

    if (what < 40)
        change(a, any_page(a));
    else if (what < 75)
        check(a, any_page(a));
    else if (what < 80)
        drop(a);
    else if (what < 84)
        protect(a, PROT_READ);
    else if (what < 87)
        protect(a, PROT_NONE);
    else if (what < 90)
        pass_through_pipe(a);
    else if (what == 90 && next_random(&a->random) % 20 == 0)
        move(a);
    else if (what == 91 && next_random(&a->random) % 20 == 0)
        fork_and_change(a);
    else
        for (int i = 0; i < 16; i++)
            check(a, any_page(a));
    __sync_fetch_and_add(&operations, 1);
}

static void *work(void *argument)
{
    struct area a = {
        .place = memory(area_pages * PAGE, MAP_PRIVATE),
        .pages = area_pages,
        .version = calloc(area_pages, sizeof(uint32_t)),
        .random = (size_t)argument * 88172645463325252ul + 1,
    };

    if (!a.version || pipe(a.pipe))
        die("setting up");
    for (size_t i = 0; i < a.pages; i++)
        change(&a, any_page(&a));
    while (now() < deadline)
        do_something(&a);
    for (size_t i = 0; i < a.pages; i++)
        check(&a, i);
    return NULL;
}

static void start_timer(void)
{
    struct itimerval every = { { 0, 20000 }, { 0, 20000 } };
    struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

    timer_area = memory(TIMER_PAGES * PAGE, MAP_PRIVATE);
    sigaction(SIGSEGV, &action, NULL);
    action.sa_handler = on_alarm;
    action.sa_flags = SA_RESTART;
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
}

int main(int count, char **words)
{
    pthread_t threads[MOST_THREADS];

    if (count != 4 || atoi(words[1]) > MOST_THREADS)
        return 2;
    size_t number = atoi(words[1]);
    area_pages = atol(words[2]) * MB / PAGE;
    deadline = now() + atof(words[3]);
    start_timer();
    for (size_t i = 0; i < number; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)(i + 1)))
            die("pthread_create");
    for (size_t i = 0; i < number; i++)
        pthread_join(threads[i], NULL);
    return verdict(!bad && operations && faults && forks && alarms,
                   "bad=%ld operations=%ld faults=%ld forks=%ld alarms=%d",
                   bad, operations, faults, forks, (int)alarms);
}
