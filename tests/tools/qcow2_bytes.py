"""A small qcow2 reader and spoiler that shares no code with the product.

It knows just enough of the format to find an entry and to put a wrong one in its place.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

MAGIC = b"QFI\xfb"
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET = 0x00FF_FFFF_FFFF_FE00

#: name -> (offset, struct format) of the header's fields
FIELDS = {
    "magic": (0, ">4s"),
    "version": (4, ">I"),
    "backing_offset": (8, ">Q"),
    "backing_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
}


class Bitmap(NamedTuple):
    """An entry of the bitmap directory."""

    at: int
    table: int
    entries: int
    flags: int
    granularity: int


class Image:
    """One qcow2 file, read and changed in place."""

    def __init__(self, path):
        self.path = Path(os.fsdecode(os.fspath(path)))
        assert self.get("magic") == MAGIC, f"{self.path} is not qcow2"

    def peek(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def poke(self, offset: int, data: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def peek64(self, offset: int) -> int:
        return struct.unpack(">Q", self.peek(offset, 8))[0]

    def poke64(self, offset: int, value: int) -> None:
        self.poke(offset, struct.pack(">Q", value))

    def get(self, field: str):
        offset, form = FIELDS[field]
        return struct.unpack(form, self.peek(offset, struct.calcsize(form)))[0]

    def set(self, field: str, value) -> None:
        offset, form = FIELDS[field]
        self.poke(offset, struct.pack(form, value))

    @property
    def file_size(self) -> int:
        return self.path.stat().st_size

    @property
    def cluster_size(self) -> int:
        return 1 << self.get("cluster_bits")

    @property
    def end(self) -> int:
        """A cluster-aligned offset beyond the end of the file."""
        return (self.file_size // self.cluster_size + 1000) * self.cluster_size

    @property
    def subclusters(self) -> bool:
        return self.get("version") > 2 and bool(self.get("incompatible") & 16)

    @property
    def refcount_bits(self) -> int:
        return 16 if self.get("version") == 2 else 1 << self.get("refcount_order")

    def l1_at(self, index: int = 0) -> int:
        """Where an L1 entry is in the file."""
        return self.get("l1_offset") + 8 * index

    def l2_at(self, index: int = 0, l1_index: int = 0) -> int:
        """Where an L2 entry is in the file."""
        table = self.peek64(self.l1_at(l1_index)) & OFFSET
        assert table, f"{self.path} has no L2 table {l1_index}"
        return table + (16 if self.subclusters else 8) * index

    def l1(self) -> list[int]:
        data = self.peek(self.get("l1_offset"), 8 * self.get("l1_size"))
        return [value for (value,) in struct.iter_unpack(">Q", data)]

    def mapped(self):
        """(guest cluster, entry) of each L2 entry that is not 0; of extended ones, the bitmap counts."""
        width = 16 if self.subclusters else 8
        entries = self.cluster_size // width
        for index, l1_entry in enumerate(self.l1()):
            if not l1_entry & OFFSET:
                continue
            table = self.peek(l1_entry & OFFSET, self.cluster_size)
            if not table.strip(b"\0"):
                continue
            for slot in range(entries):
                value = int.from_bytes(table[slot * width : (slot + 1) * width], "big")
                if value:
                    yield index * entries + slot, value

    def data_clusters(self) -> list[int]:
        """Guest clusters with data of their own, in order."""
        return [cluster for cluster, entry in self.mapped() if entry & OFFSET and not entry & ZERO]

    def refcount_at(self, host_offset: int) -> tuple[int, int]:
        """(byte offset, bit in that byte) of the refcount of a host cluster."""
        bits = self.refcount_bits
        per_block = self.cluster_size * 8 // bits
        cluster = host_offset // self.cluster_size
        table_entry = self.get("refcount_table_offset") + 8 * (cluster // per_block)
        block = self.peek64(table_entry) & ~511
        assert block, f"no refcount block for {host_offset:#x}"
        position = cluster % per_block * bits
        return block + position // 8, position % 8

    def set_refcount(self, host_offset: int, value: int) -> None:
        offset, bit = self.refcount_at(host_offset)
        bits = self.refcount_bits
        if bits >= 8:
            self.poke(offset, value.to_bytes(bits // 8, "big"))
            return
        byte = self.peek(offset, 1)[0]
        mask = ((1 << bits) - 1) << bit
        self.poke(offset, bytes([byte & ~mask | value << bit]))

    def refcount(self, host_offset: int) -> int:
        offset, bit = self.refcount_at(host_offset)
        bits = self.refcount_bits
        if bits >= 8:
            return int.from_bytes(self.peek(offset, bits // 8), "big")
        return self.peek(offset, 1)[0] >> bit & ((1 << bits) - 1)

    @property
    def dirty(self) -> bool:
        return self.get("version") > 2 and bool(self.get("incompatible") & 1)

    def spoil_refcounts(self, rng) -> None:
        """Sets the dirty bit, and anything for refcounts and COPIED flags."""
        self.set("incompatible", self.get("incompatible") | 1)
        size, bits = self.cluster_size, self.refcount_bits
        largest = (1 << bits) - 1
        per_block = size * 8 // bits
        table = self.peek(self.get("refcount_table_offset"), self.get("refcount_table_clusters") * size)
        for index, (block,) in enumerate(struct.iter_unpack(">Q", table)):
            if block:
                end = min(self.file_size // size + 3, (index + 1) * per_block)
                for cluster in range(index * per_block, end):
                    if rng.random() < 0.5:
                        self.set_refcount(cluster * size, rng.choice([0, 0, 1, min(2, largest), largest]))
        for index, entry in enumerate(self.l1()):
            if entry & OFFSET:
                self._flip(rng, self.l1_at(index), entry)
        width = 16 if self.subclusters else 8
        for cluster, entry in list(self.mapped()):
            entry >>= 64 if self.subclusters else 0
            per_table = size // width
            if entry & OFFSET and not entry & COMPRESSED:
                self._flip(rng, self.l2_at(cluster % per_table, cluster // per_table), entry)

    def _flip(self, rng, at, entry):
        if rng.random() < 0.3:
            self.poke64(at, entry ^ COPIED)

    def extension(self, kind: int) -> int | None:
        """Where the data of a header extension begins."""
        at = self.get("header_length")
        while found := struct.unpack(">I", self.peek(at, 4))[0]:
            if found == kind:
                return at + 8
            at += 8 + -(-struct.unpack(">I", self.peek(at + 4, 4))[0] // 8) * 8
        return None

    def bitmaps(self) -> dict[str, Bitmap]:
        """The entries of the bitmap directory by name, whether or not the autoclear bit is set."""
        extension = self.extension(0x23852875)
        if extension is None:
            return {}
        count, at = struct.unpack(">I", self.peek(extension, 4))[0], self.peek64(extension + 16)
        found = {}
        for _ in range(count):
            table, entries, flags, _, bits, name, extra = struct.unpack(">QIIBBHI", self.peek(at, 24))
            text = self.peek(at + 24 + extra, name).decode()
            found[text] = Bitmap(at, table, entries, flags, 1 << bits)
            at += -(-(24 + extra + name) // 8) * 8
        return found

    def bitmap_bytes(self, bitmap: Bitmap) -> list[bytes | int]:
        """Each cluster of a bitmap's data; 0 or 1 where there is none."""
        entries = [self.peek64(bitmap.table + 8 * index) for index in range(bitmap.entries)]
        return [self.peek(entry, self.cluster_size) if entry > 1 else entry for entry in entries]

    def backing(self) -> bytes:
        return self.peek(self.get("backing_offset"), self.get("backing_size"))

    def set_backing(self, name: bytes) -> None:
        """Another backing name, in the first cluster where the old one stood."""
        offset = self.get("backing_offset")
        assert offset and offset + len(name) <= self.cluster_size
        self.poke(offset, name)
        self.set("backing_size", len(name))
