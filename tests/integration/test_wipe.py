"""`commit --wipe`: what the overlay gives back is gone from the disk, not only from the file.

The oracle is the disk itself: an ext4 in a file, in which the overlay lies alone, is searched for the overlay's data once it is
unmounted.
"""

from __future__ import annotations

import os
import subprocess

import pytest
import support
from support import MIB
from test_devices import Loop

#: What the overlay holds: 512 bytes of it in a row are nowhere else.
MARK = b"\xa7" * 512
#: Mounts $1, an empty file system that tells nobody what is free, puts the overlay $2 there, and has $3 … commit it.
ON_DISK = """
set -e
disk=$1 overlay=$2; shift 2
place=$(mktemp -d)
mount -o loop,nodiscard "$disk" "$place"
cp --sparse=always "$overlay" "$place"
sync
status=0; "$@" "$place/$(basename "$overlay")" || status=$?
umount "$place"; rmdir "$place"
exit $status
"""
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


def child(folder, fmt, *writes, **options):
    """An overlay of this format over a base that lies elsewhere, and what it holds."""
    base, path = folder / f"base.{fmt}", folder / f"top.{fmt}"
    support.qemu_img("create", "-q", "-f", fmt, base, "16M")
    if fmt == "qcow2":
        support.create(path, backing=base, **options)
    elif fmt == "parallels":
        support.qemu_img("create", "-q", "-f", fmt, path, "16M")
    else:
        made = support.run_instar("create", "-q", "-f", fmt, "-b", base, "-F", fmt, path)
        assert made.rc == 0, str(made)
        if fmt == "vdi":
            # It records an identity, and looks for a file of that name.
            (folder / support.run_instar("info", "--output", "json", path).json["backing-filename"]).symlink_to(base.name)
    # QEMU writes no differencing VHD or VHDX: a commit from a qcow2 does.
    source = support.create(folder / "source.qcow2", 16 * MIB)
    support.qemu_io(source, *writes)
    support.qemu_img("rebase", "-u", "-b", path, "-F", fmt, source)
    named = ["-b", path]
    support.commit(source, *named)
    return base, path


