"""The kernel of a run, and what is remembered of it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apppot.host.capabilities.capabilities import Capabilities
    from apppot.host.config.settings import Setting
    from apppot.host.hypervisor.base import Hypervisor
    from apppot.host.hypervisor.launchplan import KernelChoice
    from apppot.host.machine.run import Run


def learn_calibration(record: Run) -> None:
    """Remember what this guest's kernel measured, so that the next one need not."""
    kernel = record.plan.kernel
    unknown = kernel.lpj is None and kernel.tuned and record.plan.hypervisor.kernel == "uml"
    if not unknown or record.console is None:
        return
    from apppot.host.pot import layout

    value = layout.parse_lpj(record.console.text())
    if value is not None:
        layout.remember_lpj(kernel.digest, value)


def uml_kernel(
    wanted: str | None, memory: int, able: Capabilities
) -> tuple[KernelChoice, str | None]:
    """The User-Mode Linux kernel, and the directory of its modules where it needs some.

    `wanted` is a file, None the pot's own or the host's; `memory` bytes are what the guest gets.
    """
    from apppot.host.hypervisor.launchplan import KernelChoice
    from apppot.host.pot import layout

    kernel = layout.find_kernel(kernel=wanted)
    if not kernel.tuned:
        sys.stderr.write(f"apppot: {kernel.release} is not the pot's own: {layout.KERNEL_HINT}\n")
        _warn_of_mappings(memory, able.max_map_count)
    choice = KernelChoice(
        path=kernel.path,
        release=kernel.release,
        digest=kernel.digest,
        tuned=kernel.tuned,
        features=kernel.features,
        lpj=layout.lpj_for(kernel),
        libraries=kernel.libraries,
    )
    return choice, kernel.modules


def x86_kernel(wanted: str | None) -> KernelChoice:
    """The pot's x86-64 kernel, or the file `wanted`, of which nothing is known."""
    from apppot.host.hypervisor.launchplan import KernelChoice
    from apppot.host.pot import layout

    if wanted is not None:
        return KernelChoice(os.path.abspath(wanted), "unknown", wanted, tuned=False)
    kernel = layout.find_x86_kernel()
    return KernelChoice(kernel.vmlinux, kernel.release, kernel.digest, tuned=True)


_HIGH_HALF = 0xFFFFFFFF80000000


def check_kernel_file(setting: Setting[str | None], hypervisor: Hypervisor) -> None:
    """Raise Unsuited where the kernel asked for is another kind than this hypervisor boots.

    One for a machine is a bzImage, or an ELF file that is linked to the high half of memory.
    """
    from apppot.host.common.errors import Unsuited

    if setting.value is None:
        return
    try:
        with open(setting.value, "rb") as file:
            head = file.read(0x206)
    except OSError:
        return  # whoever takes it says what is wrong
    linked = int.from_bytes(head[80:88], "little")  # p_vaddr of the first program header
    for_machine = head[0x202:] == b"HdrS" or (head[:4] == b"\x7fELF" and linked >= _HIGH_HALF)
    if for_machine != (hypervisor.kernel == "x86_64"):
        kind = "a kernel for x86-64 machines" if for_machine else "a User-Mode Linux kernel"
        raise Unsuited(
            f"{setting.origin}: {setting.value} is {kind}, which {hypervisor.name} does not boot",
            "leave out --hypervisor, or the kernel",
        )


_PAGE = 4096


def _warn_of_mappings(memory: int, max_map_count: int) -> None:
    """A stock kernel needs a mapping of the host for each run of contiguous guest pages."""
    if memory > max_map_count * _PAGE:
        sys.stderr.write(
            f"apppot: warning: this kernel may hang once a program has touched "
            f"{max_map_count * _PAGE >> 20} MiB in random order: vm.max_map_count is "
            f"{max_map_count}\n  remedy: `apppot kernel build`, or less memory (--mem)\n"
        )
