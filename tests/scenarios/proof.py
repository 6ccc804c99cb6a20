"""Which hypervisor a guest ran on, as `proven` (proven.c) noted it from inside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proof:
    """One guest's evidence: kernel release, processor's vendor, CPUID signatures, what sysfs says.

    `prefixed` is the answer to CPUID with Xen's prefix; "" where that is an illegal instruction.
    `guest_type` is PV or PVH, on Xen.
    """

    release: str
    vendor: str
    signature: str
    prefixed: str
    sysfs: str
    guest_type: str

    def hypervisor(self) -> str:
        """The hypervisor that this can only be, as the suite calls it."""
        if self.vendor == "User Mode Linux":
            return "uml"
        if self.sysfs == "xen" and "XenVMMXenVMM" in (self.signature, self.prefixed):
            return {"PV": "xen", "PVH": "xen-pvh"}.get(self.guest_type, "another type of Xen's")
        known = {"KVMKVMKVM": "kvm", "TCGTCGTCGTCG": "qemu"}
        return known.get(self.signature, f"unknown ({self.signature or 'no signature'})")

    def evidence(self) -> str:
        """The words for a table."""
        first = self.vendor if self.hypervisor() == "uml" else self.signature or self.prefixed
        if self.guest_type:
            first = f"/sys/hypervisor: {self.sysfs} {self.guest_type}, XenVMMXenVMM"
        return f"{first}, Linux {self.release}"


def parse(text: str) -> list[Proof]:
    """The proofs in a file that `proven` wrote, one of each guest that it ran in."""
    return [Proof(*line.split("\t")) for line in text.splitlines()]
