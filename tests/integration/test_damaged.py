"""Files that are no images, cut-off images, corrupt metadata: refused, and nothing changes."""

from __future__ import annotations

import os

import pytest
import qcow2_bytes
import support
from qcow2_bytes import COPIED, ZERO
from support import MIB, refuse

DATA = ["write -P 1 0 1M", "write -P 2 2M 512k"]


@pytest.fixture
def made(pair):
    """A pair with data on both sides."""
    return pair.make(base=["write -P 9 0 2M"], top=DATA)


# --- what is no image -------------------------------------------------------------------------------


def replace(path, kind):
    """Something that is no image in place of a file."""
    path.unlink()
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
        case "empty":
            path.touch()
        case "garbage":
            path.write_bytes(bytes(range(256)) * 4096)
        case "zeroes":
            path.write_bytes(bytes(MIB))
        case "magic":
            path.write_bytes(b"QFI\xfb" + bytes(100))


@pytest.mark.parametrize("side", ["top", "base"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "empty", "garbage", "zeroes", "magic"])
def test_no_image(made, side, kind):
    """A FIFO must not block, either. (What is refused as what: the file's kind, or the missing format.)"""
    path = getattr(made, side)
    replace(path, kind)
    for output in ([], ["--output", "json"]):
        with support.untouched(made.top, made.base):
            result = support.run_instar("commit", *output, made.top)
        assert result.rc == 1 and result.stdout == "", str(result)
        assert len(result.stderr.splitlines()) == 1 and path.name in result.stderr, str(result)
        if kind in ("directory", "fifo") and not output:
            support.assert_refused(result, "ERROR_OPEN_FAILED", path)
        if kind in ("directory", "fifo") and output:
            support.assert_refused(result, "ERROR_OPEN_FAILED")


@pytest.mark.parametrize(
    ("side", "keep"),
    [(side, keep) for side in ("top", "base") for keep in [3, 71, 100, 4096, 65536, 65537, 196608 + 8, 262144, -MIB, -65536]]
    + [("top", -512), ("top", -1)],
)
def test_truncated(made, side, keep):
    """Cut off in the header, the tables or the data. qemu-img reads zeroes there and calls it a success."""
    path = getattr(made, side)
    if side == "base":
        support.qemu_io(made.top, "write -P 3 0 2M")
    size = path.stat().st_size
    os.truncate(path, keep if keep > 0 else size + keep)
    for output in ([], ["--output", "json"]):
        with support.untouched(made.top, made.base):
            result = support.run_instar("commit", *output, made.top)
        assert result.rc == 1 and result.stdout == "", str(result)
        assert len(result.stderr.splitlines()) == 1 and path.name in result.stderr, str(result)


@pytest.mark.parametrize("lost", [65536, 512, 1])
def test_cut_off_backing_does_not_grow_over_its_loss(made, lost):
    """The commit does not meet the lost cluster, but new clusters at the end of the file would bring it back as zeroes."""
    os.truncate(made.base, made.base.stat().st_size - lost)
    refuse("ERROR_BACKING_CORRUPT", made.top, files=[made.base], mentions=[made.base])


# --- corrupt metadata -------------------------------------------------------------------------------

