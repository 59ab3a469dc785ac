"""`--resize-backing`: a smaller backing grows to the overlay's virtual size.

qemu-img grows it without being asked. What a guest of the overlay reads must stay as it was; qemu-img is held against
that, too, where it does it right.
"""

from __future__ import annotations

import pytest

import dirty_bitmaps
import qcow2_bytes
import support
from support import GIB, KIB, MIB, TIB, assert_clean, assert_same_content, qemu_img, qemu_io, refuse

OPTION = "--resize-backing"


def grow(pair, size, **options):
    """Refused without the option; with it as qemu-img, and the same for the overlay as before."""
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", pair.top, files=[pair.base],
           mentions=["exceeds backing virtual size", OPTION])
    with support.untouched(pair.top, pair.base):
        support.commit(pair.top, OPTION, "--dry-run")
    result = pair.check_commit(OPTION, **options)
    assert support.virtual_size(pair.base) == size
    # A second commit has nothing to do, and needs no option any more.
    with support.untouched(pair.base):
        support.commit(pair.top)
    return result


def ends(size, pattern, length=64 * KIB):
    """Writes at the very end of a disk."""
    return f"write -P {pattern} {size - length} {length}"


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize(
    ("cluster_size", "small", "large"),
    [
        (65536, 4 * MIB, 8 * MIB),  # the L1 table stays
        (65536, 4 * MIB, 3 * GIB),  # it grows where it is
        (512, 4 * MIB, 300 * MIB),  # it moves
        (4096, MIB, 20 * GIB),
        (2 * MIB, 4 * MIB, 8 * TIB),
        (65536, 0, 8 * MIB),
        (65536, 64 * KIB + 512, 64 * KIB + 1024),
        (65536, 100 * KIB, 5 * MIB + 512),
        (65536, 4 * MIB + 512, 4 * MIB + 64 * KIB),
    ],
)
def test_as_qemu_img(pair, compat, cluster_size, small, large):
    options = {"cluster_size": cluster_size, "compat": compat}
    length = min(large, 64 * KIB)
    pair.make(small, top_size=large, base_options=options, top_options=options,
              base=[f"write -P 1 0 {small}"] if small else (),
              top=["write -P 2 1k 5k", ends(large, 3, length), f"write -z {large // 2 & ~511} 512"])
    grow(pair, large)


@pytest.mark.parametrize(("top", "base"), [(512, 65536), (65536, 512), (2 * MIB, 4096), (4096, 2 * MIB)])
def test_other_cluster_sizes(pair, top, base):
    small, large = 5 * MIB + 1536, 70 * MIB + 512
    pair.make(small, top_size=large, base_options={"cluster_size": base}, top_options={"cluster_size": top},
              base=["write -P 1 1M 4M", ends(small, 4, 512)], top=["write -P 2 5M 3k", ends(large, 3, 1536)])
    grow(pair, large)


def test_an_overlay_that_holds_nothing(pair):
    pair.make(4 * MIB, top_size=GIB, base=["write -P 1 0 4M"])
    grow(pair, GIB)


def test_keeping_the_overlay(pair):
    pair.make(4 * MIB, top_size=8 * MIB, top=["write -P 1 3M 4M"])
    before = support.flatten(pair.top, pair.dir / "before.qcow2")
    with support.untouched(pair.top):
        support.commit(pair.top, OPTION, "-d")
    assert_same_content(pair.base, before)
    assert_clean(pair.base)


def test_json_has_the_usual_keys(pair):
    pair.make(4 * MIB, top_size=8 * MIB, top=["write -P 1 5M 64k"])
    result = support.commit(pair.top, OPTION, "--output", "json")
    assert set(result.json) == {
        "overlay", "overlay_format", "backing", "backing_format", "clusters_committed", "bytes_committed",
        "overlay_clusters_cleared", "sandbox",
    }
    assert result.json["clusters_committed"] == 1


def test_the_option_without_need(pair):
    pair.make(8 * MIB, top_size=4 * MIB, base=["write -P 9 0 8M"], top=["write -P 1 1M 64k"])
    pair.check_commit(OPTION)
    assert support.virtual_size(pair.base) == 8 * MIB


@pytest.mark.parametrize("top", [(), ["write -P 3 90k 20k"], ["write -P 3 110k 1k"], ["write -z 64k 64k"]],
                         ids=["nothing", "across the end", "behind it", "zeroes"])
@pytest.mark.parametrize("write", ["write -P 9", "write -c -P 9"])
def test_what_a_shrunk_backing_left_in_its_last_cluster(pair, top, write):
    """qemu-img lets it come to light: it is no reference here."""
    pair.make(128 * KIB, top_size=128 * KIB, base=[f"{write} 0 64k", f"{write} 64k 64k"])
    qemu_img("resize", "-q", "--shrink", pair.base, str(100 * KIB))
    support.create(pair.top, 200 * KIB, backing="base.qcow2")
    if top:
        qemu_io(pair.top, *top)
    before = support.flatten(pair.top, pair.dir / "before.qcow2")
    support.commit(pair.top, OPTION)
    assert_same_content(pair.base, before)
    assert_same_content(pair.top, before)
    assert_clean(pair.base)


def with_ancestor(pair, size, ancestor_size, large, **base_options):
    """An ancestor full of data below the backing; the overlay holds some clusters past the backing's end."""
    support.create(pair.dir / "ancestor.qcow2", ancestor_size)
    qemu_io(pair.dir / "ancestor.qcow2", f"write -P 7 0 {ancestor_size}")
    support.create(pair.base, size, backing="ancestor.qcow2", **base_options)
    qemu_io(pair.base, "write -P 1 0 64k")
    support.create(pair.top, large, backing="base.qcow2")
    qemu_io(pair.top, "write -P 2 512k 100k", f"write -P 3 {size + 200 * KIB} 100k", ends(large, 4))


