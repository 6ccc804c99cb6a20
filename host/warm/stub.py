"""A kernel for a machine that does not boot: QEMU insists on one, and reads all of it.

An ELF file as QEMU's direct boot (PVH) wants it, with one page of nothing.  Nothing of it reaches
a machine that goes on: its memory comes from elsewhere.
"""

from __future__ import annotations

import struct

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III4sQ")
_IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little endian, version 1
_EXEC, _X86_64 = 2, 62
_LOAD, _NOTE_TYPE, _ALL = 1, 4, 7
_PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY
_ADDRESS = 1 << 20


def kernel() -> bytes:
    """The file's contents."""
    note_at = _EHDR.size + 2 * _PHDR.size
    note = _NOTE.pack(4, 8, _PHYS32_ENTRY, b"Xen\0", _ADDRESS)
    header = _EHDR.pack(
        *(_IDENT, _EXEC, _X86_64, 1, _ADDRESS, _EHDR.size, 0, 0),
        *(_EHDR.size, _PHDR.size, 2, 0, 0, 0),
    )
    parts = [
        header,
        _PHDR.pack(_LOAD, _ALL, note_at, _ADDRESS, _ADDRESS, len(note), len(note), 4096),
        _PHDR.pack(_NOTE_TYPE, _ALL, note_at, _ADDRESS, _ADDRESS, len(note), len(note), 4),
        note,
    ]
    return b"".join(parts)
