"""Makes and reads VHD images, from Microsoft's "Virtual Hard Disk Image Format Specification" 1.0: independent of instar, of
qemu-img and of every other reader. Numbers are big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
UNUSED = 0xFFFFFFFF
MIB = 1 << 20
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4


def checksum(data: bytes, at: int) -> int:
    """One's complement of the sum of all bytes but the four of the checksum at byte `at`."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def sealed(data: bytearray, at: int) -> bytes:
    struct.pack_into(">I", data, at, checksum(data, at))
    return bytes(data)


def footer(kind, size, identity, creator=b"win ", version=0xA0000, geometry=(1, 4, 17)) -> bytes:
    data = bytearray(SECTOR)
    offset = 0xFFFFFFFFFFFFFFFF if kind == FIXED else SECTOR
    struct.pack_into(">8sIIQI4sI4sQQHBBI", data, 0, b"conectix", 2, 0x10000, offset, 0, creator, version, b"Wi2k",
                     size, size, *geometry, kind)
    data[68:84] = identity
    return sealed(data, 64)


@dataclass
class Maker:
    """An image with whatever no tool can write."""

    kind: int
    size: int
    identity: bytes = b"\5" * 16
    parent: bytes = b"\4" * 16
    block: int = 2 * MIB
    #: Runs of sectors that the image holds: first sector, and the bytes.
    runs: list = field(default_factory=list)
    #: Code and bytes of the locators, and the name in the header.
    locators: list = field(default_factory=list)
    name: str = ""
    creator: bytes = b"win "
    version: int = 0xA0000
    geometry: tuple = (1, 4, 17)
    #: XenServer's batmap, which takes its creator and version 1.3.
    batmap: bool = False
    #: There is a footer at the end.
    tail: bool = True
    #: Sectors of what nobody uses before each block.
    gap: int = 0

    def write(self, path: Path) -> Path:
        if self.batmap:
            self.creator, self.version = b"tap\0", 0x10003
        end = footer(self.kind, self.size, self.identity, self.creator, self.version, self.geometry)
        if self.kind == FIXED:
            disk = bytearray(self.size)
            for first, data in self.runs:
                disk[first * SECTOR : first * SECTOR + len(data)] = data
            path.write_bytes(bytes(disk) + end)
            return path
        with path.open("wb") as file:
            self._write_sparse(file, end)
        return path

    def _write_sparse(self, file, end):
        blocks = -(-self.size // self.block)
        header = bytearray(1024)
        struct.pack_into(">8sQQIII", header, 0, b"cxsparse", 0xFFFFFFFFFFFFFFFF, 0, 0x10000, blocks, self.block)
        at = 1536
        if self.kind == DIFFERENCING:
            header[40:56] = self.parent
            name = self.name.encode("utf-16-be")
            header[64 : 64 + len(name)] = name
            for index, (code, data) in enumerate(self.locators):
                # Hyper-V gives the space in bytes, and 4096 of them.
                struct.pack_into(">4sIIIQ", header, 576 + 24 * index, code, 4096, len(data), 0, at)
                file.seek(at)
                file.write(data)
                at += -(-len(data) // SECTOR) * SECTOR
        struct.pack_into(">Q", header, 16, at)
        table, table_at = [UNUSED] * blocks, at
        at += -(-4 * blocks // SECTOR) * SECTOR
        map_bytes = max(1, -(-(self.size // self.block // 8) // SECTOR)) * SECTOR
        map_at = at + SECTOR
        if self.batmap:
            at = map_at + map_bytes
        held = {}
        for first, data in self.runs:
            for number in range(len(data) // SECTOR):
                sector = first + number
                held.setdefault(sector * SECTOR // self.block, {})[sector] = data[number * SECTOR : (number + 1) * SECTOR]
        bitmap_bytes = -(-self.block // SECTOR // 8 // SECTOR) * SECTOR
        batmap = bytearray(map_bytes)
        for block in sorted(held, reverse=True):
            at += self.gap * SECTOR
            table[block] = at // SECTOR
            bitmap = bytearray(bitmap_bytes)
            for sector, data in held[block].items():
                within = sector - block * self.block // SECTOR
                bitmap[within // 8] |= 0x80 >> within % 8
                file.seek(at + bitmap_bytes + within * SECTOR)
                file.write(data)
            file.seek(at)
            file.write(bitmap)
            if len(held[block]) == self.block // SECTOR:
                batmap[block // 8] |= 0x80 >> block % 8
            at += bitmap_bytes + self.block
        file.truncate(at)
        file.seek(0)
        file.write(end + sealed(header, 36))
        file.seek(table_at)
        file.write(struct.pack(f">{blocks}I", *table).ljust(-(-4 * blocks // SECTOR) * SECTOR, b"\xff"))
        if self.batmap:
            summary = bytearray(SECTOR)
            struct.pack_into(">8sQIII", summary, 0, b"tdbatmap", map_at, map_bytes // SECTOR, 0x10002,
                             ~sum(batmap) & 0xFFFFFFFF)
            file.seek(map_at - SECTOR)
            file.write(summary + batmap)
        if self.tail:
            file.seek(at)
            file.write(end)


class View:
    """What an image says, from its bytes."""

    def __init__(self, path):
        self.data = Path(path).read_bytes()
        ends = [self.data[:SECTOR], self.data[-SECTOR:]]
        valid = [end for end in ends if end[:8] == b"conectix" and checksum(end, 64) == self.number(end, 64)]
        assert valid, f"{path} has no footer"
        footer = valid[-1]
        self.footers, self.kind = len(valid), self.number(footer, 60)
        self.current_size = struct.unpack_from(">Q", footer, 48)[0]
        self.identity = footer[68:84]
        cylinders, heads, sectors = struct.unpack_from(">HBB", footer, 56)
        product = cylinders * heads * sectors
        by_geometry = footer[28:32] in (b"vpc ", b"qemu") and product != 65535 * 16 * 255
        self.size = product * SECTOR if by_geometry else self.current_size // SECTOR * SECTOR
        self.table = []
        if self.kind == FIXED:
            return
        assert self.footers == 1 or ends[0] == ends[1], f"the footers of {path} differ"
        at = struct.unpack_from(">Q", footer, 16)[0]
        self.header = self.data[at : at + 1024]
        assert self.header[:8] == b"cxsparse" and checksum(self.header, 36) == self.number(self.header, 36), path
        self.table_at = struct.unpack_from(">Q", self.header, 16)[0]
        self.block, self.parent = self.number(self.header, 32), self.header[40:56]
        blocks = -(-self.size // self.block)
        assert self.number(self.header, 28) >= blocks
        self.table = struct.unpack_from(f">{blocks}I", self.data, self.table_at)
        self.bitmap_bytes = -(-self.block // SECTOR // 8 // SECTOR) * SECTOR

    @staticmethod
    def number(data, at):
        return struct.unpack_from(">I", data, at)[0]

    def held(self) -> int:
        """How many blocks it has."""
        return sum(entry != UNUSED for entry in self.table)

    def sectors(self) -> set:
        """The sectors that its bitmaps say it holds."""
        found = set()
        for block, entry in enumerate(self.table):
            if entry != UNUSED:
                bitmap = self.data[entry * SECTOR : entry * SECTOR + self.bitmap_bytes]
                first = block * self.block // SECTOR
                found |= {first + n for n in range(self.block // SECTOR) if bitmap[n // 8] & 0x80 >> n % 8}
        return {sector for sector in found if sector < self.size // SECTOR}

    def content(self, below: bytes = b"") -> bytes:
        """What a guest reads over the bytes that are below."""
        if self.kind == FIXED:
            return self.data[: self.size]
        disk = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for block, entry in enumerate(self.table):
            if entry == UNUSED:
                continue
            bitmap_at = entry * SECTOR
            data_at = bitmap_at + self.bitmap_bytes
            sectors = min(self.block, self.size - block * self.block) // SECTOR
            bitmap = self.data[bitmap_at : bitmap_at + self.bitmap_bytes]
            if all(byte == 0xFF for byte in bitmap[: sectors // 8]) and sectors % 8 == 0:
                length = sectors * SECTOR
                disk[block * self.block : block * self.block + length] = self.data[data_at : data_at + length]
                continue
            for sector in range(sectors):
                if bitmap[sector // 8] & 0x80 >> sector % 8:
                    to = block * self.block + sector * SECTOR
                    at = data_at + sector * SECTOR
                    disk[to : to + SECTOR] = self.data[at : at + SECTOR]
        return bytes(disk)

    def assert_sound(self):
        """Every block in the file, behind the metadata, and none over another; both footers are there."""
        assert self.footers == 2 or self.kind == FIXED
        if self.kind == FIXED:
            return
        stride = self.bitmap_bytes + self.block
        used = [(0, SECTOR), (SECTOR, 1024), (self.table_at, 4 * len(self.table))]
        used += [(entry * SECTOR, stride) for entry in self.table if entry != UNUSED]
        for index in range(8):
            code, _, length, _, offset = struct.unpack_from(">4sIIIQ", self.header, 576 + 24 * index)
            used += [(offset, length)] if code != b"\0\0\0\0" else []
        used.sort()
        for (first, length), (second, _) in zip(used, used[1:], strict=False):
            assert first + length <= second, (first, length, second)
        assert used[-1][0] + used[-1][1] <= len(self.data) - SECTOR


def content(*chain) -> bytes:
    """What a guest reads of these images, the top-most first; the last may be raw bytes."""
    disk = chain[-1] if isinstance(chain[-1], bytes) else View(chain[-1]).content()
    for path in reversed(chain[:-1]):
        disk = View(path).content(disk)
    return disk
