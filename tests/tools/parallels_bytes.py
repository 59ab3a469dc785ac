"""Parallels expandable images, from the bytes: a reader, a checker and a maker, written from QEMU's
`docs/interop/parallels.txt` and not from the driver."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

HEADER = struct.Struct("<16sIIIIIQIIIQ")
OLD, NEW = b"WithoutFreeSpace", b"WithouFreSpacExt"
OPEN, CLOSED, CLOSED_BY_OLD = 0x746F6E59, 0x312E3276, 0
EXTENSION = 0xAB234CEF23DCEA87
DIRTY_BITMAP = 0x20385FAE252CB34A


def up(number, unit):
    return -(-number // unit) * unit


class Image:
    """An image, taken apart."""

    def __init__(self, path):
        self.path = Path(path)
        self.bytes = self.path.read_bytes()
        (
            self.magic,
            version,
            _,
            _,
            self.tracks,
            self.entries,
            sectors,
            self.in_use,
            self.data_off,
            self.flags,
            self.ext_off,
        ) = HEADER.unpack_from(self.bytes)
        assert self.magic in (OLD, NEW) and version == 2
        self.size = (sectors & 0xFFFFFFFF if self.magic == OLD else sectors) * 512
        self.cluster = self.tracks * 512
        self.bat_end = 64 + self.entries * 4
        self.data = self.data_off * 512 or up(self.bat_end, 512)
        self.unit = 512 if self.magic == OLD else self.cluster
        bat = struct.unpack_from(f"<{self.entries}I", self.bytes, 64)
        self.mapped = {index: entry * self.unit for index, entry in enumerate(bat) if entry}

    def content(self, below=b""):
        out = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for number, place in self.mapped.items():
            at = number * self.cluster
            out[at : at + self.cluster] = self.bytes[place : place + self.cluster]
        return bytes(out[: self.size])

    def assert_consistent(self, closed=True):
        """What the specification demands of entries, and that the image was closed."""
        places = sorted(self.mapped.values())
        assert len(set(places)) == len(places), "two clusters at one place"
        assert all(place >= self.data and (place - self.data) % self.cluster == 0 for place in places)
        assert all(place + self.cluster <= len(self.bytes) for place in places), "past the end of the file"
        assert self.entries * self.cluster >= self.size and self.data >= self.bat_end
        assert self.magic == OLD or (self.data_off and self.data_off % self.tracks == 0)
        assert not closed or self.in_use in (CLOSED, CLOSED_BY_OLD), hex(self.in_use)
        assert not self.flags & 1 or not places

    def assert_empty(self):
        """It gave its space back, but for the one cluster that QEMU wants a file to be long."""
        assert not self.mapped and len(self.bytes) == max(self.data, self.cluster)


def content(*chain):
    """What a guest reads, the top-most image first."""
    data = b""
    for path in reversed(chain):
        data = Image(path).content(data)
    return data


def section(magic, flags=0, data=b""):
    """A section of a format extension."""
    return struct.pack("<QQII", magic, flags, len(data), 0) + data.ljust(up(len(data), 8), b"\0")


def bitmap(size, table=(0,), granularity=128):
    """The data of a dirty bitmap for a disk of so many bytes."""
    return struct.pack(f"<Q16sII{len(table)}Q", size // 512, b"i" * 16, granularity, len(table), *table)


def make(path, size, clusters, *, tracks=63, magic=OLD, room=None, entries=None, in_use=CLOSED, gaps=(), **fields):
    """An image with these bytes in these clusters, in this order. `room`: sectors between BAT and data, which the header says
    then; `gaps`: places among those of clusters that stay empty; `sections`: those of a format extension, behind all clusters;
    `flags`."""
    cluster = tracks * 512
    count = entries or -(-size // cluster)
    data = up(64 + count * 4, 512)
    if magic == NEW or room is not None:
        data = up(data + (room or 0) * 512, cluster if magic == NEW else 512)
    out = bytearray(data)
    places = [data + index * cluster for index in range(len(clusters) + len(gaps) + 1) if index not in gaps]
    for (number, content), place in zip(clusters.items(), places):
        out.extend(b"\x77" * (place - len(out)) + content.ljust(cluster, b"\0"))
        struct.pack_into("<I", out, 64 + number * 4, place // (cluster if magic == NEW else 512))
    extension = 0
    if "sections" in fields:
        extension = len(out) // 512
        body = b"".join(fields["sections"]).ljust(cluster - 24, b"\0")
        out.extend(struct.pack("<Q", EXTENSION) + hashlib.md5(body).digest() + body)
    said = data // 512 if magic == NEW or room is not None else 0
    header = (magic, 2, 16, 1, tracks, count, size // 512, in_use, said, fields.get("flags", 0), extension)
    HEADER.pack_into(out, 0, *header)
    Path(path).write_bytes(out)
    return Path(path)
