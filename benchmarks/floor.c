/* The least that an init can do: power off.  What the kernel's own boot costs. */
#include <sys/reboot.h>
#include <unistd.h>

int main(void)
{
    return reboot(RB_POWER_OFF);
}
