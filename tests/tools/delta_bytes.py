"""VMware's delta disks made and read from their bytes, independent of instar and of qemu-img: sparse extents of ESX (COWD)
after VMware's "Virtual Disk Format 5.0", section "ESXi Host Sparse Extents"; seSparse ones, which VMware does not document,
after the structures in QEMU's `block/vmdk.c`; and descriptors as ESXi writes them.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

SECTOR = 512
ENTRIES = 4096
NO_PARENT = 0xFFFFFFFF
COWD, SESPARSE, FLAT = "vmfsSparse", "seSparse", "vmfs"
LINE = {COWD: ("VMFSSPARSE", "delta"), SESPARSE: ("SESPARSE", "sesparse"), FLAT: ("VMFS", "flat")}
#: Of a seSparse grain, in bytes.
GRAIN = 4096


def descriptor(kind, lines, *, cid, parent=None, hint=None, encoding="UTF-8", track=None, newline=b"\n", more=""):
    """What ESXi writes beside an extent; `lines` are (sectors, type, name as bytes), `hint` is bytes."""
    text = [b"# Disk DescriptorFile", b"version=1", f'encoding="{encoding}"'.encode(), b"CID=%08x" % cid,
            b"parentCID=%08x" % (NO_PARENT if parent is None else parent), b'isNativeSnapshot="no"',
            f'createType="{kind}"'.encode()]
    if hint is not None:
        text.append(b'parentFileNameHint="%s"' % hint)
    text += [b"# Extent description", *(b'RW %d %s "%s"' % (n, t.encode(), name) for n, t, name in lines), b""]
    if track:
        text += [b"# Change Tracking File", f'changeTrackPath="{track}"'.encode(), b""]
    text += [b"# The Disk Data Base", b"#DDB", b"", b'ddb.adapterType = "lsilogic"', b'ddb.geometry.cylinders = "2"',
             b'ddb.longContentID = "5e8ae0f3a72d4d24b1f9c2a4%08x"' % cid, b'ddb.thinProvisioned = "1"',
             b'ddb.uuid = "60 00 C2 9a 4d 8f 1b 52-0c 3e 1f 55 9f 2e 47 10"', b'ddb.virtualHWVersion = "14"', *more.encode().split(b"\n")]
    return newline.join(text) + newline


def cowd(path, size, grains, *, grain=1, lazy=True, stale=False, room=0):
    """An extent of ESX. `grains`: number to bytes, stored in this order. `lazy`: tables without grains are not there; `stale`: the
    first free sector is that of an empty extent, as QEMU leaves it; `room`: bytes that ESX has reserved at the end."""
    sectors = size // SECTOR
    count = -(-sectors // (grain * ENTRIES))
    directory, tables, blob = [0] * count, {}, b""
    start = 4 + -(-count * 4 // SECTOR)
    free = start
    parts = []

    def take(length):
        nonlocal free
        free += length
        return free - length

    def table(index):
        if not directory[index]:
            directory[index] = take(32)
            tables[index] = [0] * ENTRIES
        return tables[index]

    if not lazy:
        for index in range(count):
            table(index)
    for number, data in grains.items():
        entries = table(number // ENTRIES)
        entries[number % ENTRIES] = take(grain)
        parts.append((entries[number % ENTRIES], data))
    header = struct.pack("<4s7I", b"COWD", 1, 3, sectors, grain, 4, count, start if stale else free)
    with open(path, "wb") as file:
        file.write(header.ljust(2048, b"\0") + struct.pack(f"<{count}I", *directory))
        for index, entries in tables.items():
            file.seek(directory[index] * SECTOR)
            file.write(struct.pack(f"<{ENTRIES}I", *entries))
        for place, data in parts:
            file.seek(place * SECTOR)
            file.write(data)
        file.truncate((free * SECTOR + 4096) // 4096 * 4096 + room)
    return Path(path)


class Cowd:
    """What an extent of ESX says."""

    def __init__(self, path):
        self.bytes = Path(path).read_bytes()
        magic, version, flags, sectors, grain, directory, count, self.free = struct.unpack_from("<4s7I", self.bytes)
        assert (magic, version, flags) == (b"COWD", 1, 3), f"{path} is no extent of ESX"
        self.size, self.grain, self.count = sectors * SECTOR, grain * SECTOR, count
        self.directory = struct.unpack_from(f"<{count}I", self.bytes, directory * SECTOR)
        self.overhead = directory + -(-count * 4 // SECTOR)
        self.grains = {}
        for index, table in enumerate(self.directory):
            if table:
                entries = struct.unpack_from(f"<{ENTRIES}I", self.bytes, table * SECTOR)
                self.grains.update({index * ENTRIES + n: e for n, e in enumerate(entries) if e})

    def content(self, below=b""):
        disk = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for number, sector in self.grains.items():
            start = number * self.grain
            length = min(self.grain, self.size - start)
            disk[start : start + length] = self.bytes[sector * SECTOR :][:length].ljust(length, b"\0")
        return bytes(disk)

    def assert_tidy(self, stale=False):
        """Everything has a place of its own, in front of the first free sector: "This needs to be less than the length of the
        delta link"."""
        places = [(0, self.overhead)] + [(table, 32) for table in self.directory if table]
        places += [(sector, self.grain // SECTOR) for sector in self.grains.values()]
        places.sort()
        assert all(a + n <= b for (a, n), (b, _) in zip(places, places[1:])), "two things at one place"
        assert stale or sum(places[-1]) <= self.free, "ESX would write over something"
        assert self.free * SECTOR < len(self.bytes)

    def assert_fresh(self):
        """As ESX makes it when a snapshot is taken."""
        assert not any(self.directory) and self.free == self.overhead
        assert len(self.bytes) == (self.free * SECTOR + 4096) // 4096 * 4096


def sesparse(path, size, grains, *, first=0, skip=0, replay=0):
    """A seSparse extent. `grains`: number to bytes, or to 1 (unmapped) or 2 (zero). Grains are numbered from `first` on, tables
    from `skip` on; `replay`: the journal was not replayed."""
    count = -(-size // (GRAIN * ENTRIES))
    room = -(-count * 8 // SECTOR)
    at_tables = 8 + room
    at_grains = -(-(at_tables + (count + skip) * 64) // 8) * 8
    header = [0xCAFEBABE, 0x200000001, size // SECTOR, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 5, 8, room, at_tables,
              (count + skip) * 64, 2, 1, 3, 1, at_grains, -(-size // GRAIN) * 8]
    directory, tables, number = [0] * count, {}, first
    with open(path, "wb") as file:
        for grain, data in grains.items():
            index = grain // ENTRIES
            if not directory[index]:
                directory[index] = 0x1000000000000000 | (skip + len(tables))
                tables[index] = [0] * ENTRIES
            if isinstance(data, int):
                tables[index][grain % ENTRIES] = data << 60 | 5
                continue
            tables[index][grain % ENTRIES] = 3 << 60 | (number & 0xFFF) << 48 | number >> 12
            file.seek(at_grains * SECTOR + number * GRAIN)
            file.write(data.ljust(GRAIN, b"\0"))
            number += 1
        file.seek(0)
        file.write(struct.pack("<26Q", *header).ljust(SECTOR, b"\0"))
        file.write(struct.pack("<4Q", 0xCAFECAFE, skip + len(tables), 7, replay).ljust(SECTOR, b"\0"))
        file.seek(8 * SECTOR)
        file.write(struct.pack(f"<{count}Q", *directory))
        for index, entries in tables.items():
            file.seek((at_tables + (directory[index] & 0xFFFFFFFF) * 64) * SECTOR)
            file.write(struct.pack(f"<{ENTRIES}Q", *entries))
        file.truncate(max(file.seek(0, 2), at_grains * SECTOR + number * GRAIN))
    return Path(path)


def sesparse_content(path, below=b""):
    data = Path(path).read_bytes()
    fields = struct.unpack_from("<26Q", data)
    assert fields[0] == 0xCAFEBABE
    size = fields[2] * SECTOR
    disk = bytearray(below[:size].ljust(size, b"\0"))
    for index, entry in enumerate(struct.unpack_from(f"<{-(-size // (GRAIN * ENTRIES))}Q", data, fields[16] * SECTOR)):
        if not entry:
            continue
        table = struct.unpack_from(f"<{ENTRIES}Q", data, (fields[18] + (entry & 0xFFFFFFFF) * 64) * SECTOR)
        for number, value in enumerate(table, index * ENTRIES):
            start = number * GRAIN
            length = min(GRAIN, size - start)
            if value >> 60 in (1, 2):
                disk[start : start + length] = bytes(length)
            elif value:
                at = fields[24] * SECTOR + ((value >> 48 & 0xFFF) | (value & (1 << 48) - 1) << 12) * GRAIN
                disk[start : start + length] = data[at : at + length]
    return bytes(disk)


class Disk:
    """A descriptor with its extents."""

    def __init__(self, path):
        self.path = Path(path)
        self.text = self.path.read_bytes()
        self.kind = re.search(rb'^createType="(\w+)"', self.text, re.M)[1].decode()
        self.lines = [(int(n), t.decode(), self.path.parent / name.decode())
                      for n, t, name in re.findall(rb'^RW (\d+) (\w+) "([^"]+)"', self.text, re.M)]

    def id(self, key):
        return int(re.search(rf"^{key}=([0-9a-fA-F]+)\r?$".encode(), self.text, re.M)[1], 16)

    @property
    def files(self):
        return [self.path, *(file for _, _, file in self.lines)]

    def content(self, below=b""):
        """What a guest reads over these bytes."""
        disk, start = b"", 0
        for sectors, kind, file in self.lines:
            length = sectors * SECTOR
            part = below[start : start + length].ljust(length, b"\0")
            if kind == "VMFSSPARSE":
                part = Cowd(file).content(part)
            elif kind == "SESPARSE":
                part = sesparse_content(file, part)
            else:
                part = file.read_bytes()[:length]
            disk, start = disk + part, start + length
        return disk


def content(*chain):
    """What a guest reads of a chain of descriptors, the top-most first."""
    below = b""
    for path in reversed(chain):
        below = Disk(path).content(below)
    return below
