"""Persistent bitmaps of the backing: enabled ones record what is committed, others stay. qemu reads them."""

import random

import dirty_bitmaps
import pytest
import qcow2_bytes
import support
from dirty_bitmaps import add, dirty, held, rounded, within
from support import KIB, MIB, refuse
from test_snapshots import snapshot_hashes

IN_USE, AUTO = 1, 2


def check_bitmaps(pair, *options):
    """Commits, and holds every bitmap of the backing against what it was, what came, and what qemu-img makes of it."""
    found = dirty_bitmaps.names(pair.base)
    saved = {name: bitmap for name, bitmap in found.items() if "in-use" not in bitmap["flags"]}
    before = {name: dirty(pair.base, name) for name in saved}
    raw = qcow2_bytes.Image(pair.base)
    kept = {name: raw.bitmap_bytes(bitmap) for name, bitmap in raw.bitmaps().items() if bitmap.flags != AUTO}
    came = held(pair.top)
    pair.check_commit(*options)
    assert dirty_bitmaps.names(pair.base) == found
    size = support.virtual_size(pair.base)
    for name, bitmap in saved.items():
        after = dirty(pair.base, name)
        if "auto" in bitmap["flags"]:
            assert after == dirty_bitmaps.merge([*before[name], *rounded(came, bitmap["granularity"], size)]), name
            # qemu-img copies whole pieces of the backing's cluster size, 4 KiB at least.
            assert within(after, dirty(pair.copies / pair.base.name, name)), name
        else:
            assert after == before[name] == dirty(pair.copies / pair.base.name, name), name
    for name, content in kept.items():
        assert raw.bitmap_bytes(raw.bitmaps()[name]) == content, name
    assert raw.get("autoclear") == qcow2_bytes.Image(pair.copies / pair.base.name).get("autoclear")


def spoil_flags(path, name, flags):
    image = qcow2_bytes.Image(path)
    image.poke(image.bitmaps()[name].at + 12, flags.to_bytes(4, "big"))


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, 16 * MIB])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
def test_what_qemu_records_is_recorded(pair, cluster_size, granularity):
    size = 20 * MIB + 1536
    pair.make(size, base_options={"cluster_size": cluster_size}, base=["write -P 1 0 6M"],
              top_options={"cluster_size": cluster_size})
    add(pair.base, "from-now-on", "-g", str(granularity))
    support.qemu_io(pair.base, "write -P 2 7M 64k", "write -P 2 0 512")
    add(pair.base, "later", "-g", str(granularity))
    support.qemu_io(pair.top, "write -P 9 1M 300k", "write -z 3M 1M", "write -P 7 512 1k",
                    f"write -P 5 {20 * MIB} 1536")
    check_bitmaps(pair)
    # What both copy in whole clusters is recorded alike.
    if cluster_size >= 4096:
        for name in ("from-now-on", "later"):
            if cluster_size <= 64 * KIB:
                assert dirty(pair.base, name) == dirty(pair.copies / "base.qcow2", name)


@pytest.mark.parametrize("sizes", [(512, 65536), (65536, 512), (4096, 2 * MIB), (2 * MIB, 4096)])
def test_clusters_of_other_sizes(pair, sizes):
    pair.make(20 * MIB, base_options={"cluster_size": sizes[0]}, top_options={"cluster_size": sizes[1]},
              base=["write -P 1 0 6M"], top=["write -P 9 1M 300k", "write -z 3M 1M", "write -P 7 19M 1M"])
    for granularity in (512, 32 * KIB, MIB):
        add(pair.base, f"g{granularity}", "-g", str(granularity))
    check_bitmaps(pair)


def test_disabled_and_unsaved_ones_stay(pair):
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 512k 1M", "write -z 3M 128k"])
    for name in ("enabled", "disabled", "unsaved", "unsaved-and-enabled"):
        add(pair.base, name)
    support.qemu_io(pair.base, "write -P 3 2M 64k")
    support.qemu_img("bitmap", "--disable", pair.base, "disabled")
    spoil_flags(pair.base, "unsaved", IN_USE)
    spoil_flags(pair.base, "unsaved-and-enabled", IN_USE | AUTO)
    check_bitmaps(pair)
    assert dirty(pair.base, "disabled") == [(2 * MIB, 2 * MIB + 64 * KIB)]


def test_all_ones_in_a_table(pair):
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 512k 1M"])
    add(pair.base, "full")
    image = qcow2_bytes.Image(pair.base)
    table = image.bitmaps()["full"].table
    assert image.peek64(table) == 0
    image.poke64(table, 1)
    pair.check_commit()
    assert image.peek64(table) == 1
    assert dirty(pair.base, "full") == [(0, 4 * MIB)]


def test_qemu_goes_on_with_them(pair):
    pair.make(top=["write -P 2 512k 1M"])
    add(pair.base, "one")
    add(pair.base, "two", "-g", "512")
    support.qemu_io(pair.base, "write -P 3 3M 64k")
    check_bitmaps(pair)
    support.qemu_io(pair.base, "write -P 4 2M 64k")
    support.assert_clean(pair.base)
    expected = [(512 * KIB, 1536 * KIB), (2 * MIB, 2 * MIB + 64 * KIB), (3 * MIB, 3 * MIB + 64 * KIB)]
    assert dirty(pair.base, "one") == dirty(pair.base, "two") == expected
    add(pair.base, "sum")
    support.qemu_img("bitmap", "--merge", "two", pair.base, "sum")
    assert dirty(pair.base, "sum") == expected
    for name in ("one", "two", "sum"):
        support.qemu_img("bitmap", "--remove", pair.base, name)
        support.assert_clean(pair.base)
    support.qemu_io(pair.top, "write -P 6 100k 300k")
    pair.check_commit()


