"""Images that were not closed cleanly: the dirty bit, wrong refcounts and COPIED flags, on either side."""

from __future__ import annotations

import random

import pytest
import qcow2_bytes
import support
from support import KIB, MIB, refuse
from test_snapshots import snapshot_hashes

LAZY = {"lazy_refcounts": "on"}
SIDES = [("top",), ("base",), ("top", "base")]


def crash(path, *commands):
    """Writes, and dies before the refcounts are written."""
    args = [part for command in (*commands, "flush", "abort") for part in ("-c", command)]
    result = support.run("qemu-io", "-f", "qcow2", *args, path)
    assert result.rc != 0 and "failed" not in result.stdout, str(result)
    assert qcow2_bytes.Image(path).dirty


def commit(pair, *options, **more):
    """Commits, against qemu-img; then both files are as good as any other."""
    kept = snapshot_hashes(pair.base)
    lazy = {path: qcow2_bytes.Image(path).get("compatible") for path in (pair.base, pair.top)}
    result = pair.check_commit(*options, repair=[pair.base, pair.top], **more)
    assert snapshot_hashes(pair.base) == kept
    for path, flags in lazy.items():
        image = qcow2_bytes.Image(path)
        assert not image.dirty
        assert image.get("compatible") == flags, "lazy_refcounts is to stay"
    return result


@pytest.mark.parametrize("sides", SIDES, ids="+".join)
@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
def test_died_while_writing(pair, sides, cluster_size):
    options = {**LAZY, "cluster_size": cluster_size}
    pair.make(8 * MIB, base_options=options, top_options=options, base=["write -P 1 0 2M"], top=["write -P 2 1M 64k"])
    if "base" in sides:
        crash(pair.base, "write -P 3 3M 2M", "write -z 0 128k")
    if "top" in sides:
        crash(pair.top, "write -P 4 1500k 3M", "write -z 5M 512k")
    if cluster_size > 512:
        # With many small blocks, qemu may have written enough of them.
        wrong = support.run("qemu-img", "check", getattr(pair, sides[0]))
        assert wrong.rc != 0, "the test does not test anything"
    commit(pair)
    # The overlay goes on.
    crash(pair.top, "write -P 5 0 100k")
    commit(pair)


@pytest.mark.parametrize("sides", SIDES, ids="+".join)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_any_refcounts_of_any_width(pair, sides, bits):
    options = {"cluster_size": 4096, "refcount_bits": bits}
    pair.make(6 * MIB, base_options=options, top_options=options,
              base=["write -P 1 0 2M", "write -z 3M 64k"], top=["write -P 2 1M 2M", "write -z 100k 64k", "write -P 3 5M 512"])
    for side in sides:
        qcow2_bytes.Image(getattr(pair, side)).spoil_refcounts(random.Random(bits))
    commit(pair)


@pytest.mark.parametrize("sides", SIDES, ids="+".join)
@pytest.mark.parametrize("cluster_size", [512, 64 * KIB])
def test_snapshots_and_compressed_clusters(pair, sides, cluster_size):
    options = {**LAZY, "cluster_size": cluster_size}
    chunk = max(cluster_size, 4096)
    packed = [f"write -c -P {n + 1} {MIB + n * chunk} {chunk}" for n in range(9)]
    pair.make(4 * MIB, base_options=options, top_options=options, base=["write -P 1 0 1M", *packed],
              top=["write -P 2 512k 700k", *(f"write -c -P 7 {3 * MIB + n * chunk} {chunk}" for n in range(3))])
    for path in (pair.base, pair.top):
        support.qemu_img("snapshot", "-c", "one", path)
        support.qemu_io(path, "write -P 9 600k 200k")
        support.qemu_img("snapshot", "-c", "two", path)
    if "base" in sides:
        crash(pair.base, "write -P 11 0 300k", "write -P 12 2M 100k")
    if "top" in sides:
        crash(pair.top, "write -P 13 200k 300k", "write -P 14 2500k 100k")
    if cluster_size == 512:
        for side in sides:
            qcow2_bytes.Image(getattr(pair, side)).spoil_refcounts(random.Random(7))
    commit(pair)
    # They see what was committed where they hold nothing.
    assert snapshot_hashes(pair.top) == snapshot_hashes(pair.copies / "top.qcow2")


@pytest.mark.parametrize("bits", [1, 16])
def test_extended_l2_entries_in_the_overlay(pair, bits):
    pair.make(6 * MIB, base=["write -P 1 0 2M"],
              top_options={**LAZY, "extended_l2": "on", "cluster_size": 16 * KIB, "refcount_bits": bits},
              top=["write -P 2 1M 2M", "write -z 100k 2k", "write -P 3 5M 512"])
    crash(pair.top, "write -P 4 4M 300k", "write -P 5 10k 1k")
    qcow2_bytes.Image(pair.top).spoil_refcounts(random.Random(bits))
    commit(pair)


