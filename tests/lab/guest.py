"""A guest without AppPot, to know that a lab is what it says: real KVM, real Xen.

Debian's kernel, busybox, and the program that looks around from inside.
"""

from __future__ import annotations

from tests.lab.image import BUSYBOX, Parts, read_file
from tests.lab.initramfs import DIRECTORY, PROGRAM, cpio
from tests.lab.machine import EXCHANGE, Kind, Lab, LabError
from tests.scenarios import proof
from tests.scenarios.runner import build_proven

_MARK = "proof:"
_SECONDS = 900
_INIT = b"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/proven /bin/busybox true
echo "proof:$(/bin/busybox cat /proofs)"
/bin/busybox poweroff -f
"""
_WORDS = "quiet loglevel=0 panic=-1 mitigations=off"
_KVM = f"""
exec qemu-system-x86_64 -M q35,accel=kvm -cpu host -m 128 -nodefaults -display none -no-reboot \
    -serial stdio -kernel /boot/vmlinuz-* -initrd /lab/{EXCHANGE}/guest.cpio \
    -append "console=ttyS0 {_WORDS}"
"""
_XEN = f"""
cp /boot/vmlinuz-* /tmp/vmlinuz
cp /lab/{EXCHANGE}/guest.cpio /tmp
cat >/tmp/guest.cfg <<END
name = "guest"
type = "@TYPE@"
kernel = "/tmp/vmlinuz"
ramdisk = "/tmp/guest.cpio"
extra = "console=hvc0 {_WORDS}"
memory = 128
on_poweroff = "destroy"
on_crash = "destroy"
END
xl create -F /tmp/guest.cfg
cat /var/log/xen/console/guest-guest.log
"""


def check(lab: Lab, parts: Parts) -> str:
    """What a guest in the lab says of its hypervisor.  Raises LabError where that is another."""
    busybox = read_file(parts.disk, BUSYBOX)
    proven = build_proven(lab.place / "proven").read_bytes()
    entries = [(folder, DIRECTORY, b"") for folder in ("bin", "proc", "sys", "dev")]
    entries += [("bin/busybox", PROGRAM, busybox), ("proven", PROGRAM, proven)]
    archive = cpio([*entries, ("init", PROGRAM, _INIT)])
    (lab.exchange / "guest.cpio").write_bytes(archive)
    said = bytearray()
    xen_type = "pvh" if lab.kind is Kind.XEN_PVH else "pv"
    script = _KVM if lab.kind is Kind.KVM else _XEN.replace("@TYPE@", xen_type)
    lab.run(script, _SECONDS, said.extend)
    for line in said.decode(errors="replace").splitlines():
        if line.startswith(_MARK):
            (found,) = proof.parse(line.removeprefix(_MARK))
            if found.hypervisor() == lab.kind:
                return found.evidence()
    raise LabError(f"no guest on {lab.kind} in the lab:\n{said.decode(errors='replace')}")
