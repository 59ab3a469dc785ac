#!/usr/bin/env python3
"""What the demo needs to know of qcow2, without qemu: write guest data into an image, hash what a chain reads.

    demo_fill.py write IMAGE SEED OFFSET LENGTH [OFFSET LENGTH ...]
    demo_fill.py hash IMAGE

`write` fills the ranges (multiples of the cluster size) with bytes made from SEED, in new clusters at the end of the
file. It is for images as `instar create` makes them: 16-bit refcounts, no features.
"""

import hashlib
import os
import struct
import sys

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
READS_ZERO = 1


class Image:
    """One layer of a chain."""

    def __init__(self, path, writable=False):
        self.path = path
        self.file = open(path, "r+b" if writable else "rb")
        header = self.read(0, 104)
        (magic, self.version, name_at, name_length, cluster_bits, self.size, encryption, l1_entries, self.l1,
         self.refcount_table, table_clusters, snapshots) = struct.unpack(">4sIQIIQIIQQII", header[:64])
        if magic != b"QFI\xfb":
            raise SystemExit(f"{path}: not a qcow2 image")
        incompatible, order = 0, 4
        if self.version >= 3:
            incompatible, = struct.unpack(">Q", header[72:80])
            order, = struct.unpack(">I", header[96:100])
        if encryption or snapshots or incompatible or order != 4:
            raise SystemExit(f"{path}: more than the demo understands")
        self.cluster = 1 << cluster_bits
        self.per_table = self.cluster // 8
        self.l1_entries = l1_entries
        self.table_entries = table_clusters * self.cluster // 8
        self.backing = None
        if name_at:
            name = os.path.join(os.path.dirname(path), os.fsdecode(self.read(name_at, name_length)))
            self.backing = Image(name)

    def read(self, at, length):
        self.file.seek(at)
        return self.file.read(length).ljust(length, b"\0")

    def entry(self, at):
        return struct.unpack(">Q", self.read(at, 8))[0]

    def put(self, at, data):
        self.file.seek(at)
        self.file.write(data)

    def allocate(self):
        """A new cluster at the end of the file, with refcount 1."""
        at = -(-os.fstat(self.file.fileno()).st_size // self.cluster) * self.cluster
        self.file.truncate(at + self.cluster)
        self.take(at)
        return at

    def take(self, at):
        """Refcount 1 for the cluster at this offset; a new refcount block describes itself if it can."""
        per_block = self.cluster // 2
        index, within = divmod(at // self.cluster, per_block)
        if index >= self.table_entries:
            raise SystemExit(f"{self.path}: too large for the demo")
        entry_at = self.refcount_table + 8 * index
        block = self.entry(entry_at) & OFFSET_MASK
        if not block:
            block = -(-os.fstat(self.file.fileno()).st_size // self.cluster) * self.cluster
            self.file.truncate(block + self.cluster)
            self.put(entry_at, struct.pack(">Q", block))
            self.take(block)
        self.put(block + 2 * within, struct.pack(">H", 1))

    def write(self, offset, data):
        """Write whole clusters of guest data into new clusters."""
        for at in range(0, len(data), self.cluster):
            l1_index, l2_index = divmod((offset + at) // self.cluster, self.per_table)
            if l1_index >= self.l1_entries:
                raise SystemExit(f"{self.path}: past the end of the disk")
            l2 = self.entry(self.l1 + 8 * l1_index) & OFFSET_MASK
            if not l2:
                l2 = self.allocate()
                self.put(self.l1 + 8 * l1_index, struct.pack(">Q", l2 | COPIED))
            host = self.allocate()
            self.put(host, data[at:at + self.cluster])
            self.put(l2 + 8 * l2_index, struct.pack(">Q", host | COPIED))

    def find(self, offset):
        """The host offset of a guest cluster, READS_ZERO, or None where the backing is read."""
        l1_index, l2_index = divmod(offset // self.cluster, self.per_table)
        l2 = self.entry(self.l1 + 8 * l1_index) & OFFSET_MASK if l1_index < self.l1_entries else 0
        entry = self.entry(l2 + 8 * l2_index) if l2 else 0
        if entry & (1 << 62):
            raise SystemExit(f"{self.path}: compressed clusters are more than the demo understands")
        if self.version >= 3 and entry & 1:
            return READS_ZERO
        return entry & OFFSET_MASK or None

    def guest_bytes(self, offset, length):
        """What a virtual machine would read."""
        parts = []
        end = offset + length
        while offset < end:
            count = min(end - offset, self.cluster - offset % self.cluster)
            host = self.find(offset) if offset < self.size else READS_ZERO
            if host == READS_ZERO:
                parts.append(bytes(count))
            elif host:
                parts.append(self.read(host + offset % self.cluster, count))
            elif self.backing:
                parts.append(self.backing.guest_bytes(offset, count))
            else:
                parts.append(bytes(count))
            offset += count
        return b"".join(parts)


def pattern(seed, length):
    """Bytes that nobody mistakes for others."""
    return hashlib.shake_256(seed.encode()).digest(length)


def main(arguments):
    if len(arguments) >= 5 and len(arguments) % 2 and arguments[0] == "write":
        image = Image(arguments[1], writable=True)
        for number in range(3, len(arguments), 2):
            offset, length = int(arguments[number]), int(arguments[number + 1])
            if offset % image.cluster or length % image.cluster:
                raise SystemExit("ranges are multiples of the cluster size")
            image.write(offset, pattern(f"{arguments[2]} {offset}", length))
        image.file.close()
    elif len(arguments) == 2 and arguments[0] == "hash":
        image = Image(arguments[1])
        digest = hashlib.sha256()
        for offset in range(0, image.size, 1 << 20):
            digest.update(image.guest_bytes(offset, min(1 << 20, image.size - offset)))
        print(digest.hexdigest())
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