SPOIL = {
    "l1-beyond-end": lambda i: i.poke64(i.l1_at(), i.end | COPIED),
    "l1-far-beyond-end": lambda i: i.poke64(i.l1_at(), 1 << 50 | COPIED),
    "l1-unaligned": lambda i: i.poke64(i.l1_at(), i.peek64(i.l1_at()) + 512),
    "l1-reserved": lambda i: i.poke64(i.l1_at(), i.peek64(i.l1_at()) | 1 << 60),
    "l1-low-reserved": lambda i: i.poke64(i.l1_at(), i.peek64(i.l1_at()) | 2),
    "l1-copied-without-a-table": lambda i: i.poke64(i.l1_at(), COPIED),
    "l2-copied-without-a-cluster": lambda i: i.poke64(i.l2_at(), COPIED),
    "l1-onto-l1": lambda i: i.poke64(i.l1_at(), i.get("l1_offset") | COPIED),
    "l1-onto-refcounts": lambda i: i.poke64(i.l1_at(), i.get("refcount_table_offset") | COPIED),
    "l2-beyond-end": lambda i: i.poke64(i.l2_at(), i.end | COPIED),
    "l2-far-beyond-end": lambda i: i.poke64(i.l2_at(), 1 << 50 | COPIED),
    "l2-unaligned": lambda i: i.poke64(i.l2_at(), i.peek64(i.l2_at()) + 512),
    "l2-reserved": lambda i: i.poke64(i.l2_at(), i.peek64(i.l2_at()) | 1 << 60),
    "l2-low-reserved": lambda i: i.poke64(i.l2_at(), i.peek64(i.l2_at()) | 2),
    "l2-onto-l1": lambda i: i.poke64(i.l2_at(), i.get("l1_offset") | COPIED),
    "l2-onto-l2": lambda i: i.poke64(i.l2_at(), i.l2_at() | COPIED),
    "l2-onto-refcount-table": lambda i: i.poke64(i.l2_at(), i.get("refcount_table_offset") | COPIED),
    "l2-onto-refcount-block": lambda i: i.poke64(i.l2_at(), i.peek64(i.get("refcount_table_offset")) | COPIED),
    "l2-duplicate": lambda i: i.poke64(i.l2_at(1), i.peek64(i.l2_at(0))),
    "refcount-0-of-data": lambda i: i.set_refcount(i.peek64(i.l2_at()) & qcow2_bytes.OFFSET, 0),
    "refcount-0-of-l2": lambda i: i.set_refcount(i.l2_at(), 0),
    "refcount-table-beyond-end": lambda i: i.set("refcount_table_offset", i.end),
    "refcount-table-unaligned": lambda i: i.set("refcount_table_offset", i.get("refcount_table_offset") + 8),
    "refcount-block-beyond-end": lambda i: i.poke64(i.get("refcount_table_offset"), i.end),
    "refcount-block-unaligned": lambda i: i.poke64(i.get("refcount_table_offset"), i.peek64(i.get("refcount_table_offset")) + 512),
    "l1-table-beyond-end": lambda i: i.set("l1_offset", i.end),
    "l1-table-unaligned": lambda i: i.set("l1_offset", i.get("l1_offset") + 8),
    "l1-too-small": lambda i: i.set("l1_size", 0),
    "l1-enormous": lambda i: i.set("l1_size", 0xFFFF_FFFF),
    "corrupt-bit": lambda i: i.set("incompatible", 2),
    "cluster-bits-0": lambda i: i.set("cluster_bits", 0),
    "cluster-bits-63": lambda i: i.set("cluster_bits", 63),
    "size-enormous": lambda i: i.set("size", (1 << 64) - 1),
    "header-length-0": lambda i: i.set("header_length", 0),
    "header-length-enormous": lambda i: i.set("header_length", 0xFFFF_FFF8),
    "refcount-order-7": lambda i: i.set("refcount_order", 7),
}
#: Seen before or by the format's probe; what exactly they are called is the probe's affair.
HEADER_ONLY = {"cluster-bits-0", "cluster-bits-63", "size-enormous", "header-length-0", "header-length-enormous",
               "refcount-order-7", "l1-enormous", "l1-too-small", "refcount-table-unaligned", "l1-table-unaligned",
               "refcount-table-beyond-end", "l1-table-beyond-end"}


@pytest.mark.parametrize("side", ["top", "base"])
@pytest.mark.parametrize("spoil", SPOIL)
def test_corrupt(made, side, spoil):
    path = getattr(made, side)
    SPOIL[spoil](qcow2_bytes.Image(path))
    if spoil not in HEADER_ONLY:
        name = {"top": "ERROR_OVERLAY_CORRUPT", "base": "ERROR_BACKING_CORRUPT"}[side]
        refuse(name, made.top, files=[made.base], mentions=[path])
        return
    for output in ([], ["--output", "json"]):
        with support.untouched(made.top, made.base):
            result = support.run_instar("commit", *output, made.top)
        assert result.rc == 1 and result.stdout == "", str(result)
        assert len(result.stderr.splitlines()) == 1 and path.name in result.stderr, str(result)


def test_zero_flag_with_bad_offset(made):
    """A preallocated zero cluster's host offset is checked like any other."""
    image = qcow2_bytes.Image(made.top)
    image.poke64(image.l2_at(), image.end | COPIED | ZERO)
    refuse("ERROR_OVERLAY_CORRUPT", made.top, files=[made.base], mentions=[made.top])


@pytest.mark.parametrize("options, lost", [
    (["-O", "qcow2"], None),
    (["-O", "vmdk"], None),
    (["-O", "vmdk", "-o", "subformat=streamOptimized"], "do not decode"),
    (["-c", "-O", "qcow2"], "everything"),
])  # fmt: skip
def test_what_is_left_of_a_file_that_was_cut_off_can_be_read(tmp_path, options, lost):
    """The steps of `docs/check.md`, and what it says of each kind of loss."""
    raw, image, new = tmp_path / "raw", tmp_path / "image", tmp_path / "new"
    content = b"".join(bytes([block + 1]) * MIB for block in range(16))
    raw.write_bytes(content)
    support.qemu_img("convert", "-f", "raw", *options, raw, image)
    length = image.stat().st_size
    os.truncate(image, length * 2 // 3)
    with support.untouched(image):
        result = support.run_instar("check", image)
        assert result.rc == 2 and "past the end of the file" in result.stderr, str(result)
        for salvage in ([], ["--salvage"]):
            assert support.run_instar("convert", *salvage, "-O", "raw", image, new).rc == 1
    os.truncate(image, length + MIB)
    result = support.run_instar("convert", "--salvage", "-O", "raw", image, new)
    assert result.rc == 0 and ("do not decode" in result.stderr) == (lost == "do not decode"), str(result)
    found = new.read_bytes()
    left = next((at for at, byte in enumerate(found) if byte == 0), len(found))
    assert found[:left] == content[:left] and found[left:] == bytes(len(found) - left)
    checked = support.run_instar("check", image)
    if lost == "everything":
        assert left == 0 and checked.rc == 3 and "Leaked cluster" in checked.stderr, str(checked)
    else:
        assert 8 * MIB < left < 15 * MIB and checked.rc == 0, f"{left}\n{checked}"