def test_bitmaps_of_the_overlay(pair):
    pair.make(6 * MIB, base=["write -P 1 0 2M"], top_options={**LAZY, "cluster_size": 4096})
    support.qemu_img("bitmap", "--add", "-g", "64k", pair.top, "first")
    support.qemu_img("bitmap", "--add", pair.top, "second")
    support.qemu_io(pair.top, "write -P 2 1M 2M")
    image = qcow2_bytes.Image(pair.top)
    image.spoil_refcounts(random.Random(3))
    bitmaps = support.info(pair.top)["format-specific"]["data"]["bitmaps"]
    commit(pair)
    assert support.info(pair.top)["format-specific"]["data"]["bitmaps"] == bitmaps


@pytest.mark.parametrize("side", ["top", "base"])
def test_tables_past_the_end_of_the_disk(pair, side):
    """L1 entries for the state of a virtual machine, which was saved in a snapshot, count, too."""
    options = {"cluster_size": 4096}
    pair.make(base_options=options, top_options=options, base=["write -P 1 0 2M"], top=["write -P 2 1M 2M"])
    path = getattr(pair, side)
    image = qcow2_bytes.Image(path)
    end = -(-image.file_size // 4096) * 4096
    image.poke(end, bytes(4096))
    image.poke64(image.l1_at(image.get("l1_size")), end | qcow2_bytes.COPIED)
    image.set("l1_size", image.get("l1_size") + 1)
    image.spoil_refcounts(random.Random(5))
    commit(pair)


@pytest.mark.parametrize("side", ["top", "base"])
def test_leaks_are_given_back(pair, side):
    """Refcounts that are too high, also past the end of the file."""
    pair.make(base=["write -P 1 0 2M"], top=["write -P 2 1M 2M"])
    image = qcow2_bytes.Image(getattr(pair, side))
    image.set("incompatible", 1)
    for cluster in range(20, image.file_size // image.cluster_size + 100):
        image.set_refcount(cluster * image.cluster_size, 9)
    commit(pair)


def test_nothing_to_commit(pair):
    pair.make(base_options=LAZY, top_options=LAZY)
    crash(pair.base, "write -P 1 0 1M")
    commit(pair)


def test_keep_and_dry_run(pair):
    pair.make(base_options=LAZY, top_options=LAZY)
    crash(pair.base, "write -P 1 0 1M")
    crash(pair.top, "write -P 2 512k 1M")
    with support.untouched(pair.base, pair.top):
        support.commit(pair.top, "--dry-run")
    content = support.content_hash(pair.top)
    with support.untouched(pair.top):
        support.commit(pair.top, "-d")
    assert support.content_hash(pair.base) == content
    support.assert_clean(pair.base)


def test_an_ancestor_is_only_read(pair):
    support.create(pair.dir / "root.qcow2", 4 * MIB, **LAZY)
    crash(pair.dir / "root.qcow2", "write -P 1 0 2M")
    support.create(pair.base, backing="root.qcow2")
    support.create(pair.top, backing="base.qcow2", cluster_size=4096)
    support.qemu_io(pair.top, "write -P 2 1M 10k")
    with support.untouched(pair.dir / "root.qcow2"):
        pair.check_commit(repair=[pair.dir / "root.qcow2"])


@pytest.mark.parametrize("side", ["top", "base"])
def test_missing_refcount_block(pair, side):
    options = {"cluster_size": 512}
    pair.make(base_options=options, top_options=options, base=["write -P 1 0 1M"], top=["write -P 2 512k 1M"])
    image = qcow2_bytes.Image(getattr(pair, side))
    image.set("incompatible", 1)
    for index in (0, 3):
        image.poke64(image.get("refcount_table_offset") + 8 * index, 0)
    commit(pair)


@pytest.mark.parametrize("side", ["top", "base"])
def test_what_a_repair_does_not_help(pair, side):
    """An entry past the end of the file, where the commit would not have looked."""
    pair.make(base_options=LAZY, top_options=LAZY, base=["write -P 1 0 2M"], top=["write -P 2 0 1M"])
    path = getattr(pair, side)
    crash(path, "write -P 3 3M 64k")
    image = qcow2_bytes.Image(path)
    image.poke64(image.l2_at(48), image.end | qcow2_bytes.COPIED)
    code = "ERROR_OVERLAY_CORRUPT" if side == "top" else "ERROR_BACKING_CORRUPT"
    refuse(code, pair.top, files=[pair.base], mentions=[path, "past the end"])


def test_another_reason_to_refuse_comes_first(pair):
    """Neither file is repaired for a commit that does not happen."""
    pair.make(base_options=LAZY, top_options=LAZY, base=["write -P 1 0 2M"])
    crash(pair.base, "write -P 3 3M 64k")
    crash(pair.top, "write -P 2 0 1M")
    image = qcow2_bytes.Image(pair.base)
    image.poke64(image.l2_at(1), image.l2_at(0) & ~0xFFFF | qcow2_bytes.COPIED)
    refuse("ERROR_BACKING_CORRUPT", pair.top, files=[pair.base])
