/* Notes in the file "proofs" of the working directory, one line a run, on what this program runs,
 * then executes its arguments.  Asks the processor itself: an emulator in place of a hypervisor
 * shows. */
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

static sigjmp_buf refused;

static void refuse(int number)
{
    (void)number;
    siglongjmp(refused, 1);
}

/* Leaf 0x40000000; `xen` asks with Xen's prefix, which its paravirtual guests need, whose CPUID
 * instruction is the processor's own. */
static void signature(char text[13], int xen)
{
    unsigned int a = 0x40000000, b = 0, c = 0, d = 0;

    memset(text, 0, 13);
    if (sigsetjmp(refused, 1))
        return;
    if (xen)
        __asm__ volatile("ud2a; .ascii \"xen\"; cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
    else
        __cpuid(0x40000000, a, b, c, d);
    memcpy(text, &b, 4);
    memcpy(text + 4, &c, 4);
    memcpy(text + 8, &d, 4);
    for (a = 0; a < 12; a++)
        if (text[a] <= ' ' || text[a] > '~')
            text[a] = 0;
}

/* The value of the first line of the file that starts with `key` (all of it for ""), or "". */
static void value(char *text, int size, const char *path, const char *key)
{
    char line[256];
    FILE *file = fopen(path, "r");

    text[0] = 0;
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, strlen(key)))
            continue;
        char *start = *key && strchr(line, ':') ? strchr(line, ':') + 2 : line;
        start[strcspn(start, "\n")] = 0;
        snprintf(text, size, "%s", start);
        break;
    }
    if (file)
        fclose(file);
}

int main(int count, char **words)
{
    char plain[13], prefixed[13], vendor[64], type[64], guest[64], line[512];
    struct utsname name;
    int fd, size;

    if (count < 2)
        return 2;
    signal(SIGILL, refuse);
    signature(plain, 0);
    signature(prefixed, 1);
    signal(SIGILL, SIG_DFL);
    value(vendor, sizeof vendor, "/proc/cpuinfo", "vendor_id");
    value(type, sizeof type, "/sys/hypervisor/type", "");
    value(guest, sizeof guest, "/sys/hypervisor/guest_type", "");
    uname(&name);
    size = snprintf(line, sizeof line, "%s\t%s\t%s\t%s\t%s\t%s\n", name.release, vendor, plain,
                    prefixed, type, guest);
    fd = open("proofs", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0 || write(fd, line, size) != size) {
        perror("proofs");
        return 99;
    }
    close(fd);
    execvp(words[1], words + 1);
    perror(words[1]);
    return errno == ENOENT ? 127 : 126;
}