def test_bitmaps_and_snapshots_on_both_sides(pair):
    pair.make(8 * MIB, base=["write -P 1 0 6M"])
    add(pair.base, "before", "-g", "4096")
    support.qemu_img("snapshot", "-c", "first", pair.base)
    support.qemu_io(pair.base, "write -P 2 1M 2M", "write -z 4M 512k")
    add(pair.base, "after")
    support.qemu_img("snapshot", "-c", "second", pair.base)
    add(pair.top, "of-the-overlay")
    support.qemu_io(pair.top, "write -P 9 1M 300k", "write -P 8 5M 2M", "write -z 3M 1M")
    kept = snapshot_hashes(pair.base)
    check_bitmaps(pair)
    assert snapshot_hashes(pair.base) == kept


def test_a_large_disk_with_fine_granules(pair):
    """32 MiB of bits, in clusters all over the place."""
    size = 128 * support.GIB
    pair.make(size, top=[f"write -P {n} {n * 5000 * MIB} 64k" for n in range(1, 26)])
    add(pair.base, "fine", "-g", "512")
    check_bitmaps(pair)


@pytest.mark.parametrize("seed", range(8))
def test_random_bitmaps(pair, seed):
    rng = random.Random(4000 + seed)
    disk = rng.randrange(2 * MIB, 12 * MIB, 512)
    sizes = [rng.choice([512, 4 * KIB, 64 * KIB]) for _ in range(2)]

    def writes(count):
        for number in range(count):
            at = rng.randrange(0, disk - 512, 512)
            length = min(rng.choice([512, 4096, 69_632, 300 * KIB]), disk - at)
            yield rng.choice([f"write -P {number + 1} {at} {length}", f"write -z {at} {length}"])

    pair.make(disk, base_options={"cluster_size": sizes[0]}, top_options={"cluster_size": sizes[1]})
    for number in range(rng.randrange(1, 6)):
        add(pair.base, f"b{number}", "-g", str(512 << rng.randrange(12)))
        support.qemu_io(pair.base, *writes(rng.randrange(1, 6)))
        if rng.random() < 0.3:
            support.qemu_img("bitmap", "--disable", pair.base, f"b{number}")
        if rng.random() < 0.3:
            support.qemu_img("snapshot", "-c", f"s{number}", pair.base)
    for _ in range(2):
        support.qemu_io(pair.top, *writes(rng.randrange(1, 12)))
        check_bitmaps(pair)


def test_without_the_autoclear_bit_they_are_stale(pair):
    """qemu drops the extension when it writes; here all stays, and stays stale."""
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 512k 1M"])
    add(pair.base, "stale")
    image = qcow2_bytes.Image(pair.base)
    image.set("autoclear", 0)
    before = image.bitmaps(), image.bitmap_bytes(image.bitmaps()["stale"])
    flat = support.flatten(pair.top, pair.dir.parent / "flat.qcow2")
    support.commit(pair.top)
    assert image.get("autoclear") == 0
    assert (image.bitmaps(), image.bitmap_bytes(image.bitmaps()["stale"])) == before
    support.assert_same_content(pair.base, flat)
    # To qemu the clusters are leaks, as they were before; once they are given back, all is well.
    support.qemu_img("check", "-q", "-r", "leaks", pair.base)
    support.assert_clean(pair.base)
    support.assert_same_content(pair.top, flat)


#: what is wrong: image, bitmap, where the extension's data begins
DAMAGE = {
    "directory past the end": lambda i, b, e: i.poke64(e + 16, i.end),
    "directory unaligned": lambda i, b, e: i.poke64(e + 16, b.at + 512),
    "directory too short": lambda i, b, e: i.poke64(e + 8, 8),
    "directory too long": lambda i, b, e: i.poke64(e + 8, 48),
    "more bitmaps than there are": lambda i, b, e: i.poke(e, b"\0\0\0\2"),
    "no bitmap": lambda i, b, e: i.poke(e, b"\0\0\0\0"),
    "reserved": lambda i, b, e: i.poke(e + 4, b"\0\0\0\1"),
    "table past the end": lambda i, b, e: i.poke64(b.at, i.end),
    "table on the L1 table": lambda i, b, e: i.poke64(b.at, i.get("l1_offset")),
    "table too large": lambda i, b, e: i.poke(b.at + 8, b"\xff\xff\xff\xff"),
    "granularity": lambda i, b, e: i.poke(b.at + 17, b"\x20"),
    "name": lambda i, b, e: i.poke(b.at + 18, b"\xff\xff"),
    "data past the end": lambda i, b, e: i.poke64(b.table, i.end),
    "data on the refcount table": lambda i, b, e: i.poke64(b.table, i.get("refcount_table_offset")),
    "data on guest data": lambda i, b, e: i.poke64(b.table, i.peek64(i.l2_at(16)) & qcow2_bytes.OFFSET),
    "reserved bits of a table entry": lambda i, b, e: i.poke64(b.table, i.peek64(b.table) | 1),
    "refcount 0": lambda i, b, e: i.set_refcount(i.peek64(b.table), 0),
    "refcount 2": lambda i, b, e: i.set_refcount(b.table, 2),
}


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_damaged_ones_are_refused(pair, spoil):
    pair.make()
    add(pair.base, "dirty")
    support.qemu_io(pair.base, "write -P 1 0 2M")
    # All of it is overwritten, which touches every cluster of guest data.
    support.qemu_io(pair.top, "write -P 2 0 2M")
    image = qcow2_bytes.Image(pair.base)
    spoil(image, image.bitmaps()["dirty"], image.extension(0x23852875))
    refuse("ERROR_BACKING_CORRUPT", pair.top, files=[pair.base], mentions=[pair.base])
