"""`instar convert -c`: what qemu-img reads is the same disk, sound, and no longer than qemu-img's own by more than a little."""

from __future__ import annotations

import json
import os
import random

import pytest
import support
from support import KIB, MIB

#: Options of a new qcow2.
KINDS = ["", "compression_type=zstd", "compat=0.10", "extended_l2=on", "extended_l2=on,compression_type=zstd", "refcount_bits=1",
         "refcount_bits=64", "lazy_refcounts=on",
         *[f"cluster_size={size}" for size in ("512", "1k", "2k", "4k", "8k", "16k", "32k", "128k", "256k", "512k", "1M", "2M")],
         "cluster_size=4k,compression_type=zstd", "cluster_size=2M,compression_type=zstd", "cluster_size=2M,extended_l2=on"]


def convert(*args, rc=0):
    result = support.run_instar("convert", *args)
    assert result.rc == rc, str(result)
    return result


def same(first, first_fmt, second, second_fmt):
    compared = support.run("qemu-img", "compare", "-f", first_fmt, "-F", second_fmt, first, second)
    assert compared.rc == 0, str(compared)


def compressed(image):
    """Guest bytes that are compressed."""
    runs = support.run("qemu-img", "map", "--output=json", image)
    return sum(run["length"] for run in json.loads(runs.stdout) if run.get("compressed"))


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Text, noise, zeroes that are written, holes, and clusters of which a part is noise; an end within a sector's cluster."""
    path, rng = tmp_path_factory.mktemp("disk") / "disk.raw", random.Random(20)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(2000)]
    with open(path, "wb") as file:
        file.truncate(23 * MIB + 3 * 512)
        file.seek(MIB)
        for _ in range(6):
            file.write(b" ".join(rng.choices(words, k=250_000))[:MIB])
        file.write(rng.randbytes(3 * MIB) + bytes(2 * MIB))
        file.seek(14 * MIB + 512)
        file.write(b"".join(rng.randbytes(3000) + bytes(5192) for _ in range(300)))
        file.seek(23 * MIB + 1024)
        file.write(b"the end")
    return path


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options or "default")
def test_every_kind_of_qcow2(options, disk, tmp_path):
    ours, again, theirs = tmp_path / "ours", tmp_path / "again", tmp_path / "theirs"
    chosen = ["-o", options] if options else []
    with support.untouched(disk):
        convert("-c", "-f", "raw", "-O", "qcow2", *chosen, disk, ours)
    convert("-c", "-f", "raw", "-O", "qcow2", *chosen, disk, again)
    support.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *chosen, disk, theirs)
    same(disk, "raw", ours, "qcow2")
    support.assert_clean(ours)
    checked = support.run_instar("check", ours)
    assert checked.rc == 0, str(checked)
    assert ours.read_bytes() == again.read_bytes(), "the same disk, and another image"
    mine, other = compressed(ours), compressed(theirs)
    assert mine > 6 * MIB and mine >= other * 0.9, f"{mine} bytes of the disk, and {other} by qemu-img"
    # Space on the disk, as the end of the last cluster need not be written.
    took, takes = (path.stat().st_blocks * 512 for path in (ours, theirs))
    assert took < takes * 1.05 + 128 * KIB, f"{took}, and {takes} by qemu-img"


def test_what_is_compressed_can_be_written_to_and_committed(disk, tmp_path):
    ours, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    convert("-c", "-f", "raw", "-O", "qcow2", disk, ours)
    support.create(top, backing="base.qcow2")
    support.qemu_io(top, "write -P 3 1M 70000", "write -P 4 20M 1M")
    support.qemu_io(ours, "write -P 7 5M 64k")
    plain = tmp_path / "plain.raw"
    support.qemu_img("convert", "-O", "raw", top, plain)
    result = support.run_instar("commit", "-q", top)
    assert result.rc == 0, str(result)
    same(plain, "raw", ours, "qcow2")
    support.assert_clean(ours)


@pytest.mark.parametrize("options", ["", "compression_type=zstd"], ids=["zlib", "zstd"])
def test_a_chain_onto_a_backing_file(options, tmp_path):
    base, middle, top, new = (tmp_path / name for name in ("base.qcow2", "middle.qcow2", "top.qcow2", "new.qcow2"))
    support.create(base, 8 * MIB)
    support.qemu_io(base, "write -P 1 0 8M")
    support.create(middle, backing="base.qcow2")
    support.qemu_io(middle, "write -P 2 1M 100000", "write -z 3M 256k")
    support.create(top, backing="middle.qcow2", cluster_size="4k")
    support.qemu_io(top, "write -P 3 2M 5000", "write -P 0 6M 128k", "write -z 7M 4k")
    chosen = ["-o", options] if options else []
    convert("-c", "-O", "qcow2", *chosen, "-B", "base.qcow2", "-F", "qcow2", top, new)
    same(top, "qcow2", new, "qcow2")
    support.assert_clean(new)
    assert compressed(new) > 0 and new.stat().st_blocks * 512 < MIB


