"""What a sparse vmdk says, from its bytes: independent of instar and of qemu-img."""

from __future__ import annotations

import re
import struct
from pathlib import Path

SECTOR = 512


class Image:
    """A hosted sparse extent, usually with an embedded descriptor."""

    def __init__(self, path, descriptor=True, whole=True):
        with open(path, "rb") as file:
            self.bytes = file.read(-1 if whole else 1 << 20)
        self.header = 0
        if struct.unpack_from("<Q", self.bytes, 56)[0] == 2**64 - 1:
            self.header = len(self.bytes) - 1024
        magic, self.version, self.flags, self.capacity, self.grain = struct.unpack_from("<4sIIQQ", self.bytes, self.header)
        assert magic == b"KDMV"
        self.redundant, self.directory, self.overhead = struct.unpack_from("<QQQ", self.bytes, self.header + 48)
        at, size = struct.unpack_from("<QQ", self.bytes, 28) if descriptor else (0, 0)
        self.text = self.bytes[at * SECTOR : (at + size) * SECTOR].rstrip(b"\0").decode()

    def tables(self, directory):
        """The directory's entries, each with the table's entries."""
        count = -(-self.capacity // (self.grain * 512))
        entries = struct.unpack_from(f"<{count}I", self.bytes, directory * SECTOR)
        return [(e, struct.unpack_from("<512I", self.bytes, e * SECTOR) if e else ()) for e in entries]

    def grains(self, directory=None):
        """The entries that are not 0."""
        tables = self.tables(self.directory if directory is None else directory)
        return {512 * t + g: e for t, (_, entries) in enumerate(tables) for g, e in enumerate(entries) if e}

    def copies_agree(self):
        return not self.flags & 2 or self.grains() == self.grains(self.redundant)

    def id(self, key):
        return int(re.search(rf"^{key}=([0-9a-fA-F]+)$", self.text, re.M)[1], 16)

    @property
    def cid(self):
        return self.id("CID")

    @property
    def parent_cid(self):
        return self.id("parentCID")


def start(path):
    """The first bytes of a file, which may be very long."""
    with open(path, "rb") as file:
        return file.read(1 << 20)


def patch(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def set_id(path, key, value):
    """Replaces a content ID in the descriptor."""
    data = start(path)
    found = re.search(rf"^{key}=([0-9a-f]+)$".encode(), data, re.M)
    digits = b"%0*x" % (len(found[1]), value)
    assert len(digits) == len(found[1])
    patch(path, found.start(1), digits)


def adopt(path, parent):
    """Makes an image the parent of another one, by an ID that fits into both descriptors: `qemu-img` writes no leading zeros."""
    length = len(re.search(rb"^parentCID=([0-9a-f]+)$", start(path), re.M)[1])
    value = Image(parent, whole=False).cid & ((1 << 4 * length) - 1)
    set_id(parent, "CID", value)
    set_id(path, "parentCID", value)


def without_parent_id(path):
    """All bytes of an image but the digits of its parentCID."""
    data = Path(path).read_bytes()
    found = re.search(rb"^parentCID=([0-9a-fA-F]+)$", data, re.M)
    return data[: found.start(1)] + data[found.end(1) :]


def announce(path):
    """Marks the parentCID as one that the parent is yet to get: its first letter becomes a capital."""
    data = start(path)
    found = re.search(rb"^parentCID=(0*)([a-f])", data, re.M)
    patch(path, found.start(2), found[2].upper())


def rename_parent(path, old, new):
    """Replaces the name of the parent in an embedded descriptor by one that is not much longer."""
    data = start(path)[: 21 * 512]
    text = data[512:].replace(b'"' + old + b'"', b'"' + new + b'"', 1).rstrip(b"\0").ljust(20 * 512, b"\0")
    patch(path, 512, text)
