"""The hypervisor lab: what is decided before anything boots, and what is said afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab import image, initramfs, machine
from tests.lab.image import Parts
from tests.lab.machine import Kind
from tests.lab.report import Column, table
from tests.scenarios.runner import Result

PARTS = Parts(Path("/disk"), Path("/vmlinuz"), Path("/xen"), Path("/initramfs"), "digest")


def test_modules_come_after_what_they_need() -> None:
    text = "k/b.ko: k/a.ko\nk/a.ko:\nk/c-d.ko.xz: k/b.ko k/a.ko\nk/other.ko:\n"
    assert image.load_order(text, ("c_d", "a")) == ["k/a.ko", "k/b.ko", "k/c-d.ko.xz"]


def test_an_initramfs() -> None:
    archive = initramfs.cpio([("init", initramfs.PROGRAM, b"#!/bin/sh\n")])
    assert archive[:6] == b"070701"
    assert len(archive) % 4 == 0
    # Header of 110 bytes, name with its end, padded to 4.
    assert archive[110:116] == b"init\0\0"
    assert archive[116:126] == b"#!/bin/sh\n"
    assert archive.rstrip(b"\0").endswith(b"TRAILER!!!")


def test_only_the_exchange_can_be_written_to() -> None:
    shares = {"tree": Path("/tree"), "exchange": Path("/exchange")}
    words = machine.argv(Kind.KVM, PARTS, Path("/place"), shares)
    tree, exchange = (word for word in words if "mount_tag=" in word)
    assert "path=/tree" in tree and tree.endswith(",readonly=on")
    assert "path=/exchange" in exchange and "readonly" not in exchange


@pytest.mark.parametrize("kind", list(Kind))
def test_processors_are_emulated_and_can_virtualise(kind: Kind) -> None:
    words = machine.argv(kind, PARTS, Path("/place"), {})
    assert words[words.index("-accel") + 1].startswith("tcg")
    assert {"+svm", "+npt"} <= set(words[words.index("-cpu") + 1].split(","))


def test_both_types_of_xens_guests_share_a_lab() -> None:
    kvm, pv, pvh = (machine.argv(kind, PARTS, Path("/place"), {}) for kind in Kind)
    assert kvm != pv == pvh
    assert Kind.XEN_PVH.boots == Kind.XEN.boots == "xen"


def test_xen_boots_the_kernel_as_its_first_module() -> None:
    words = machine.argv(Kind.XEN, PARTS, Path("/place"), {})
    assert words[words.index("-kernel") + 1] == "/xen"
    kernel, initramfs_file = words[words.index("-initrd") + 1].split(",")
    assert kernel.startswith("/vmlinuz console=hvc0")
    assert initramfs_file == "/initramfs"


def column(hypervisor: str, *problems: str, failure: str = "") -> Column:
    results = tuple(Result(f"scenario {n}", 1.5, text, "seen") for n, text in enumerate(problems))
    return Column(hypervisor, "a guest", failure, results, 12.0)


def test_a_table() -> None:
    text = table([column("kvm", "", "it\ndiffers"), column("xen", failure="not built yet")])
    assert text.splitlines() == [
        "                        kvm              xen",
        "scenario 0   pass     1.5 s                -",
        "scenario 1   FAIL     1.5 s                -",
        "",
        "kvm: 1 of 2 scenarios as they must be (12 s)",
        "  a guest without AppPot: a guest",
        "  seen from inside: seen",
        "  scenario 1:",
        "    | it",
        "    | differs",
        "",
        "xen: not built yet (12 s)",
        "  a guest without AppPot: a guest",
    ]


def test_what_has_passed() -> None:
    assert column("kvm", "", "").passed()
    assert not column("kvm", "", "differs").passed()
    assert not column("xen", failure="not built yet").passed()
    assert not column("xen").passed()
    assert not column("xen", "", failure="left behind: a domain").passed()
