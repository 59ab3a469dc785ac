"""Images of the format slate, byte by byte: the format of the plugin that is frozen with plugin contract 1.0.

The layout is described in tests/compat/plugin-api-1.0/slate/driver/src/header.rs.
"""

from __future__ import annotations

import struct
from pathlib import Path

CLUSTER = 65536
TABLE = 4096
NAMES = 64


def _header(data):
    size, names, fmt = struct.unpack_from("<QII", data, 8)
    return size, bytes(data[NAMES : NAMES + names]), bytes(data[NAMES + names : NAMES + names + fmt])


def ids(path):
    """Content ID of the image, that of its parent, and whether the parent is only about to get it."""
    content, parent, announced = struct.unpack_from("<QQB", Path(path).read_bytes(), 24)
    return content, parent, announced == 1


def put_ids(path, content, parent, announced):
    """Gives an image these content IDs."""
    data = bytearray(Path(path).read_bytes())
    struct.pack_into("<QQB", data, 24, content, parent, announced)
    Path(path).write_bytes(data)


def put_names(path, *names):
    """Gives an image these names of its backing, which are tried one after the other."""
    data = bytearray(Path(path).read_bytes())
    _, _, fmt = _header(data)
    text = b"\0".join(name.encode() for name in names)
    data[NAMES:TABLE] = (text + fmt).ljust(TABLE - NAMES, b"\0")
    struct.pack_into("<I", data, 16, len(text))
    Path(path).write_bytes(data)


def entries(path):
    data = Path(path).read_bytes()
    return list(struct.unpack_from(f"<{-(-_header(data)[0] // CLUSTER)}Q", data, TABLE))


def put(path, clusters):
    """Gives an image clusters: each `None` (zeroes), a number (full of that byte) or 64 KiB of bytes, by its index."""
    data = bytearray(Path(path).read_bytes())
    for index, content in clusters.items():
        if content is None:
            entry = 1
        elif isinstance(content, int):
            entry = 2 | content << 8
        else:
            assert len(content) == CLUSTER
            data += bytes(-len(data) % CLUSTER)
            entry = len(data)
            data += content
        struct.pack_into("<Q", data, TABLE + 8 * index, entry)
    Path(path).write_bytes(data)


def content(path, below=b""):
    """What a guest reads; `below` is what it reads of the image's backing."""
    data = Path(path).read_bytes()
    size, _, _ = _header(data)
    seen = bytearray(below[:size].ljust(size, b"\0"))
    for index, entry in enumerate(entries(path)):
        start = index * CLUSTER
        length = min(CLUSTER, size - start)
        if entry == 1:
            seen[start : start + length] = bytes(length)
        elif entry & 0xFF == 2:
            seen[start : start + length] = bytes([entry >> 8]) * length
        elif entry:
            assert entry % CLUSTER == 0 and entry + CLUSTER <= len(data), f"cluster {index} is outside the file"
            seen[start : start + length] = data[entry : entry + length]
    used = [entry for entry in entries(path) if entry and not entry & 0xFF]
    assert len(set(used)) == len(used), "two clusters share their place"
    return bytes(seen)
