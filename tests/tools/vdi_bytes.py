"""VDI images made and read from their bytes, after VirtualBox's VDICore.h: independent of instar and of qemu-img.

`make` writes what no tool here does: differencing images with zero blocks, gaps, other sizes of blocks, extra bytes.
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

MIB = 1 << 20
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
DYNAMIC, STATIC, UNDO, DIFFERENCING = 1, 2, 3, 4
NULL = bytes(16)


class Image:
    """What a file says."""

    def __init__(self, path):
        self.path = Path(path)
        self.bytes = self.path.read_bytes()
        signature, version, self.header_size, self.type, self.flags = struct.unpack_from("<5I", self.bytes, 64)
        assert (signature, version) == (0xBEDA107F, 0x10001), f"{path} is no VDI 1.1"
        self.map, self.data = struct.unpack_from("<2I", self.bytes, 340)
        self.unused, self.size, self.block, self.extra, self.blocks, self.allocated = struct.unpack_from("<IQ4I", self.bytes, 364)
        self.create, self.modify, self.link, self.parent_modify = (self.bytes[at : at + 16] for at in range(392, 456, 16))
        self.entries = struct.unpack_from(f"<{self.blocks}I", self.bytes, self.map)

    @property
    def slots(self):
        return [entry for entry in self.entries if entry < ZERO]

    @property
    def held(self):
        return sum(entry != FREE for entry in self.entries)

    @property
    def name(self):
        """What VirtualBox calls the file of a snapshot."""
        return name_of(self.create)

    def content(self, below=b""):
        """What a guest reads over these bytes."""
        disk = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for number, entry in enumerate(self.entries):
            start = number * self.block
            length = min(self.block, self.size - start)
            if entry == FREE or length <= 0:
                continue
            at = self.data + entry * (self.block + self.extra) + self.extra
            held = b"" if entry == ZERO else self.bytes[at : at + length]
            disk[start : start + length] = held.ljust(length, b"\0")
        return bytes(disk)

    def goes_with(self, parent):
        """What VirtualBox's registry and FATtools compare."""
        return (self.link, self.parent_modify) == (parent.create, parent.modify)

    def assert_tidy(self):
        """What VirtualBox's `vdiValidateHeader` and `vdiImageBackResolvTblCreate` ask for, and what every writer relies on."""
        slots = self.slots
        assert sorted(slots) == list(range(self.allocated)), f"{self.path}: slots {sorted(slots)[:9]}… of {self.allocated}"
        assert self.allocated <= self.blocks and self.block * self.blocks >= self.size > 0
        assert self.create != NULL and self.modify != NULL
        assert self.header_size >= 384 and self.map >= 72 + 384 and self.data >= self.map + 4 * self.blocks
        assert self.block & (self.block - 1) == 0 and not self.unused >> 31
        assert len(self.bytes) >= self.data + self.allocated * (self.block + self.extra), f"{self.path} is cut short"


def name_of(identifier):
    return f"{{{uuid.UUID(bytes_le=identifier)}}}.vdi"


def content(*paths):
    """What a guest reads of a chain, the top-most image first."""
    below = b""
    for path in reversed(paths):
        below = Image(path).content(below)
    return below


def make(path, size, blocks=None, *, parent=None, kind=None, block=MIB, align=MIB, extra=0, gaps=(), room=0, header=400):
    """A new image. `blocks`: number to bytes (at most a block's), or `None` for zeroes; slots in this order, without `gaps`.
    `parent`: the path of an image."""
    count = -(-size // block)
    entries, pieces, slot = [FREE] * count, {}, 0
    for number, data in (blocks or {}).items():
        if data is None:
            entries[number] = ZERO
            continue
        while slot in gaps:
            slot += 1
        entries[number] = slot
        pieces[slot] = data
        slot += 1
    slots = max([slot, *(gap + 1 for gap in gaps)])
    up = lambda number: -(-number // align) * align  # noqa: E731
    at_map = up(72 + header)
    at_data = up(at_map + 4 * max(count, room))
    link = Image(parent) if parent else None
    kind = kind or (DIFFERENCING if parent else DYNAMIC)
    first = struct.pack("<64s5I256s2I3I2I", b"<<< made by a test >>>\n", 0xBEDA107F, 0x10001, header, kind, 0, b"", at_map, at_data,
                        0, 0, 0, 512, 0)
    first += struct.pack("<Q4I", size, block, extra, count, slots)
    first += uuid.uuid4().bytes_le + uuid.uuid4().bytes_le + (link.create + link.modify if link else NULL * 2)
    if header >= 400:
        first += struct.pack("<4I", 0, 0, 0, 512)
    with open(path, "wb") as file:
        file.write(first)
        file.seek(at_map)
        file.write(struct.pack(f"<{count}I", *entries))
        file.truncate(at_data + slots * (block + extra))
        for number, data in pieces.items():
            file.seek(at_data + number * (block + extra))
            file.write(b"\xee" * extra + data)
        for gap in gaps:
            file.seek(at_data + gap * (block + extra))
            file.write(b"\xdd" * (block + extra))
    return Path(path)
