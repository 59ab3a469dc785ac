"""qcow version 1, from the bytes: a reader, a checker and a maker, written from the structures of QEMU's `block/qcow.c` and not
from the driver."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

HEADER = struct.Struct(">4sIQIIQBBHIQ")


class Image:
    """An image, taken apart."""

    def __init__(self, path):
        self.path = Path(path)
        self.bytes = self.path.read_bytes()
        (magic, version, name_at, name_length, _, self.size, self.cluster_bits, self.l2_bits, _, self.crypt, self.l1) = (
            HEADER.unpack_from(self.bytes)
        )
        assert (magic, version) == (b"QFI\xfb", 1)
        self.name = self.bytes[name_at : name_at + name_length] if name_at else b""
        self.cluster, self.entries = 1 << self.cluster_bits, 1 << self.l2_bits
        self.l1_end = self.l1 + -(-self.size // (self.cluster * self.entries)) * 8
        self.tables = {}
        self.mapped = {}
        for index in range((self.l1_end - self.l1) // 8):
            (table,) = struct.unpack_from(">Q", self.bytes, self.l1 + index * 8)
            if table:
                self.tables[index] = table
                row = struct.unpack_from(f">{self.entries}Q", self.bytes, table)
                self.mapped |= {index * self.entries + at: entry for at, entry in enumerate(row) if entry}

    def place(self, entry):
        """Offset and length of what an entry names, and whether it is compressed."""
        if not entry >> 63:
            return entry, self.cluster, False
        shift = 63 - self.cluster_bits
        return entry & ((1 << shift) - 1), entry >> shift & (self.cluster - 1), True

    def data(self, entry):
        offset, length, packed = self.place(entry)
        data = self.bytes[offset : offset + length]
        if packed:
            data = zlib.decompressobj(-12).decompress(data)
            assert len(data) == self.cluster
        return data

    def content(self, below=b""):
        size = self.size // 512 * 512
        out = bytearray(below[:size].ljust(size, b"\0"))
        for number, entry in self.mapped.items():
            at = number * self.cluster
            out[at : at + self.cluster] = self.data(entry)
        return bytes(out[:size])

    def assert_consistent(self):
        """Everything lies in the file, and nothing but streams shares a byte with anything else."""
        used = [(0, 48 + len(self.name), False), (self.l1, self.l1_end, False)]
        used += [(table, table + self.entries * 8, False) for table in self.tables.values()]
        for entry in self.mapped.values():
            offset, length, packed = self.place(entry)
            assert packed or offset % self.cluster == 0
            used.append((offset, offset + length, packed))
        end, stream = 0, False
        for start, stop, packed in sorted(used):
            assert start >= end or (packed and stream), f"{start} lies before {end}"
            assert stop <= len(self.bytes), f"{stop} is past the end of the file"
            end, stream = max((end, stream), (stop, packed))


def content(*chain):
    """What a guest reads, the top-most image first."""
    data = b""
    for path in reversed(chain):
        data = Image(path).content(data)
    return data


def pack(data):
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def make(path, size, clusters, *, cluster_bits=12, l2_bits=9, backing="", packed=(), l1_at=None):
    """An image with these bytes in these clusters, in this order; those of `packed` are compressed."""
    cluster, entries, name = 1 << cluster_bits, 1 << l2_bits, backing.encode()
    l1 = l1_at or -(-(48 + len(name)) // 8) * 8
    out = bytearray(HEADER.pack(b"QFI\xfb", 1, 48 * bool(name), len(name), 0, size, cluster_bits, l2_bits, 0, 0, l1) + name)
    out = out.ljust(l1 + -(-size // (cluster * entries)) * 8, b"\0")
    tables = {}

    def align():
        out.extend(bytes(-len(out) % cluster))
        return len(out)

    for number, data in clusters.items():
        data = data.ljust(cluster, b"\0")
        if number // entries not in tables:
            tables[number // entries] = align()
            struct.pack_into(">Q", out, l1 + number // entries * 8, len(out))
            out.extend(bytes(entries * 8))
        stream = pack(data) if number in packed else data
        if len(stream) < cluster:
            entry = 1 << 63 | len(stream) << (63 - cluster_bits) | len(out)
        else:
            stream, entry = data, align()
        struct.pack_into(">Q", out, tables[number // entries] + number % entries * 8, entry)
        out.extend(stream)
    Path(path).write_bytes(out)
    return Path(path)