def test_several_sources_a_snapshot_and_bitmaps(tmp_path):
    first, second, target = (tmp_path / name for name in ("first.qcow2", "second.qcow2", "target.qcow2"))
    for number, path in enumerate((first, second)):
        support.create(path, 3 * MIB + 512)
        support.qemu_io(path, f"write -P {number + 1} 100k 2M")
    support.qemu_img("snapshot", "-c", "one", first)
    support.qemu_img("bitmap", "--add", first, "changed")
    support.qemu_io(first, "write -P 9 0 64k")
    convert("-c", "-O", "qcow2", first, second, target)
    theirs = tmp_path / "theirs"
    support.qemu_img("convert", "-O", "raw", first, second, theirs)
    same(theirs, "raw", target, "qcow2")
    convert("-c", "-l", "one", "-O", "qcow2", first, target)
    support.qemu_img("convert", "-l", "one", "-O", "raw", first, theirs)
    same(theirs, "raw", target, "qcow2")
    convert("-c", "--bitmaps", "-O", "qcow2", first, target)
    same(first, "qcow2", target, "qcow2")
    support.assert_clean(target)
    assert [bitmap["name"] for bitmap in support.info(target)["format-specific"]["data"]["bitmaps"]] == ["changed"]


@pytest.mark.parametrize("snapshots", [0, 1])
def test_into_an_image_that_holds_something(snapshots, disk, tmp_path):
    """qemu-img fails there: it cannot replace a cluster by a compressed one."""
    target, before = tmp_path / "target.qcow2", tmp_path / "before.raw"
    support.create(target, 23 * MIB + 3 * 512)
    support.qemu_io(target, "write -P 5 0 23M")
    for _ in range(snapshots):
        support.qemu_img("snapshot", "-c", "kept", target)
        support.qemu_img("convert", "-l", "kept", "-O", "raw", target, before)
    for _ in range(2):
        convert("-n", "-c", "-f", "raw", "-O", "qcow2", disk, target)
        same(disk, "raw", target, "qcow2")
        support.assert_clean(target)
    assert compressed(target) > 6 * MIB
    if snapshots:
        support.qemu_img("convert", "-l", "kept", "-O", "raw", target, tmp_path / "after.raw")
        assert support.digest(before) == support.digest(tmp_path / "after.raw")


@pytest.mark.parametrize("compress", [[], ["-c"]], ids=["by nature", "-c"])
def test_stream_optimized(compress, disk, tmp_path):
    ours, theirs = tmp_path / "ours.vmdk", tmp_path / "theirs.vmdk"
    chosen = ["-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    convert(*compress, *chosen, disk, ours)
    support.qemu_img("convert", *chosen, disk, theirs)
    same(disk, "raw", ours, "vmdk")
    support.assert_clean(ours, fmt="vmdk")
    # Without -c, it is the fastest level of deflate: a sixth more.
    assert ours.stat().st_blocks < theirs.stat().st_blocks * (1.05 if compress else 1.25)


@pytest.mark.parametrize("fmt", ["raw", "vmdk", "vdi", "vpc", "vhdx", "qcow", "parallels"])
def test_formats_without_compression(fmt, disk, tmp_path):
    target = tmp_path / "target"
    for options in ([], ["--output", "json"]):
        result = support.run_instar("convert", "-c", "-f", "raw", "-O", fmt, *options, disk, target)
        support.assert_refused(result, "ERROR_UNSUPPORTED_FORMAT", "target", "leave out -c")
    assert os.listdir(tmp_path) == []
    support.create(target, 24 * MIB, fmt=fmt)
    with support.untouched(target):
        result = support.run_instar("convert", "-n", "-c", "-f", "raw", "-O", fmt, disk, target)
        support.assert_refused(result, "ERROR_UNSUPPORTED_FORMAT", "leave out -c")


def test_no_preallocation(disk, tmp_path):
    result = convert("-c", "-f", "raw", "-O", "qcow2", "-o", "preallocation=metadata", disk, tmp_path / "target", rc=2)
    assert "preallocation" in result.stderr and result.stderr.count("\n") == 1 and os.listdir(tmp_path) == []
    convert("-c", "-f", "raw", "-O", "qcow2", "-o", "preallocation=off", disk, tmp_path / "target")
