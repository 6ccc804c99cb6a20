"""The hypervisor lab: a Debian system in QEMU with emulated processors that offer virtualisation.

In it the scenario suite runs on real KVM, and, booted under the Xen hypervisor, on real Xen, on any
machine and without privileges.
"""
