"""The description in an OVA, and the places of a bootable disk's partitions."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from apppot.host.images.exporting import disk, ova

NAMES = {
    "": "http://schemas.dmtf.org/ovf/envelope/1",
    "rasd": ova.CIM + "ResourceAllocationSettingData",
    "vssd": ova.CIM + "VirtualSystemSettingData",
}
OVF = f"{{{NAMES['']}}}"
NAME = 'a<b>&"c"'


def envelope() -> ElementTree.Element:
    text = ova.descriptor(NAME, f"{NAME}.vmdk", 170 << 20, 99)
    return ElementTree.fromstring(text)


def local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def test_sections_are_in_the_order_of_the_schema() -> None:
    root = envelope()
    assert [local(part) for part in root] == [
        "References",
        "DiskSection",
        "NetworkSection",
        "VirtualSystem",
    ]
    system = root.find("VirtualSystem", NAMES)
    assert system is not None and system.get(f"{OVF}id") == NAME
    assert [local(part) for part in system] == [
        "Info",
        "OperatingSystemSection",
        "VirtualHardwareSection",
    ]
    for section in (*root[1:3], *system[1:]):
        assert local(section[0]) == "Info"


def test_nothing_goes_beyond_the_schema() -> None:
    root = envelope()
    (image,) = root.findall(".//Disk", NAMES)
    assert set(image.attrib) == {
        f"{OVF}{name}" for name in ("capacity", "diskId", "fileRef", "format")
    }
    (system,) = root.findall(".//OperatingSystemSection", NAMES)
    assert [local(part) for part in system] == ["Info", "Description"]
    assert all(
        part.tag.startswith(tuple(f"{{{uri}}}" for uri in NAMES.values())) for part in root.iter()
    )


def test_every_reference_leads_somewhere() -> None:
    root = envelope()
    (file,), (image,) = root.findall(".//File", NAMES), root.findall(".//Disk", NAMES)
    assert (file.get(f"{OVF}href"), file.get(f"{OVF}size")) == (f"{NAME}.vmdk", "99")
    assert image.get(f"{OVF}fileRef") == file.get(f"{OVF}id")
    assert image.get(f"{OVF}capacity") == str(170 << 20)
    items = root.findall(".//Item", NAMES)
    ids = [item.findtext("rasd:InstanceID", "", NAMES) for item in items]
    assert len(set(ids)) == len(ids)
    parents = [item.findtext("rasd:Parent", None, NAMES) for item in items]
    assert {parent for parent in parents if parent} <= set(ids)
    assert root.findtext(".//rasd:HostResource", "", NAMES) == f"/disk/{image.get(f'{OVF}diskId')}"
    networks = [network.get(f"{OVF}name") for network in root.findall(".//Network", NAMES)]
    assert [root.findtext(".//rasd:Connection", "", NAMES)] == networks


def test_a_piece_of_hardware_has_its_fields_in_order() -> None:
    for item in envelope().findall(".//Item", NAMES):
        fields = [local(field) for field in item]
        assert fields == sorted(fields)
        assert {"ElementName", "InstanceID", "ResourceType"} <= set(fields)


def test_partitions_follow_each_other_on_whole_mebibytes() -> None:
    contents = [
        ("a", disk.BIOS, disk.Content()),
        ("b", disk.ESP, disk.Content("x", 0, disk.MIB)),
        ("c", disk.LINUX, disk.Content("x", 0, disk.MIB + 1)),
        ("d", disk.LINUX, disk.Content("x", 5, 1)),
    ]
    table = disk.place(contents, "identity")
    mib = disk.MIB // disk.SECTOR
    assert [(part.start // mib, part.sectors // mib) for part in table] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (5, 1),
    ]
    assert table == disk.place(contents, "identity")
    others = disk.place(contents, "another")
    ids = {part.id for part in (*table, *others)}
    assert len(ids) == 8