def on_disk(tmp_path, overlay, *options):
    """Commits an overlay that lies alone on a disk; how that ended, and what the disk holds afterwards."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(96 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0", disk], check=True)
    result = support.run("unshare", "--mount", "sh", "-c", ON_DISK, "sh", disk, overlay,
                         support.instar_binary(), "commit", "--ignore-siblings", *options)
    assert result.rc == 0, str(result)
    return result, disk.read_bytes()


WRITES = ["write -P 0xa7 0 1M", "write -P 0xa7 3M 64k", "write -P 0xa7 5000k 4k", "write -P 0xa7 12M 3M"]


@pytest.mark.parametrize("fmt", ["qcow2", "qcow", "vmdk", "vdi", "vpc", "vhdx", "parallels"])
def test_what_was_committed_is_gone(tmp_path, fmt):
    base, overlay = child(tmp_path, fmt, *WRITES)
    before = support.copy(base, tmp_path / "before")
    _, left = on_disk(tmp_path, overlay, "-b", base)
    assert MARK in left, "a commit alone leaves it on the disk: else this test shows nothing"
    committed = base.read_bytes()
    support.copy(before, base)
    result, left = on_disk(tmp_path, overlay, "-b", base, "--wipe", "--output", "json")
    assert MARK not in left, left.index(MARK)
    assert support.qemu_img("compare", "-f", fmt, "-F", fmt, before, base, rc=None).rc == 1
    assert MARK in base.read_bytes() and MARK in committed
    assert 4 * MIB < result.json["overlay_bytes_wiped"] < 32 * MIB


@pytest.mark.parametrize("options", [
    {"cluster_size": "512"}, {"cluster_size": "2M"}, {"extended_l2": "on"}, {"compat": "0.10"}, {"lazy_refcounts": "on"},
], ids=lambda options: "-".join(options))
def test_variants_of_qcow2(tmp_path, options):
    base, overlay = child(tmp_path, "qcow2", *WRITES, **options)
    _, left = on_disk(tmp_path, overlay, "-b", base, "--wipe")
    assert MARK not in left and MARK in base.read_bytes()


def test_what_a_snapshot_holds_stays(tmp_path):
    """It is not given back. What came after it is."""
    base, overlay = child(tmp_path, "qcow2", "write -P 0x55 0 1M")
    support.qemu_img("snapshot", "-c", "before", overlay)
    support.qemu_io(overlay, *WRITES)
    _, left = on_disk(tmp_path, overlay, "-b", base, "--wipe")
    assert MARK not in left and b"\x55" * 512 in left and MARK in base.read_bytes()


def test_a_second_run_wipes_what_the_first_left(tmp_path, pair):
    """Killed while it empties, and run again: nothing is left, whatever the first run had given back."""
    pair.make(16 * MIB, top=WRITES)
    expected = support.content_hash(pair.top)
    for delay in (1, 2, 3):
        killed = subprocess.run(["timeout", "-s", "KILL", f"0.{delay}", support.instar_binary(), "commit", "--wipe", "-r", "20M",
                                 pair.top], capture_output=True, check=False)
        assert support.content_hash(pair.top) == expected, killed
    support.commit(pair.top, "--wipe")
    assert support.content_hash(pair.base) == expected and MARK not in pair.top.read_bytes()
    support.assert_clean(pair.top)


def test_a_block_device_is_overwritten_to_its_end(tmp_path):
    """Nothing cuts it: what was behind the end of the image is gone, too. What reads as zeroes is not written."""
    base = support.create(tmp_path / "base", 16 * MIB)
    with Loop(tmp_path / "disk", 24 * MIB) as device:
        support.create(device, backing=base)
        support.qemu_io(device, *WRITES)
        support.commit(device, "--wipe", "-b", base)
        left = (tmp_path / "disk").read_bytes()
        assert MARK not in left
        assert not left[MIB:].strip(b"\0"), "the tables of an empty image of this size are before that"
        support.assert_clean(device)
    assert MARK in base.read_bytes()


def test_a_hole_stays_one(pair):
    """Zeroes are written over data alone: an overlay with 1 GiB of preallocated clusters is wiped at once."""
    pair.make(1024 * MIB, top=["write -P 0xa7 0 64k"], top_options={"preallocation": "metadata", "extended_l2": "on"})
    result = support.commit(pair.top, "--wipe", "--output", "json")
    assert result.json["overlay_bytes_wiped"] < 4 * MIB


@pytest.mark.parametrize(("options", "words"), [
    (["-t", "unsafe"], "-t unsafe flushes nothing"),
    (["-b", "base"], "commit one layer at a time"),
])
def test_what_would_mean_nothing_is_refused(tmp_path, options, words):
    support.create(tmp_path / "base", MIB)
    support.create(tmp_path / "mid", backing="base", cwd=tmp_path)
    support.create(tmp_path / "top", backing="mid", cwd=tmp_path)
    support.qemu_io(tmp_path / "top", "write 0 64k")
    with support.untouched(*(tmp_path / name for name in ("base", "mid", "top"))):
        result = support.run_instar("commit", "--wipe", *options, tmp_path / "top", cwd=tmp_path)
        kept = support.run_instar("commit", "--wipe", "-d", tmp_path / "top")
    assert result.rc == 2 and words in result.stderr and "ERROR_BAD_USAGE" in result.stderr, str(result)
    assert kept.rc == 2 and "cannot be used with" in kept.stderr, str(kept)
    support.commit(tmp_path / "top", "--wipe")


def test_a_file_system_that_writes_elsewhere_is_named(tmp_path):
    base = support.create(tmp_path / "base", MIB)
    overlay = support.create(tmp_path / "top", backing=base)
    support.qemu_io(overlay, "write 0 64k")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", disk], check=True)
    result = support.run("unshare", "--mount", "sh", "-c", ON_DISK, "sh", disk, overlay, support.instar_binary(), "commit",
                         "--ignore-siblings", "-b", base, "--wipe")
    assert result.rc == 0 and "lies on btrfs" in result.stderr and "--wipe does not remove it" in result.stderr, str(result)
