"""Internal snapshots: what they hold must read as before, byte for byte."""

import os
import random

import pytest
import support
from support import KIB, MIB


def snapshot_hashes(path, length=None):
    """What each snapshot of an image reads as, or its first `length` bytes: qemu-img shows a snapshot in the size that
    the image has now."""
    names = [snapshot["name"] for snapshot in support.info(path).get("snapshots", [])]
    hashes = {}
    for name in names:
        flat = path.parent.parent / f"flat-{name}"
        support.qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", path, flat)
        if length is not None:
            os.truncate(flat, min(length, flat.stat().st_size))
        hashes[name] = support.digest(flat)
        flat.unlink()
    return hashes


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots_of_the_backing(pair, cluster_size, compat):
    pair.make(
        8 * MIB, base_options={"cluster_size": cluster_size, "compat": compat}, base=["write -P 1 0 6M"],
        top_options={"cluster_size": cluster_size},
        top=["write -P 9 1M 300k", "write -P 8 5M 2M", "write -z 3M 1M", "write -P 7 512 1k", "write -z 2500k 3k"],
    )
    support.qemu_img("snapshot", "-c", "first", pair.base)
    support.qemu_io(pair.base, "write -P 2 1M 2M", "write -z 4M 512k")
    support.qemu_img("snapshot", "-c", "second", pair.base)
    support.qemu_io(pair.base, "write -P 3 3M 64k", "write -P 4 7M 100k")
    before = snapshot_hashes(pair.base)
    assert len(before) == 2
    pair.check_commit()
    assert snapshot_hashes(pair.base) == before


@pytest.mark.parametrize("seed", range(6))
def test_random_snapshots_of_the_backing(pair, seed):
    """Snapshots between random writes, clusters of different sizes, and an ancestor below."""
    rng = random.Random(1000 + seed)
    sizes = [rng.choice([512, 4 * KIB, 64 * KIB]) for _ in range(2)]
    disk = rng.randrange(2 * MIB, 6 * MIB, 512)

    def writes(count):
        for number in range(count):
            at = rng.randrange(0, disk - 512, 512)
            length = min(rng.choice([512, 4096, 70_000 // 512 * 512, 300 * KIB]), disk - at)
            yield rng.choice([f"write -P {number + 1} {at} {length}", f"write -z {at} {length}"])

    root = support.create(pair.dir / "root.qcow2", disk)
    support.qemu_io(root, "write -P 200 0 1M", f"write -P 201 {disk - 512} 512")
    support.create(pair.base, backing="root.qcow2", cluster_size=sizes[0], refcount_bits=rng.choice([8, 16, 64]))
    for number in range(rng.randrange(1, 4)):
        support.qemu_io(pair.base, *writes(8))
        support.qemu_img("snapshot", "-c", f"s{number}", pair.base)
    support.qemu_io(pair.base, "flush", *writes(rng.randrange(4)))
    support.create(pair.top, backing="base.qcow2", cluster_size=sizes[1])
    support.qemu_io(pair.top, *writes(12))
    before = snapshot_hashes(pair.base)
    pair.check_commit()
    assert snapshot_hashes(pair.base) == before


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots_of_the_overlay(pair, cluster_size, compat):
    """What they hold stays; where they hold nothing they see the backing, and a warning says so."""
    size = 2 * MIB
    pair.make(size, base_options={"cluster_size": cluster_size}, base=["write -P 1 0 1M"])
    support.create(pair.top, size, backing="base.qcow2", cluster_size=cluster_size, compat=compat)
    support.qemu_io(pair.top, f"write -P 9 0 {size}")
    support.qemu_img("snapshot", "-c", "full", pair.top)
    support.qemu_io(pair.top, "write -P 8 512k 600k", "write -P 7 0 512")
    before = snapshot_hashes(pair.top)
    length, blocks = pair.top.stat().st_size, pair.top.stat().st_blocks
    result = pair.check_commit()
    assert "warning" in result.stderr and "full" in result.stderr and "top.qcow2" in result.stderr
    assert snapshot_hashes(pair.top) == before
    # The clusters that were the active state's own are given back.
    assert pair.top.stat().st_size <= length
    assert pair.top.stat().st_blocks * 512 < blocks * 512 - 400 * KIB
    # The overlay goes on.
    support.qemu_io(pair.top, "write -P 6 100k 300k")
    pair.check_commit()
    assert snapshot_hashes(pair.top) == before


def test_bitmaps_of_the_overlay_stay(pair):
    pair.make(base=["write -P 1 0 1M"])
    support.qemu_img("bitmap", "--add", pair.top, "dirty")
    support.qemu_io(pair.top, "write -P 2 512k 1M", "write -z 3M 128k")
    bitmaps = support.info(pair.top)["format-specific"]["data"]["bitmaps"]
    before = pair.top.stat().st_blocks
    pair.check_commit()
    assert support.info(pair.top)["format-specific"]["data"]["bitmaps"] == bitmaps
    assert pair.top.stat().st_blocks * 512 < before * 512 - 900 * KIB
