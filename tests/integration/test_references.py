"""Images in which more refers to a cluster than its refcount says, and overlays whose tables are long."""

from __future__ import annotations

import struct
import subprocess

import pytest
import support
from qcow2_bytes import COMPRESSED, COPIED, OFFSET
from support import KIB, MIB, refuse


def number(path, at):
    with open(path, "rb") as file:
        file.seek(at)
        return struct.unpack(">Q", file.read(8))[0]


def put(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def l2_entry(path, guest, cluster=64 * KIB):
    """Where the L2 entry of a guest offset below 512 MiB stands."""
    return (number(path, number(path, 40)) & OFFSET) + guest // cluster * 8


@pytest.mark.parametrize("count", [19, 10, 5])
def test_compressed_clusters_of_a_snapshot_of_the_overlay(tmp_path, count):
    base, full, top = (tmp_path / name for name in ("base", "full", "top"))
    support.create(base, 4 * MIB)
    support.create(full, 4 * MIB)
    support.qemu_io(full, *(f"write -P {i + 1} {i * 128}k 64k" for i in range(10)))
    support.qemu_img("convert", "-c", "-O", "qcow2", "-B", base, "-F", "qcow2", full, top)
    support.qemu_img("snapshot", "-c", "one", top)
    cluster = (number(top, l2_entry(top, 0)) & ((1 << 54) - 1)) // (64 * KIB)
    at = number(top, number(top, 48)) + 2 * cluster
    assert number(top, at) >> 48 == 20
    put(top, at, struct.pack(">H", count))
    refuse("ERROR_OVERLAY_CORRUPT", top, files=[base], mentions=["references", f"refcount {count}"])
    put(top, at, struct.pack(">H", 20))
    support.qemu_img("convert", "-l", "one", "-O", "raw", top, tmp_path / "before")
    support.commit(top)
    support.qemu_img("convert", "-l", "one", "-O", "raw", top, tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


@pytest.mark.parametrize("snapshot", [False, True])
def test_two_entries_on_one_cluster_of_the_backing(pair, snapshot):
    pair.make(base=["write -P 1 0 64k", "write -P 2 1M 64k"], top=["write -P 9 1M 64k"])
    if snapshot:
        support.qemu_img("snapshot", "-c", "one", pair.base)
    put(pair.base, l2_entry(pair.base, 0), struct.pack(">Q", number(pair.base, l2_entry(pair.base, MIB))))
    refuse("ERROR_BACKING_CORRUPT", pair.top, files=[pair.base], mentions=["references"])


def test_few_compressed_bytes_do_not_fill_the_disk(pair):
    """One compressed cluster, and as many entries that refer to it as a table has."""
    pair.make(512 * MIB, top=["write -c -P 7 0 64k"])
    entry = number(pair.top, l2_entry(pair.top, 0))
    assert entry & COMPRESSED and not entry & COPIED
    put(pair.top, l2_entry(pair.top, 0), struct.pack(">Q", entry) * 8192)
    refuse("ERROR_OVERLAY_CORRUPT", pair.top, files=[pair.base], mentions=["8192 references", "refcount 1"])


def test_tables_that_are_not_read_are_told(pair):
    """128 GiB in 256 tables: reading them all is no part of a commit of 64 KiB; with -v it is said."""
    pair.make("128G", base_options={"preallocation": "metadata"}, top=["write -P 9 1M 64k"])
    assert "256 mapping tables were not compared" in support.commit(pair.top, "-v").stderr
    support.qemu_io(pair.top, "write -P 8 1M 64k")
    support.qemu_img("snapshot", "-c", "one", pair.base)
    assert "not compared" not in support.commit(pair.top, "-v").stderr
    support.assert_clean(pair.base)


def many_blocks(path, base, count):
    """An overlay of clusters of 512 bytes with `count` refcount blocks of 64-bit refcounts, most of which say nothing."""
    cluster, per_block = 512, 64
    table_clusters = -(-count * 8 // cluster)
    first = 2 + table_clusters + 1
    name = str(base).encode()
    used = first + count
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 104 + 8, len(name), 9, MIB, 0, 32, (2 + table_clusters) * cluster, cluster,
        table_clusters, 0, 0, 0, 0, 0, 6, 104,
    )
    with path.open("wb") as file:
        file.write(header + bytes(8) + name)
        file.seek(cluster)
        file.write(struct.pack(f">{count}Q", *range(first * cluster, used * cluster, cluster)))
        file.seek(first * cluster)
        file.write(struct.pack(">Q", 1) * used)
        file.truncate(used * cluster)


def test_emptying_takes_little_memory_however_many_refcount_blocks_there_are(tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    support.create(base, MIB)
    many_blocks(top, base.name, 800_000)
    support.qemu_io(top, "write -P 5 64k 64k")
    assert subprocess.run(["qemu-img", "check", "-q", top], check=False).returncode in (0, 3)
    before = support.flatten(top, tmp_path / "before")
    support.commit(top)
    support.assert_same_content(base, before)
    support.assert_same_content(top, before)
    support.assert_clean(top)
    assert top.stat().st_size < 8 * MIB, "the blocks are still there"
