"""Makes and reads VHDX images, from [MS-VHDX] 8.0: independent of instar, of qemu-img and of every other reader. Numbers are
little-endian.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, field
from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
FIXED, DYNAMIC, DIFFERENCING = 1, 0, 2
NULL = bytes(16)
HEADERS, TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
PAGE = 4096


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def braces(data: bytes) -> str:
    return "{" + str(uuid.UUID(bytes_le=data)) + "}"


BAT = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
LOCATOR_TYPE = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def checksum(data: bytes) -> int:
    """Of a structure whose own field, at 4, counts as zero."""
    return crc32c(data[:4] + bytes(4) + data[8:])


def sealed(data: bytearray | bytes) -> bytes:
    return data[:4] + struct.pack("<I", checksum(bytes(data))) + data[8:]


def header(sequence, file_write, data_write, log_guid=NULL, log_offset=MIB, log_length=MIB, version=1) -> bytes:
    data = struct.pack("<4sIQ16s16s16sHHIQ", b"head", 0, sequence, file_write, data_write, log_guid, 0, version, log_length, log_offset)
    return sealed(data.ljust(PAGE, b"\0"))


def region_table(regions) -> bytes:
    """`regions`: GUID, offset, length, required."""
    data = struct.pack("<4sIII", b"regi", 0, len(regions), 0)
    data += b"".join(struct.pack("<16sQII", *region) for region in regions)
    return sealed(data.ljust(64 * KIB, b"\0"))


def locator(pairs) -> bytes:
    front = 20 + 12 * len(pairs)
    entries, data = b"", b""
    for key, value in pairs:
        key, value = key.encode("utf-16-le"), value.encode("utf-16-le")
        at = front + len(data)
        entries += struct.pack("<IIHH", at, at + len(key), len(key), len(value))
        data += key + value
    return struct.pack("<16sHH", LOCATOR_TYPE, 0, len(pairs)) + entries + data


def log_entry(pages, sequence, tail, log_guid, flushed, last=None) -> bytes:
    """An entry that replaces `pages`: byte offset in the file, and 4096 bytes, or a number of bytes that become zero."""
    front = -(-(64 + 32 * len(pages)) // PAGE) * PAGE
    descriptors, data = b"", b""
    for offset, page in pages:
        if isinstance(page, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, page, offset, sequence)
            continue
        descriptors += struct.pack("<4s4s8sQQ", b"desc", page[4092:], page[:8], offset, sequence)
        data += struct.pack("<4sI", b"data", sequence >> 32) + page[8:4092] + struct.pack("<I", sequence & 0xFFFFFFFF)
    start = struct.pack("<4sIIIQII16sQQ", b"loge", 0, front + len(data), tail, sequence, len(pages), 0, log_guid, flushed, last or flushed)
    return sealed((start + descriptors).ljust(front, b"\0") + data)


@dataclass
class Maker:
    """An image with whatever no tool can write."""

    kind: int
    size: int
    data_write: bytes = b"\5" * 16
    #: The parent's DataWriteGuid, and further pairs of the locator.
    parent: bytes = b"\4" * 16
    pairs: list = field(default_factory=list)
    block: int = MIB
    sector: int = 512
    #: Runs of logical sectors that the image holds: first sector, and the bytes.
    runs: list = field(default_factory=list)
    #: Blocks in a state without data.
    states: dict = field(default_factory=dict)
    #: What is said only in the log: table, bitmaps, metadata. In its place stands something else.
    pending: bool = False
    #: Further metadata items: GUID, flags, bytes; and further regions.
    items: list = field(default_factory=list)
    regions: list = field(default_factory=list)
    #: MiB of nothing before each block.
    gap: int = 0
    disk_id: bytes = b"\x1d" * 16

    def ratio(self) -> int:
        return (1 << 23) * self.sector // self.block

    def metadata(self) -> bytes:
        number = lambda value, width: value.to_bytes(width, "little")  # noqa: E731
        items = [
            (PARAMETERS, 4, struct.pack("<II", self.block, self.kind)), (SIZE, 6, number(self.size, 8)),
            (DISK_ID, 6, self.disk_id), (LOGICAL, 6, number(self.sector, 4)), (PHYSICAL, 6, number(4096, 4)),
        ]  # fmt: skip
        if self.kind == DIFFERENCING:
            items.append((LOCATOR, 4, locator([("parent_linkage", braces(self.parent)), *self.pairs])))
        items += self.items
        table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
        place, data = 64 * KIB, b""
        for name, flags, value in items:
            table += struct.pack("<16sIII4x", name, place + len(data), len(value), flags)
            data += value
        return table.ljust(64 * KIB, b"\0") + data

    def write(self, path: Path) -> Path:
        ratio, blocks = self.ratio(), -(-self.size // self.block)
        chunks = -(-blocks // ratio)
        entries = chunks * (ratio + 1) if self.kind == DIFFERENCING else blocks + (blocks - 1) // ratio
        table = [0] * entries
        room = -(-entries * 8 // MIB) * MIB
        metadata_at, table_at = 2 * MIB, 3 * MIB
        self.end = table_at + room
        writes: list[tuple[int, bytes]] = []
        places: dict[int, int] = {}
        bitmaps: dict[int, bytearray] = {}
        held: dict[int, set[int]] = {}

        def allocate(length: int) -> int:
            place = self.end + self.gap * MIB
            self.end = place + length
            return place

        for block, state in self.states.items():
            table[block + block // ratio] = state
        for first, data in self.runs:
            for at in range(0, len(data), self.sector):
                sector = first + at // self.sector
                block, within = divmod(sector * self.sector, self.block)
                assert block not in self.states
                if block not in places:
                    places[block] = allocate(self.block)
                writes.append((places[block] + within, data[at : at + self.sector]))
                held.setdefault(block, set()).add(within // self.sector)
        for block in range(blocks) if self.kind == FIXED else ():
            if block not in places:
                places[block] = allocate(self.block)
        bitmap_at: dict[int, int] = {}
        for block, place in places.items():
            visible = min(self.size - block * self.block, self.block) // self.sector
            whole = self.kind != DIFFERENCING or len(held[block]) == visible
            table[block + block // ratio] = place | (6 if whole else 7)
            chunk = block // ratio
            if whole:
                continue
            if chunk not in bitmaps:
                bitmaps[chunk], bitmap_at[chunk] = bytearray(MIB), allocate(MIB)
                table[chunk * (ratio + 1) + ratio] = bitmap_at[chunk] | 6
            for within in held[block]:
                bit = block % ratio * (self.block // self.sector) + within
                bitmaps[chunk][bit // 8] |= 1 << bit % 8
        packed = b"".join(entry.to_bytes(8, "little") for entry in table)
        regions = region_table([(BAT, table_at, room, 1), (METADATA, metadata_at, MIB, 1), *self.regions])
        log_guid = b"\x77" * 16 if self.pending else NULL
        with path.open("wb") as out:
            out.truncate(self.end)

            def put(at: int, data: bytes) -> None:
                out.seek(at)
                out.write(data)

            put(0, b"vhdxfile" + "made by a test".encode("utf-16-le"))
            for number, at in enumerate(HEADERS):
                put(at, header(7 + number, b"\x21" * 16, self.data_write, log_guid))
            for at in TABLES:
                put(at, regions)
            put(metadata_at, self.metadata())
            put(table_at, packed)
            for at, data in writes:
                put(at, data)
            for chunk, bits in bitmaps.items():
                put(bitmap_at[chunk], bits)
        if self.pending:
            self.pend(path, metadata_at, table_at, table, bitmap_at)
        return path

    def pend(self, path, metadata_at, table_at, table, bitmap_at) -> None:
        """Move what the metadata says into three entries of the log; the first is no longer to be replayed."""
        log_guid, flushed = b"\x77" * 16, self.end
        numbers = {table_at + index * 8 // PAGE * PAGE for index, entry in enumerate(table) if entry}
        numbers |= {metadata_at, metadata_at + 64 * KIB}
        numbers |= {place + at for place in bitmap_at.values() for at in range(0, 32 * KIB, PAGE)}
        with path.open("r+b") as file:
            def page(at: int) -> bytes:
                file.seek(at)
                return file.read(PAGE)

            pages = [(at, page(at)) for at in sorted(numbers)]
            half = len(pages) // 2
            at, sequence = 5 * PAGE, (1 << 32) - 2
            tail = None
            for number, part in enumerate([[(table_at, b"\xee" * PAGE)], pages[:half], pages[half:]]):
                tail = at if number < 2 else tail
                data = log_entry(part, sequence + number, tail, log_guid, flushed)
                file.seek(MIB + at)
                file.write(data)
                at += len(data)
            for place, _ in pages:
                file.seek(place)
                file.write(b"\xbb" * PAGE)


class View:
    """An image that is read; its log is applied in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, path.stat().st_size
        self.pages: dict[int, bytes] = {}
        valid = {}
        for at in HEADERS:
            data = self.read(at, PAGE)
            if data[:4] == b"head" and sealed(data) == data:
                valid[struct.unpack_from("<Q", data, 8)[0]] = data
        assert valid, "no header"
        self.headers = len(valid)
        head = valid[max(valid)]
        self.sequence = max(valid)
        self.file_write, self.data_write, self.log_guid = head[16:32], head[32:48], head[48:64]
        _, _, self.log_length, self.log_offset = struct.unpack_from("<HHIQ", head, 64)
        if self.log_guid != NULL:
            self.replay()
        tables = [data for at in TABLES if sealed(data := self.read(at, 64 * KIB)) == data]
        assert tables, "no region table"
        self.tables = len(tables)
        count = struct.unpack_from("<I", tables[0], 8)[0]
        self.regions = [struct.unpack_from("<16sQII", tables[0], 16 + 32 * index) for index in range(count)]
        place = {name: at for name, at, *_ in self.regions}
        self.metadata_at, self.table_at = place[METADATA], place[BAT]
        data = self.read(self.metadata_at, 64 * KIB)
        assert data[:8] == b"metadata"
        self.items = {}
        for index in range(struct.unpack_from("<H", data, 10)[0]):
            name, offset, length, flags = struct.unpack_from("<16sIII", data, 32 + 32 * index)
            self.items[name] = (self.metadata_at + offset, length, flags)
        self.block, self.kind = struct.unpack("<II", self.item(PARAMETERS))
        self.size, self.disk_id = int.from_bytes(self.item(SIZE), "little"), self.item(DISK_ID)
        self.sector = int.from_bytes(self.item(LOGICAL), "little")
        self.physical = int.from_bytes(self.item(PHYSICAL), "little")
        self.ratio = (1 << 23) * self.sector // self.block
        blocks = -(-self.size // self.block)
        count = -(-blocks // self.ratio) * (self.ratio + 1) if self.kind & 2 else blocks + (blocks - 1) // self.ratio
        self.table = struct.unpack(f"<{count}Q", self.read(self.table_at, count * 8))

    def read(self, at: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(at)
            data = bytearray(file.read(length).ljust(length, b"\0"))
        for place, page in self.pages.items():
            start, end = max(place, at), min(place + PAGE, at + length)
            if start < end:
                data[start - at : end - at] = page[start - place : end - place]
        return bytes(data)

    def item(self, name: bytes) -> bytes:
        at, length, _ = self.items[name]
        return self.read(at, length)

    def entry(self, log: bytes, at: int):
        """The entry at a byte of the log: sequence, length, tail, pages."""
        if log[at : at + 4] != b"loge" or log[at + 32 : at + 48] != self.log_guid:
            return None
        length, tail, sequence, count = struct.unpack_from("<IIQI", log, at + 8)
        data = (log[at:] + log)[:length]
        if not PAGE <= length <= len(log) or sealed(data) != data:
            return None
        sector, pages = -(-(64 + 32 * count) // PAGE) * PAGE, []
        for index in range(count):
            kind, trailing, leading, offset, number = struct.unpack_from("<4s4s8sQQ", data, 64 + 32 * index)
            assert number == sequence
            if kind == b"zero":
                pages += [(offset + more, bytes(PAGE)) for more in range(0, int.from_bytes(leading, "little"), PAGE)]
            else:
                pages.append((offset, leading + data[sector + 8 : sector + 4092] + trailing))
                sector += PAGE
        return sequence, length, tail, pages

    def replay(self) -> None:
        log = self.read(self.log_offset, self.log_length)
        entries = {at: found for at in range(0, len(log), PAGE) if (found := self.entry(log, at))}
        newest = {found[0]: at for at, found in entries.items()}
        for sequence in sorted(newest, reverse=True):
            tail, run = entries[newest[sequence]][2], [newest[sequence]]
            while run[0] != tail and (sequence - len(run)) in newest:
                run.insert(0, newest[sequence - len(run)])
            if run[0] == tail:
                for at in run:
                    self.pages.update(entries[at][3])
                return
        raise AssertionError("the log holds no sequence")

    def value(self, key: str) -> str | None:
        data = self.item(LOCATOR)
        for index in range(struct.unpack_from("<H", data, 18)[0]):
            key_at, value_at, key_length, length = struct.unpack_from("<IIHH", data, 20 + 12 * index)
            if data[key_at : key_at + key_length].decode("utf-16-le") == key:
                return data[value_at : value_at + length].decode("utf-16-le")
        return None

    def linkage(self) -> bytes:
        return uuid.UUID(self.value("parent_linkage")).bytes_le

    def blocks(self):
        """Number, state and place of each block that the image says anything of."""
        for block in range(-(-self.size // self.block)):
            entry = self.table[block + block // self.ratio]
            if entry & 7:
                yield block, entry & 7, entry >> 20 << 20

    def held(self) -> int:
        return sum(1 for _ in self.blocks())

    def sectors(self) -> set[int]:
        """Logical sectors that are not the parent's to say."""
        found = set()
        per_block = self.block // self.sector
        for block, state, _ in self.blocks():
            for within in range(min(self.size - block * self.block, self.block) // self.sector):
                if state != 7 or self.bits(block)[within // 8] >> within % 8 & 1:
                    found.add(block * per_block + within)
        return found

    def bits(self, block: int) -> bytes:
        chunk, within = divmod(block, self.ratio)
        entry = self.table[chunk * (self.ratio + 1) + self.ratio]
        assert entry & 7 == 6, "no bitmap"
        length = self.block // self.sector // 8
        return self.read((entry >> 20 << 20) + within * length, length)

    def over(self, below: bytes) -> bytes:
        disk = bytearray(below.ljust(self.size, b"\0"))
        for block, state, at in self.blocks():
            start = block * self.block
            length = min(self.size - start, self.block)
            data = self.read(at, length) if state >= 6 else bytes(length)
            if state != 7:
                disk[start : start + length] = data
                continue
            bits = self.bits(block)
            for within in range(length // self.sector):
                if bits[within // 8] >> within % 8 & 1:
                    place = within * self.sector
                    disk[start + place : start + place + self.sector] = data[place : place + self.sector]
        return bytes(disk)

    def assert_sound(self, closed: bool = True) -> None:
        """Nothing overlaps, everything is in the file and at whole MiB, and the log is empty."""
        assert self.headers == self.tables == 2
        assert not closed or self.log_guid == NULL
        used = [(0, MIB), (self.log_offset, self.log_length), *((at, length) for _, at, length, _ in self.regions)]
        for index, entry in enumerate(self.table):
            bitmap = index % (self.ratio + 1) == self.ratio
            assert entry & 0xFFFF8 == 0 and (not bitmap or entry & 7 in (0, 6)), hex(entry)
            if entry & 7 >= 6:
                used.append((entry >> 20 << 20, MIB if bitmap else self.block))
        used.sort()
        for (start, length), (after, _) in zip(used, used[1:], strict=False):
            assert start + length <= after, (start, length, after)
        assert sum(used[-1]) <= self.length and self.length % MIB == 0
        for block, state, _ in self.blocks():
            assert state != 7 or self.bits(block)


def content(*chain: Path) -> bytes:
    """What a guest reads of a chain, the top-most first."""
    disk = b""
    for path in reversed(chain):
        disk = View(path).over(disk)
    return disk
