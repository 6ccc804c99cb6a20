"""Disks in the forms of other virtual machines, and an OVA: a machine that VirtualBox imports.

qemu-img converts.  What it draws by lot in a file (identifiers) is replaced, so that the same disk
gives the same file.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import uuid
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from apppot.host.common.errors import ImageError
from apppot.host.common.files import file_digest
from apppot.host.process import run

TIMEOUT = 6 * 3600.0
HINT = "apt-get install qemu-utils"
DATE = 1735689600
# VirtualBox's VDI, version 1.1: where the header has the image's and its last change's identifier.
VDI_IMAGE, VDI_CHANGE = 0x188, 0x198
MEMORY_MB = 1024
USTAR_LIMIT = 1 << 33
OVF = "http://schemas.dmtf.org/ovf/envelope/1"
CIM = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_"
STREAM_OPTIMIZED = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"


def convert(raw: str, form: str, target: str, identity: str, *options: str) -> None:
    """Write the disk `raw` as qcow2, vdi or vmdk.  `identity` is its GUID.  Raises ToolError."""
    argv = ["qemu-img", "convert", "-f", "raw", "-O", form]
    run.run([*argv, *options, raw, target], timeout=TIMEOUT, hint=HINT)
    if form == "vdi":
        _name_vdi(target, identity)
    elif form == "vmdk":
        _name_vmdk(target, identity)


def _name_vdi(path: str, identity: str) -> None:
    with open(path, "r+b") as file:
        for place, name in ((VDI_IMAGE, "image"), (VDI_CHANGE, "change")):
            file.seek(place)
            file.write(uuid.uuid5(uuid.UUID(identity), name).bytes_le)


def _name_vmdk(path: str, identity: str) -> None:
    """The content's number in the descriptor; it must not be the one that means "none"."""
    number = f"{int(identity[:8], 16) & 0xFFFFFFFE:08x}".encode()
    with open(path, "r+b") as file:
        head = file.read(1 << 16)
        at = head.find(b"\nCID=")
        if at < 0:
            raise ImageError("qemu-img wrote a VMDK without a descriptor", HINT)
        file.seek(at + 5)
        file.write(number)


def write(raw: str, target: str, work: str, name: str, identity: str) -> None:
    """Write an OVA with the disk `raw` to `target`, its parts to the folder `work`."""
    disk = f"{name}-disk1.vmdk"
    path = os.path.join(work, disk)
    options = ("-o", "subformat=streamOptimized")
    convert(raw, "vmdk", path, identity, *options)
    text = descriptor(name, disk, os.stat(raw).st_size, os.stat(path).st_size).encode()
    digest = file_digest(path)
    lines = [(f"{name}.ovf", hashlib.sha256(text).hexdigest()), (disk, digest)]
    manifest = "".join(f"SHA256({file})= {digest}\n" for file, digest in lines).encode()
    parts = {f"{name}.ovf": text, f"{name}.mf": manifest}
    for part, data in parts.items():
        Path(work, part).write_bytes(data)
    # The descriptor first, and in the oldest form that can tell the size: as the format wants it.
    large = os.stat(path).st_size >= USTAR_LIMIT
    form = tarfile.GNU_FORMAT if large else tarfile.USTAR_FORMAT
    with tarfile.open(target, "x", format=form) as archive:
        for part in (*parts, disk):
            archive.add(os.path.join(work, part), part, filter=_neutral)
    os.unlink(path)


def _neutral(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode, member.mtime = 0o644, DATE
    return member


def _item(number: int, kind: int, name: str, about: str, **fields: str | int) -> str:
    """One piece of hardware; the schema wants its fields in the order of their names.

    `kind` is CIM's number for it (DSP1043), `name` what people see.
    """
    fields.update(Caption=name, Description=about, ElementName=name)
    fields.update(InstanceID=number, ResourceType=kind)
    rows = [
        f"<rasd:{key}>{escape(str(value))}</rasd:{key}>" for key, value in sorted(fields.items())
    ]
    return "      <Item>\n" + "".join(f"        {row}\n" for row in rows) + "      </Item>\n"


def _hardware() -> str:
    """A PC as VirtualBox has them.  The numbers by which its parts refer to each other: 1 to 5."""
    memory = f"{MEMORY_MB} MB of memory"
    net = "Ethernet adapter on 'NAT'"
    return "".join(
        [
            _item(1, 3, "1 virtual CPU", "Number of virtual CPUs", VirtualQuantity=1),
            _item(
                *(2, 4, memory, "Memory Size"),
                AllocationUnits="MegaBytes",
                VirtualQuantity=MEMORY_MB,
            ),
            _item(
                *(3, 20, "sataController0", "SATA Controller"), Address=0, ResourceSubType="AHCI"
            ),
            _item(
                *(4, 10, net, net),
                AutomaticAllocation="true",
                Connection="NAT",
                ResourceSubType="E1000",
            ),
            _item(
                *(5, 17, "disk1", "Disk Image"),
                AddressOnParent=0,
                HostResource="/disk/vmdisk1",
                Parent=3,
            ),
        ]
    )


def descriptor(name: str, disk: str, capacity: int, length: int) -> str:
    """The OVF 1.0 description of a machine: AHCI, e1000, BIOS.

    `capacity` of the disk and `length` of the file `disk` are in bytes.  Nothing in it goes beyond
    the schema of OVF 1.0 (DSP8023), which allows no foreign attribute at a disk.
    """
    return f"""<?xml version="1.0"?>
<Envelope ovf:version="1.0" xml:lang="en-US" xmlns="{OVF}" xmlns:ovf="{OVF}"
 xmlns:rasd="{CIM}ResourceAllocationSettingData"
 xmlns:vssd="{CIM}VirtualSystemSettingData">
  <References>
    <File ovf:id="file1" ovf:href={quoteattr(disk)} ovf:size="{length}"/>
  </References>
  <DiskSection>
    <Info>List of the virtual disks used in the package</Info>
    <Disk ovf:capacity="{capacity}" ovf:diskId="vmdisk1" ovf:fileRef="file1"
     ovf:format="{STREAM_OPTIMIZED}"/>
  </DiskSection>
  <NetworkSection>
    <Info>Logical networks used in the package</Info>
    <Network ovf:name="NAT">
      <Description>Outbound connections only</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id={quoteattr(name)}>
    <Info>A virtual machine</Info>
    <OperatingSystemSection ovf:id="100">
      <Info>The kind of installed operating system</Info>
      <Description>Linux26_64</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware requirements for a virtual machine</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{escape(name)}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType>
      </System>
{_hardware()}    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""