@pytest.mark.parametrize("size", [MIB, MIB + 1536])
@pytest.mark.parametrize("ancestor_size", [512 * KIB, MIB + 1024, 3 * MIB, 20 * MIB])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_a_longer_ancestor_stays_hidden(pair, size, ancestor_size, cluster_size):
    with_ancestor(pair, size, ancestor_size, 12 * MIB, cluster_size=cluster_size)
    grow(pair, 12 * MIB)


def test_a_longer_ancestor_below_version_2(pair):
    """There are no zero clusters to hide it with; qemu-img refuses as well."""
    with_ancestor(pair, MIB, 3 * MIB, 12 * MIB, compat="0.10")
    copy = support.copy(pair.top, pair.dir / "copy.qcow2")
    qemu_img("commit", "-q", copy, rc=1)
    copy.unlink()
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, OPTION, files=[pair.base], mentions=[pair.base, "version 2"])


def test_snapshots_of_the_backing_keep_size_and_content(pair):
    small, large = MIB + 1536, 600 * MIB
    options = {"cluster_size": 4096}
    pair.make(small, top_size=large, base_options=options, base=["write -P 1 0 500k", ends(small, 5)])
    qemu_img("snapshot", "-c", "kept", pair.base)
    was = pair.dir / "was.raw"
    qemu_img("convert", "-l", "kept", "-O", "raw", pair.base, was)
    qemu_io(pair.base, "write -P 6 200k 100k")
    qemu_io(pair.top, "write -P 2 0 300k", ends(large, 3))
    pair.check_commit(OPTION)
    now = pair.dir / "now.raw"
    qemu_img("snapshot", "-a", "kept", pair.base)
    qemu_img("convert", "-O", "raw", pair.base, now)
    assert was.read_bytes()[:small] == now.read_bytes()


def test_snapshots_of_version_2(pair):
    """They do not record their size; qemu-img refuses as well."""
    pair.make(MIB, top_size=2 * MIB, base_options={"compat": "0.10"}, top=["write -P 1 0 64k"])
    qemu_img("snapshot", "-c", "one", pair.base)
    copy = support.copy(pair.top, pair.dir / "copy.qcow2")
    qemu_img("commit", "-q", copy, rc=1)
    copy.unlink()
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, OPTION, files=[pair.base], mentions=[pair.base, "snapshots"])


@pytest.mark.parametrize("granularity", [512, 64 * KIB])
@pytest.mark.parametrize(("cluster_size", "small", "large"),
                         [(65536, MIB, 40 * GIB), (512, MIB + 512, 140 * MIB), (4096, 100 * MIB, 101 * MIB)])
def test_bitmaps_of_the_backing(pair, cluster_size, small, large, granularity):
    """QEMU opens no image whose bitmaps are not as long as its disk."""
    options = {"cluster_size": cluster_size}
    pair.make(small, top_size=large, base_options=options, top_options={"cluster_size": 4096},
              base=["write -P 1 0 300k"], top=["write -P 2 64k 64k", ends(large, 3), "write -z 512k 64k"])
    dirty_bitmaps.add(pair.base, "enabled", "-g", str(granularity))
    dirty_bitmaps.add(pair.base, "disabled", "-g", str(granularity))
    qemu_io(pair.base, "write -P 4 8k 8k")
    qemu_img("bitmap", "--disable", pair.base, "disabled")
    names = dirty_bitmaps.names(pair.base)
    before = {name: dirty_bitmaps.dirty(pair.base, name) for name in names}
    came = dirty_bitmaps.held(pair.top)
    grow(pair, large)
    assert dirty_bitmaps.names(pair.base) == names
    assert dirty_bitmaps.dirty(pair.base, "disabled") == before["disabled"]
    after = dirty_bitmaps.dirty(pair.base, "enabled")
    assert after == dirty_bitmaps.merge([*before["enabled"], *dirty_bitmaps.rounded(came, granularity, large)])
    theirs = dirty_bitmaps.dirty(pair.copies / pair.base.name, "enabled")
    assert dirty_bitmaps.within(after, theirs)


def test_bitmaps_that_would_be_too_long(pair):
    pair.make(MIB, top_size=3 * TIB, top=["write -P 1 0 64k"])
    dirty_bitmaps.add(pair.base, "b", "-g", "512")
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, OPTION, files=[pair.base], mentions=[pair.base, "bitmap 1"])


@pytest.mark.parametrize("where", ["l2", "l1"])
def test_what_is_mapped_past_the_end(pair, where):
    large = 2 * GIB if where == "l1" else 8 * MIB
    pair.make(large, top_size=large, base=["write -P 1 0 64k", ends(large, 2)])
    qcow2_bytes.Image(pair.base).set("size", MIB)
    refuse("ERROR_BACKING_CORRUPT", pair.top, OPTION, files=[pair.base],
           mentions=[pair.base, "past the end of the virtual disk"])


def test_a_size_that_qemu_does_not_know(pair):
    pair.make(MIB, top_size=2 * MIB, top=["write -P 1 0 64k"])
    qcow2_bytes.Image(pair.top).set("size", 2 * MIB - 100)
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, OPTION, files=[pair.base], mentions=["multiple of 512"])


def test_tables_that_would_be_too_large(pair):
    pair.make(MIB, top_size=MIB, base_options={"cluster_size": 512})
    support.create(pair.top, 256 * GIB, backing="base.qcow2")
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, OPTION, files=[pair.base], mentions=[pair.base, "larger clusters"])
