"""Differencing VHD and VHDX images for the benchmark, which no tool writes: what `qemu-io` has written as a guest does, into
images without a parent, becomes a child, by its header, its table and the bits of the sectors that were written.

Sources: the VHD specification 1.0; [MS-VHDX] 8.0. The sizes and places are those of images that `qemu-img create` makes.
"""

import os
import struct
import sys
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import vhd_bytes  # noqa: E402
import vhdx_bytes  # noqa: E402

MIB = 1 << 20
#: Nothing, in a table of a VHD.
UNUSED = 0xFFFFFFFF


class Image:
    """A file that is read and changed in place."""

    def __init__(self, path):
        self.file = open(path, "r+b")  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def get(self, at, length):
        """Bytes at an offset."""
        self.file.seek(at)
        return self.file.read(length)

    def put(self, at, data):
        """Put bytes at an offset."""
        self.file.seek(at)
        self.file.write(data)


class Vhd(Image):
    """A dynamic VHD."""

    def __init__(self, path):
        super().__init__(path)
        self.table, count, self.block = struct.unpack(">16xQ4xII", self.get(512, 36))
        self.entries = struct.unpack(f">{count}I", self.get(self.table, 4 * count))
        self.bitmap = -(-self.block // 512 // 8 // 512) * 512

    def blocks(self):
        """Guest offset, and byte offset in the file of each block's data."""
        return [(number * self.block, entry * 512 + self.bitmap) for number, entry in enumerate(self.entries) if entry != UNUSED]

    def adopt(self, parent, written):
        """Become a child of the image at a path; `written` are byte ranges of the disk."""
        with Vhd(parent) as below:
            identity = below.get(0, 512)[68:84]
        footer = bytearray(self.get(0, 512))
        # The type, and another identity than the parent's.
        footer[60:64], footer[68:84] = struct.pack(">I", 4), bytes(range(16))
        footer = vhd_bytes.sealed(footer, 64)
        header = bytearray(self.get(512, 1024))
        header[40:56] = identity
        name = parent.name.encode("utf-16-be")
        header[64 : 64 + len(name)] = name
        self.put(0, footer + vhd_bytes.sealed(header, 36))
        self.put(os.fstat(self.file.fileno()).st_size - 512, footer)
        bits = sectors(written, self.block)
        for guest, at in self.blocks():
            self.put(at - self.bitmap, bits.get(guest // self.block, b"").ljust(self.bitmap, b"\0"))


class Vhdx(Image):
    """A dynamic VHDX with sectors of 512 bytes."""

    def __init__(self, path):
        super().__init__(path)
        heads = [self.get(at, 4096) for at in vhdx_bytes.HEADERS]
        valid = [head for head in heads if head[4:8] == struct.pack("<I", vhdx_bytes.checksum(head))]
        self.data_write = max(valid, key=lambda head: struct.unpack_from("<Q", head, 8))[32:48]
        table = self.get(vhdx_bytes.TABLES[0], 64 << 10)
        regions = {table[at : at + 16]: struct.unpack_from("<Q", table, at + 16)[0] for at in range(16, 80, 32)}
        self.table, self.metadata = regions[vhdx_bytes.BAT], regions[vhdx_bytes.METADATA]
        self.block, = struct.unpack("<I", self.get(self.item(vhdx_bytes.PARAMETERS), 4))
        size, = struct.unpack("<Q", self.get(self.item(vhdx_bytes.SIZE), 8))
        self.ratio, self.count = (1 << 32) // self.block, -(-size // self.block)
        # A bitmap's entry follows the entries of a chunk of blocks.
        length = -(-self.count // self.ratio) * (self.ratio + 1)
        self.entries = list(struct.unpack(f"<{length}Q", self.get(self.table, 8 * length)))

    def item(self, name):
        """Where an item of metadata lies."""
        table = self.get(self.metadata, 64 << 10)
        count, = struct.unpack_from("<H", table, 10)
        places = {table[at : at + 16]: struct.unpack_from("<I", table, at + 16)[0] for at in range(32, 32 + 32 * count, 32)}
        return self.metadata + places[name]

    def slots(self):
        """The number of each block that is there, and the index of its entry."""
        for number in range(self.count):
            index = number + number // self.ratio
            if self.entries[index] & 7 in (6, 7):
                yield number, index

    def blocks(self):
        """Guest offset, and byte offset in the file of each block's data."""
        return [(number * self.block, self.entries[index] >> 20 << 20) for number, index in self.slots()]

    def adopt(self, parent, written):
        """Become a child of the image at a path; `written` are byte ranges of the disk."""
        with Vhdx(parent) as below:
            identity = below.data_write
        pairs = [("parent_linkage", vhdx_bytes.braces(identity)), ("relative_path", f".\\{parent.name}"),
                 ("parent_linkage2", vhdx_bytes.braces(vhdx_bytes.NULL))]
        locator = vhdx_bytes.locator(pairs)
        count, = struct.unpack("<H", self.get(self.metadata + 10, 2))
        # Behind everything that is in the region: its items lie at 64 KiB.
        place = (64 + 16) << 10
        self.put(self.metadata + place, locator)
        self.put(self.metadata + 32 + 32 * count, struct.pack("<16sIII4x", vhdx_bytes.LOCATOR, place, len(locator), 4))
        self.put(self.metadata + 10, struct.pack("<H", count + 1))
        self.put(self.item(vhdx_bytes.PARAMETERS) + 4, struct.pack("<I", vhdx_bytes.DIFFERENCING))
        bits = sectors(written, self.block)
        end = -(-os.fstat(self.file.fileno()).st_size // MIB) * MIB
        bitmaps = {}
        for number, index in list(self.slots()):
            chunk, within = divmod(number, self.ratio)
            data = bits.get(number, b"")
            if data == b"\xff" * (self.block // 512 // 8):
                continue
            if chunk not in bitmaps:
                bitmaps[chunk], end = end, end + MIB
                self.file.truncate(end)
                self.entries[chunk * (self.ratio + 1) + self.ratio] = bitmaps[chunk] | 6
            self.put(bitmaps[chunk] + within * (self.block // 512 // 8), data)
            self.entries[index] += 1
        self.put(self.table, struct.pack(f"<{len(self.entries)}Q", *self.entries))


FORMATS = {"vpc": Vhd, "vhdx": Vhdx}


def sectors(written, block):
    """The bits of the sectors that were written, as bytes, by number of the block."""
    bits = {}
    for at, length in written:
        # Whole bytes of bits, which are the same in either order.
        assert at % 4096 == length % 4096 == 0
        end = at + length
        while at < end:
            count = min(end - at, block - at % block)
            first, last = at % block // 4096, (at % block + count) // 4096
            data = bits.setdefault(at // block, bytearray(block // 512 // 8))
            data[first:last] = b"\xff" * (last - first)
            at += count
    return {number: bytes(data) for number, data in bits.items()}


def adopt(kind, child, parent, written):
    """Make an image a child of another one."""
    with FORMATS[kind](child) as image:
        image.adopt(Path(parent), written)


def data(kind, path, written):
    """Where what was written lies: guest offset, file offset, length, in the order of the disk."""
    with FORMATS[kind](path) as image:
        blocks, block = dict(image.blocks()), image.block
    found = []
    for at, length in sorted(written):
        end = at + length
        while at < end:
            count = min(end - at, block - at % block)
            place = blocks[at - at % block] + at % block
            if found and (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]) == (at, place):
                found[-1] = (*found[-1][:2], found[-1][2] + count)
            else:
                found.append((at, place, count))
            at += count
    return found
