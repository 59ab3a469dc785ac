"""vmdk: as overlay, backing and ancestor. The oracle is what qemu reads through the overlay before, and `qemu-img commit` on
copies where that does it right (afterwards it leaves the overlay unreadable: its parentCID is stale)."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import struct

import pytest
import support
import vmdk_bytes
from support import GIB, KIB, MIB, assert_clean, create, qemu_img, qemu_io, refuse, run_instar
from test_raw import Loop

SEEDS = 160 if os.environ.get("INSTAR_DEEP") else 12


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class Lab:
    """A base and an overlay of any formats, and sometimes a root below."""

    def __init__(self, path):
        self.dir = path

    def make(self, name, fmt="vmdk", size=None, backing=None, writes=(), **options):
        """An image; `backing` is one that was made before."""
        path = self.dir / name
        backing_fmt = None if backing is None else self.fmt(backing)
        create(path, size, backing=None if backing is None else backing.name, backing_fmt=backing_fmt or "vmdk", fmt=fmt,
               **options)
        if writes:
            qemu_io(path, *writes, fmt=fmt)
        return path

    @staticmethod
    def fmt(path):
        return {".vmdk": "vmdk", ".raw": "raw"}.get(path.suffix, "qcow2")

    def raw(self, path):
        """The bytes that a guest reads."""
        to = self.dir / "read.tmp"
        qemu_img("convert", "-f", self.fmt(path), "-O", "raw", path, to)
        data = to.read_bytes()
        to.unlink()
        return data

    def check_commit(self, top, base, *options, oracle=True):
        """Commit, and hold everything against what was there before."""
        wanted_top, tail = self.raw(top), self.raw(base)
        wanted = wanted_top + tail[len(wanted_top) :]
        if oracle:
            copies = self.dir / "copies"
            shutil.rmtree(copies, ignore_errors=True)
            copies.mkdir()
            for file in self.dir.iterdir():
                if file.is_file():
                    shutil.copyfile(file, copies / file.name)
            arguments = ["-b", base.name] if options else []
            qemu_img("commit", "-q", "-f", self.fmt(top), *arguments, top.name, cwd=copies)
            theirs = Lab(copies).raw(copies / base.name)
            assert theirs == wanted, "qemu-img itself gives something else"
        length = top.stat().st_size
        result = support.commit(top, *options)
        assert self.raw(base) == wanted, f"the backing reads wrong\n{result}"
        self.assert_clean(base)
        self.assert_clean(top)
        assert self.raw(top) == wanted_top, f"the overlay reads wrong\n{result}"
        assert self.holds_nothing(top)
        assert top.stat().st_size <= length, "the overlay grew"
        for path in (top, base):
            if self.fmt(path) == "vmdk":
                assert vmdk_bytes.Image(path).copies_agree(), path
        return result

    def assert_clean(self, path):
        if self.fmt(path) != "raw":
            assert_clean(path, self.fmt(path))

    def holds_nothing(self, path):
        if self.fmt(path) == "vmdk":
            return not vmdk_bytes.Image(path).grains()
        return support.holds_no_clusters(path)


@pytest.mark.parametrize(
    ("subformat", "size", "directory"),
    [
        ("monolithicSparse", 8 * MIB, ""),
        # A descriptor of two sectors and more: in an extent, in a file.
        ("monolithicSparse", 8 * MIB, "a directory with a long name/" * 7),
        ("streamOptimized", 8 * MIB, "a directory with a long name/" * 7),
        ("twoGbMaxExtentSparse", 8 * MIB, ""),
        ("twoGbMaxExtentSparse", 30 * GIB, ""),
    ],
)
def test_other_children_get_the_parent_of_the_overlay(tmp_path, subformat, size, directory):
    lab = Lab(tmp_path)
    (tmp_path / directory).mkdir(parents=True, exist_ok=True)
    base = lab.make("base.vmdk", size=size, writes=["write -P 1 0 3M"])
    lab.make("middle.vmdk", backing=base, writes=["write -P 2 1M 1M", "write -P 3 7M 64k"])
    if directory:
        # The overlay's own name is a short one: its parent's is what makes the descriptor longer.
        for name in ("base.vmdk", "middle.vmdk"):
            shutil.move(tmp_path / name, tmp_path / directory / name)
    base, middle = (tmp_path / directory / name for name in ("base.vmdk", "middle.vmdk"))
    top = tmp_path / "top.vmdk"
    create(top, backing=os.path.relpath(middle, tmp_path), backing_fmt="vmdk", fmt="vmdk", subformat=subformat)
    qemu_io(top, "write -P 4 2M 512k", "write -P 5 7M 64k", fmt="vmdk")
    others = [line for line in descriptor_of(top) if not line.startswith(("parentCID", "parentFileNameHint"))]
    wanted, length = support.content_hash(top, "vmdk"), top.stat().st_size
    support.commit(middle, "--relink", top)
    middle.unlink()
    found = descriptor_of(top)
    hint = os.path.relpath(base, tmp_path)
    assert f'parentFileNameHint="{hint}"' in [line.rstrip(" ") for line in found], found
    assert [line for line in found if not line.startswith(("parentCID", "parentFileNameHint"))] == others
    assert top.stat().st_size <= length
    assert support.content_hash(top, "vmdk") == wanted
    assert support.info(top, "-f", "vmdk")["backing-filename"] == hint
    assert_clean(top, "vmdk")


def descriptor_of(path):
    """The lines of a descriptor, where qemu looks for it."""
    data = path.read_bytes()[:65536] if path.stat().st_size > 65536 else path.read_bytes()
    text = data[512 : 21 * 512] if data[:4] == b"KDMV" else data
    return text.split(b"\0")[0].decode().split("\n")


WRITES = ["write -P 9 1M 300k", "write -P 7 512 1k", "write -P 5 8388096 512", "write -P 6 5M 64k"]


@pytest.mark.parametrize("zeroed", ["on", "off"])
def test_as_qemu_img(lab, zeroed):
    base = lab.make("base.vmdk", size=8 * MIB, writes=["write -P 1 0 3M", "write -P 2 7M 1M"], zeroed_grain=zeroed)
    top = lab.make("top.vmdk", backing=base, writes=[*WRITES, "write -z 2M 128k", "write -z 4M 100k"], zeroed_grain=zeroed)
    result = lab.check_commit(top, base, "-b", base, "--output", "json")
    found = result.json
    assert (found["overlay_format"], found["backing_format"]) == ("vmdk", "vmdk")
    assert found["clusters_committed"] == found["overlay_clusters_cleared"] > 8
    assert found["bytes_committed"] == found["clusters_committed"] * 64 * KIB
    assert vmdk_bytes.Image(top).parent_cid == vmdk_bytes.Image(base).cid


def test_it_can_be_written_and_committed_again(lab):
    base = lab.make("base.vmdk", size=8 * MIB, writes=["write -P 1 0 3M"])
    top = lab.make("top.vmdk", backing=base, writes=WRITES)
    seen = set()
    for number in range(4):
        lab.check_commit(top, base)
        seen.add(vmdk_bytes.Image(base).cid)
        qemu_io(top, f"write -P {20 + number} {number}M 100k", "write -P 3 6M 1M", fmt="vmdk")
    assert len(seen) == 4


def test_the_recorded_parent_is_the_target(lab):
    base = lab.make("base.vmdk", size=4 * MIB)
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 0 64k"])
    lab.check_commit(top, base)
    other = lab.make("other.vmdk", size=4 * MIB)
    qemu_io(top, "write -P 8 0 64k", fmt="vmdk")
    refuse("ERROR_NOT_IN_CHAIN", top, "-b", other, files=[base, other], mentions=["the overlay's immediate parent is base.vmdk"])


def test_an_empty_overlay_leaves_the_content_id_alone(lab):
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    top = lab.make("top.vmdk", backing=base)
    with support.untouched(base, top):
        support.commit(top)


def test_kept_overlays_and_dry_runs(lab):
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 64k 128k"])
    with support.untouched(base, top):
        support.commit(top, "--dry-run")
    before = lab.raw(top)
    support.commit(top, "-d")
    assert lab.raw(top) == lab.raw(base) == before
    assert len(vmdk_bytes.Image(top).grains()) == 2
    support.commit(top)
    assert lab.raw(top) == before and lab.holds_nothing(top)


@pytest.mark.parametrize("size", [512, 64 * KIB - 512, 64 * KIB + 512, 33 * MIB + 1536])
def test_unaligned_sizes(lab, size):
    base = lab.make("base.vmdk", size=size, writes=["write -P 1 0 512"])
    top = lab.make("top.vmdk", backing=base, writes=[f"write -P 9 {size - 512} 512", "write -P 4 0 512"])
    lab.check_commit(top, base)


def test_a_smaller_overlay_leaves_the_rest(lab):
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 4M"])
    top = lab.make("top.vmdk", size=MIB + 512, backing=base, writes=["write -P 9 1M 512", "write -P 2 0 100k"])
    lab.check_commit(top, base)


def test_a_larger_overlay_makes_the_backing_grow(lab):
    base = lab.make("base.vmdk", size=4 * MIB)
    top = lab.make("top.vmdk", size=8 * MIB, backing=base, writes=["write -P 9 6M 64k"])
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, files=[base], mentions=["exceeds backing virtual size"])
    before = lab.raw(top)
    support.commit(top, "--resize-backing")
    assert lab.raw(top) == lab.raw(base) == before and support.virtual_size(base, "vmdk") == 8 * MIB
    support.assert_clean(base, "vmdk")
    stream = lab.make("stream.vmdk", size=4 * MIB, subformat="streamOptimized")
    larger = lab.make("larger.vmdk", size=8 * MIB, backing=stream, writes=["write -P 9 6M 64k"])
    refuse("ERROR_UNSUPPORTED_FORMAT", larger, "--resize-backing", files=[stream], mentions=["does not grow"])


@pytest.mark.parametrize("zeroed", ["on", "off"])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_qcow2_into_vmdk(lab, zeroed, compat):
    root = lab.make("root.vmdk", size=8 * MIB, writes=["write -P 33 0 8M"])
    base = lab.make("base.vmdk", backing=root, writes=["write -P 1 0 1M", "write -P 2 7M 1M"], zeroed_grain=zeroed)
    extra = ["write -z 2M 128k", "write -z 4M 100k", "write -z 7340032 96k"] if compat == "1.1" else []
    top = lab.make("top.qcow2", "qcow2", backing=base, cluster_size=4096, compat=compat,
                   writes=["write -c -P 12 3M 4k", *WRITES, *extra])
    lab.check_commit(top, base)


def test_qcow2_over_vmdk_commits_below_a_qcow2(lab):
    """A vmdk is an ancestor that a partial cluster is filled from."""
    root = lab.make("root.vmdk", size=4 * MIB, writes=["write -P 33 0 4M"])
    base = lab.make("base.qcow2", "qcow2", backing=root, cluster_size=2 * MIB)
    top = lab.make("top.qcow2", "qcow2", backing=base, cluster_size=4096, writes=["write -P 9 1M 4k"])
    lab.check_commit(top, base)


def test_zeroes_over_holes_take_no_room(lab):
    base = lab.make("base.vmdk", size=64 * MIB)
    top = lab.make("top.qcow2", "qcow2", backing=base, writes=["write -z 0 64M"])
    lab.check_commit(top, base)
    assert base.stat().st_blocks * 512 < MIB and not vmdk_bytes.Image(base).grains()


def test_zeroed_grains_give_their_room_back(lab):
    base = lab.make("base.vmdk", size=16 * MIB, writes=["write -P 1 0 16M"], zeroed_grain="on")
    top = lab.make("top.qcow2", "qcow2", backing=base, writes=["write -z 0 8M"])
    lab.check_commit(top, base)
    assert set(vmdk_bytes.Image(base).grains().values()) >= {1}
    assert base.stat().st_blocks * 512 < 9 * MIB


def test_emptying_gives_the_room_back(lab):
    base = lab.make("base.vmdk", size=64 * MIB)
    top = lab.make("top.vmdk", backing=base, writes=["write -P 1 0 32M"])
    lab.check_commit(top, base)
    assert top.stat().st_size == top.stat().st_blocks * 512 or top.stat().st_size < 128 * KIB


@pytest.mark.parametrize("at_end", [False, True])
def test_stream_optimized_overlays(lab, at_end):
    base = lab.make("base.vmdk", size=40 * MIB, writes=["write -P 1 0 3M"])
    top = lab.make("top.vmdk", backing=base, subformat="streamOptimized",
                   writes=["write -P 9 64k 64k", "write -P 8 1M 64k", "write -P 7 39M 64k", "write -P 6 1114112 64k"])
    if at_end:
        directory_at_the_end(top)
    lab.check_commit(top, base, oracle=not at_end)
    if not at_end:
        qemu_io(top, "write -P 5 64k 64k", fmt="vmdk")
        lab.check_commit(top, base)


def directory_at_the_end(path):
    """As VMware streams it: table and directory behind the grains, named by a footer; a header that points there."""
    image = vmdk_bytes.Image(path)
    data = bytearray(image.bytes)
    data += bytes(-len(data) % 512)
    sectors = []
    for _, entries in image.tables(image.directory):
        sectors.append(len(data) // 512)
        data += struct.pack("<512I", *entries)
    directory = len(data) // 512
    data += struct.pack(f"<{len(sectors)}I", *sectors)
    data += bytes(-len(data) % 512)
    header = bytearray(data[:512])
    struct.pack_into("<I", header, 8, image.flags & ~2)
    struct.pack_into("<QQ", header, 48, 0, directory)
    data += struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + header + bytes(512)
    struct.pack_into("<Q", header, 56, 2**64 - 1)
    data[:512] = header
    path.write_bytes(data)


def test_chains(lab):
    root = lab.make("root.vmdk", size=8 * MIB, writes=["write -P 1 0 8M"])
    low = lab.make("low.vmdk", backing=root, writes=["write -P 2 1M 1M"])
    mid = lab.make("mid.vmdk", backing=low, writes=["write -P 3 1536k 1M", "write -P 3 512 512"])
    top = lab.make("top.vmdk", backing=mid, writes=["write -P 4 2M 700k", "write -P 4 5M 512"])
    wanted = lab.raw(top)
    # Into the immediate parent, whose own parents fill what is around a sector.
    lab.check_commit(top, mid)
    assert lab.raw(top) == wanted
    qemu_io(top, "write -P 7 6M 512", fmt="vmdk")
    wanted = lab.raw(top)
    # Into an ancestor: the layers above are left alone and stale, but for the lowest one's record of its parent.
    before = vmdk_bytes.without_parent_id(mid)
    with support.untouched(top, root):
        result = support.commit(top, "-b", low)
    assert lab.raw(low) == lab.raw(top) == wanted
    assert "mid.vmdk" in result.stderr and "stale" in result.stderr
    assert_clean(low, "vmdk")
    assert vmdk_bytes.Image(mid).parent_cid == vmdk_bytes.Image(low).cid
    assert vmdk_bytes.without_parent_id(mid) == before
    # It can be done again, and once more into another target.
    support.commit(top, "-b", low)
    support.commit(top, "-b", root)
    assert lab.raw(root) == lab.raw(top) == wanted


@pytest.mark.parametrize("formats", [["qcow2", "vmdk"], ["qcow2", "qcow2"], ["vmdk", "vmdk"]])
def test_into_a_vmdk_below_layers_of_other_formats(lab, formats):
    """The lowest merged layer follows if it records its parent's content ID, and only that one."""
    base = lab.make("base.vmdk", size=8 * MIB, writes=["write -P 1 0 8M"])
    mid = lab.make(f"mid.{formats[1]}", formats[1], backing=base, writes=["write -P 2 1M 1M"])
    top = lab.make(f"top.{formats[0]}", formats[0], backing=mid, writes=["write -P 3 1536k 1M", "write -P 4 5M 512"])
    wanted = lab.raw(top)
    for _ in range(2):
        with support.untouched(top, *([mid] if formats[1] == "qcow2" else [])):
            support.commit(top, "-b", base)
        assert lab.raw(base) == lab.raw(top) == wanted
    with support.untouched(top, mid, base):
        support.commit(top, "-b", base, "--dry-run")


def test_a_lowest_layer_that_cannot_be_written_is_refused(lab):
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    mid = lab.make("mid.vmdk", backing=base, writes=["write -P 2 0 64k"])
    top = lab.make("top.vmdk", backing=mid, writes=["write -P 9 512 512"])
    with mid.open("rb") as file:
        # As QEMU says that it only reads, and that nobody may write (the byte for "write" of what is not shared).
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        refuse("ERROR_IMAGE_IN_USE", top, "-b", base, files=[base, mid], mentions=["mid.vmdk"])


def test_content_ids_that_do_not_match(lab):
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    mid = lab.make("mid.vmdk", backing=base, writes=["write -P 2 0 64k"])
    top = lab.make("top.vmdk", backing=mid, writes=["write -P 9 512 512"])
    before = vmdk_bytes.Image(mid).parent_cid
    vmdk_bytes.set_id(mid, "parentCID", 0x1234)
    refuse("ERROR_PARENT_MISMATCH", mid, files=[base], mentions=["00001234", "base.vmdk"])
    refuse("ERROR_PARENT_MISMATCH", top, files=[base, mid], mentions=["mid.vmdk", "00001234"])
    refuse("ERROR_PARENT_MISMATCH", top, "-b", base, files=[base, mid], mentions=["mid.vmdk", "00001234"])
    # Every other command that looks at the chain says so, too.
    for command in (["map", top], ["check", mid]):
        support.assert_refused(support.run_instar(*command, "--output", "json"), "ERROR_PARENT_MISMATCH", "mid.vmdk", "00001234")
    shown = support.run_instar("info", "--backing-chain", "--output", "json", top).json
    assert [any("00001234" in note for note in image.get("notes", [])) for image in shown] == [False, True, False]
    # An image whose parent is not there can be checked.
    base.rename(lab.dir / "moved")
    assert support.run_instar("check", mid).rc == 0
    (lab.dir / "moved").rename(base)
    assert support.run_instar("check", top).rc == 0
    vmdk_bytes.set_id(mid, "parentCID", before)
    for command in (["map", top], ["check", mid]):
        assert support.run_instar(*command).rc == 0
    lab.check_commit(top, mid)


def test_an_interrupted_commit_is_finished(lab):
    """The overlay knows the backing's next content ID already, and says that it was only announced; the backing still has
    the old one."""
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 64k 128k"])
    wanted = lab.raw(top)
    old = support.copy(base, lab.dir / "old.vmdk")
    support.commit(top, "-d")
    vmdk_bytes.announce(top)
    assert lab.raw(top) == wanted, "qemu reads a number with a mark"
    shutil.copyfile(old, base)
    assert vmdk_bytes.Image(top).parent_cid != vmdk_bytes.Image(base).cid
    assert "interrupted" in str(support.run_instar("info", "--output", "json", top).json["notes"])
    assert support.run_instar("map", top).rc == 0
    support.commit(top)
    assert lab.raw(top) == lab.raw(base) == wanted
    assert vmdk_bytes.Image(top).parent_cid == vmdk_bytes.Image(base).cid
    assert "notes" not in support.run_instar("info", "--output", "json", top).json


def test_each_overlay_gives_its_backing_another_identity(lab):
    """Else the backing, restored from a backup, would be taken for what it was with another overlay's content in it."""
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    one = lab.make("one.vmdk", backing=base, writes=["write -P 9 64k 128k"])
    other = lab.make("other.vmdk", backing=base, writes=["write -P 7 1M 64k"])
    old = support.copy(base, lab.dir / "old.vmdk")
    support.commit(one, "--ignore-siblings")
    first = vmdk_bytes.Image(base).cid
    refuse("ERROR_PARENT_MISMATCH", other, files=[base])
    shutil.copyfile(old, base)
    support.commit(other, "--ignore-siblings")
    assert vmdk_bytes.Image(base).cid not in (first, vmdk_bytes.Image(old).cid)
    refuse("ERROR_PARENT_MISMATCH", one, files=[base])


def test_a_backing_that_was_restored_from_a_backup_is_refused(lab):
    """It has the content ID of before the commit, like one of an interrupted commit; but the overlay is empty."""
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 1M"])
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 64k 128k"])
    old = support.copy(base, lab.dir / "old.vmdk")
    support.commit(top)
    qemu_io(top, "write -P 5 2M 64k", fmt="vmdk")
    shutil.copyfile(old, base)
    refuse("ERROR_PARENT_MISMATCH", top, files=[base], mentions=["restored"])
    refuse("ERROR_PARENT_MISMATCH", top, "-b", base, files=[base])
    for command in (["map", top], ["check", top]):
        assert support.run_instar(*command).rc != 0


def test_tables_that_are_missing_are_made(lab):
    """An ESX or VMware writer leaves them out; QEMU does not write to such a place."""
    base = lab.make("base.vmdk", size=200 * MIB, writes=["write -P 1 0 1M"])
    image = vmdk_bytes.Image(base)
    for directory in (image.directory, image.redundant):
        vmdk_bytes.patch(base, directory * 512 + 4, bytes(5 * 4))
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 40M 300k", "write -P 8 512 512", "write -P 7 199M 64k"])
    lab.check_commit(top, base, oracle=False)
    made = [entry != 0 for entry, _ in vmdk_bytes.Image(base).tables(image.directory)]
    assert made == [True, True, False, False, False, False, True]


def damage(path, what):
    image = vmdk_bytes.Image(path)
    table = image.tables(image.directory)[0][0] * 512
    if what == "entry past the end":
        vmdk_bytes.patch(path, table + 4 * 20, struct.pack("<I", 1 << 30))
    elif what == "entry into the header":
        vmdk_bytes.patch(path, table + 4 * 20, struct.pack("<I", 1))
    elif what == "entry into a table":
        vmdk_bytes.patch(path, table + 4 * 20, struct.pack("<I", table // 512))
    elif what == "two grains at one place":
        vmdk_bytes.patch(path, table + 4 * 20, image.bytes[table : table + 4])
    elif what == "table past the end":
        vmdk_bytes.patch(path, image.directory * 512, struct.pack("<I", 1 << 30))
    elif what == "tables at one place":
        vmdk_bytes.patch(path, image.redundant * 512, image.bytes[image.directory * 512 :][:4])
    else:
        vmdk_bytes.patch(path, 56, struct.pack("<Q", 1 << 40))


@pytest.mark.parametrize("what", ["entry past the end", "entry into the header", "entry into a table", "two grains at one place",
                                  "table past the end", "tables at one place", "directory past the end"])
def test_damage_is_refused(lab, what):
    base = lab.make("base.vmdk", size=4 * MIB, writes=["write -P 1 0 64k"])
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 0 128k"])
    good = [(path, path.read_bytes()) for path in (base, top)]
    for victim, code in ((top, "ERROR_OVERLAY_CORRUPT"), (base, "ERROR_BACKING_CORRUPT")):
        damage(victim, what)
        refuse(code, top, files=[base], mentions=[victim.name])
        for path, data in good:
            path.write_bytes(data)
    lab.check_commit(top, base)


HEADER_DAMAGE = {
    "magic": (0, b"KDMW", None),
    "version": (4, struct.pack("<I", 9), "version 9"),
    "capacity": (12, bytes(8), "capacity"),
    "grain size": (20, struct.pack("<Q", 3), "grainSize"),
    "huge grains": (20, struct.pack("<Q", 1 << 40), "grainSize"),
    "table length": (44, struct.pack("<I", 1 << 20), "numGTEsPerGT"),
    "text transfer": (73, b"\n\n\n\n", "end-of-line"),
    "descriptor": (28, struct.pack("<Q", 1 << 50), None),
    "huge capacity": (12, struct.pack("<Q", 1 << 60), "capacity"),
    "huge directory": (12, struct.pack("<Q", 1 << 52), "grain directory"),
    "compression": (8, struct.pack("<I", 0x30003), "compression algorithm"),
}


@pytest.mark.parametrize("what", HEADER_DAMAGE)
def test_headers_are_refused(lab, what):
    offset, data, words = HEADER_DAMAGE[what]
    base = lab.make("base.vmdk", size=4 * MIB)
    top = lab.make("top.vmdk", backing=base, writes=["write -P 9 0 128k"])
    for victim in (top, base):
        good = victim.read_bytes()
        vmdk_bytes.patch(victim, offset, data)
        with support.untouched(base, top):
            result = run_instar("commit", top)
        assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
        assert victim.name in result.stderr and (words or "") in result.stderr, str(result)
        victim.write_bytes(good)


def test_encrypted_images_are_refused(lab):
    base = lab.make("base.vmdk", size=4 * MIB)
    text = vmdk_bytes.Image(base).text
    vmdk_bytes.patch(base, 512 + len(text), b'encryption.keySafe = "vmware:key/list"\n')
    top = lab.make("top.qcow2", "qcow2", backing=base, writes=["write -P 9 0 64k"])
    refuse("ERROR_LUKS_UNSUPPORTED", top, files=[base], mentions=["base.vmdk"])


def test_info_is_that_of_qemu_img(lab):
    base = lab.make("base.vmdk", size=5 * MIB + 512)
    top = lab.make("top.vmdk", backing=base, subformat="streamOptimized")
    for path in (base, top):
        theirs = json.loads(qemu_img("info", "--output=json", path, cwd=lab.dir).stdout)
        ours = run_instar("info", "--output", "json", path, cwd=lab.dir).json
        theirs.pop("children", None)
        # qemu-img lists the files of an image.
        theirs["format-specific"]["data"].pop("extents")
        # What the plugin has to say besides, qemu-img has no word for.
        notes = ours.pop("notes", [])
        assert notes == ([] if path == base else ["streamOptimized: a commit into it adds grains, and is refused if it would change one"])
        assert ours == theirs


@pytest.mark.parametrize("options", [[], ["-o", "zeroed_grain=on"], ["-o", "subformat=streamOptimized"],
                                     ["-o", "adapter_type=lsilogic,hwversion=8"], ["-o", "compat6=on"]])
def test_create(lab, options):
    base, top = lab.dir / "base.vmdk", lab.dir / "top.vmdk"
    assert run_instar("create", "-f", "vmdk", base, "100M").rc == 0
    result = run_instar("create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", *options, top, cwd=lab.dir)
    assert result.rc == 0, str(result)
    assert_clean(base, "vmdk")
    assert_clean(top, "vmdk")
    qemu_io(base, "write -P 1 0 99M", fmt="vmdk")
    vmdk_bytes.adopt(top, base)
    qemu_io(top, "write -P 2 1M 64k", "write -P 2 64M 64k", fmt="vmdk")
    lab.check_commit(top, base)


def test_create_refuses(lab):
    other = lab.make("other.qcow2", "qcow2", size=MIB)
    for arguments, words in [
        (["x.vmdk"], "SIZE"),
        (["x.vmdk", "0"], "0 bytes"),
        (["x.vmdk", "3T"], "2 TiB"),
        (["-o", "subformat=vmfs", "x.vmdk", "1M"], "monolithicSparse"),
        (["-o", "bogus=1", "x.vmdk", "1M"], "unknown option"),
        (["-b", other.name, "-F", "qcow2", "x.vmdk"], "has to be a vmdk"),
        (["-u", "-b", "no.vmdk", "-F", "vmdk", "x.vmdk", "1M"], "content ID"),
        (['x".vmdk', "1M"], "quotes"),
    ]:
        result = run_instar("create", "-f", "vmdk", *arguments, cwd=lab.dir)
        assert result.rc in (1, 2) and words in result.stderr, str(result)
    assert sorted(path.name for path in lab.dir.iterdir()) == ["other.qcow2"]


def test_large_and_scattered(lab):
    base = lab.make("base.vmdk", size=1000 * GIB)
    rng = random.Random(3)
    places = sorted(rng.sample(range(1000 * GIB // MIB), 60))
    top = lab.make("top.vmdk", backing=base, writes=[f"write -P {1 + i} {place}M 64k" for i, place in enumerate(places)])
    support.commit(top)
    qemu_io(top, *[f"read -P {1 + i} {place}M 64k" for i, place in enumerate(places)], fmt="vmdk")
    qemu_io(base, *[f"read -P {1 + i} {place}M 64k" for i, place in enumerate(places)], fmt="vmdk")
    assert_clean(base, "vmdk")
    assert len(vmdk_bytes.Image(base).grains()) == 60 and lab.holds_nothing(top)


def random_writes(rng, size, count, zeroes):
    commands = []
    for _ in range(count):
        length = rng.randrange(1, min(size, rng.choice([512, 4 * KIB, 64 * KIB, 300 * KIB])) // 512 + 1) * 512
        offset = rng.randrange(0, size - length + 1, 512)
        kind = "write -z" if zeroes and rng.random() < 0.25 else f"write -P {rng.randrange(256)}"
        commands.append(f"{kind} {offset} {length}")
    return commands


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_pairs(lab, seed):
    """vmdk, qcow2 and raw, below and above, 1 to 8 layers; the last two are committed, or some into an ancestor."""
    rng = random.Random(41_000 + seed)
    size = rng.choice([rng.randint(1, 300), rng.randint(300, 12_000)]) * 512
    depth = rng.choice([2, 2, 2, 3, 3, 4, 5, 8])
    layers, fmt = [], rng.choice(["vmdk", "vmdk", "raw", "qcow2"])
    for number in range(depth):
        # A vmdk is backed by nothing but a vmdk; and one pair at least has one.
        fmt = fmt if number == 0 else rng.choice(["vmdk", "qcow2"]) if fmt == "vmdk" else "qcow2"
        options = {"zeroed_grain": rng.choice(["on", "off"])} if fmt == "vmdk" else {}
        if fmt == "qcow2":
            options = {"cluster_size": 512 << rng.randrange(13), "extended_l2": "off"}
        writes = random_writes(rng, size, rng.randint(0 if number < depth - 1 else 1, 12), fmt != "raw")
        layers.append(lab.make(f"{number}.{fmt}", fmt, size=size, backing=layers[-1] if layers else None, writes=writes,
                               **options))
    top, target = layers[-1], layers[-2]
    deep = depth > 2 and rng.random() < 0.4
    if deep:
        target = layers[rng.randrange(0, depth - 2)]
        wanted = lab.raw(top)
        with support.untouched(*[path for path in layers if path != target]):
            support.commit(top, "-b", target)
        assert lab.raw(target) == wanted
        lab.assert_clean(target)
    else:
        lab.check_commit(top, target)


def test_the_largest_directories_fit_into_the_guest(lab):
    """2 TiB in grains of 16 KiB: 262,144 tables in two copies, more than any tool makes."""
    base = lab.make("base.vmdk", size=MIB)
    data = bytearray(base.read_bytes()[: 21 * 512])
    entries, at = 1 << 18, 64
    struct.pack_into("<QQ", data, 12, entries * 512 * 32, 32)
    directories = [at, at + entries * 4 // 512]
    first = directories[1] + entries * 4 // 512
    struct.pack_into("<QQQ", data, 48, *directories, first + 2 * entries * 4)
    with base.open("r+b") as file:
        file.write(data)
        for copy, directory in enumerate(directories):
            file.seek(directory * 512)
            file.write(struct.pack(f"<{entries}I", *range(first + copy * entries * 4, first + (copy + 1) * entries * 4, 4)))
        file.truncate((first + 2 * entries * 4) * 512)
    top = lab.make("top.vmdk", backing=base)
    qemu_io(top, "write -P 9 1T 64k", "write -P 8 512 512", fmt="vmdk")
    support.commit(top)
    qemu_io(base, "read -P 9 1T 64k", "read -P 8 512 512", fmt="vmdk")
    refuse("ERROR_NO_BACKING", base)


def huge(path, *, at, stride=4, grain=None):
    """7 TiB in grains of 64 KiB: 229,376 tables in two copies, which begin at sector `at`, one in each `stride` sectors. One
    grain, of sectors at `grain`, is the disk's last."""
    data = bytearray(path.read_bytes()[: 21 * 512])
    entries = 7 << 15
    struct.pack_into("<QQ", data, 12, entries * 512 * 128, 128)
    size = -(-entries * 4 // 512)
    directories = [64, 64 + size]
    struct.pack_into("<QQQ", data, 48, *directories, directories[1] + size)
    with path.open("r+b") as file:
        file.write(data)
        for copy, directory in enumerate(directories):
            first = at + copy * entries * stride
            file.seek(directory * 512)
            file.write(struct.pack(f"<{entries}I", *range(first, first + entries * stride, stride)))
            if grain:
                file.seek((first + (entries - 1) * stride) * 512 + 511 * 4)
                file.write(struct.pack("<I", grain))
        if grain:
            file.seek(grain * 512)
            file.write(b"\x5e" * 65536)
        else:
            file.truncate((at + 2 * entries * stride) * 512)
    return entries * 512 * 65536


def test_seven_tib_in_files_beyond_one_window(lab):
    """Both images have more tables than may be known at once, and their files reach behind 64 GiB; the overlay's have gaps
    between them, which are given back one by one."""
    base, top = lab.make("base.vmdk", size=MIB), lab.make("top.vmdk", size=MIB, backing=lab.make("any.vmdk", size=MIB))
    vmdk_bytes.rename_parent(top, b"any.vmdk", b"base.vmdk")
    huge(base, at=1 << 16)
    size = huge(top, at=1 << 16, stride=16, grain=(70 << 30) // 512)
    vmdk_bytes.adopt(top, base)
    support.commit(top)
    qemu_io(base, f"read -P 0x5e {size - 65536} 64k", "read -P 0 1T 64k", fmt="vmdk")
    qemu_io(top, f"read -P 0x5e {size - 65536} 64k", fmt="vmdk")
    assert top.stat().st_size < 8 * GIB


def test_a_grain_behind_the_first_window_is_checked(lab):
    base, top = lab.make("base.vmdk", size=MIB), lab.make("top.vmdk", size=MIB, backing=lab.make("any.vmdk", size=MIB))
    vmdk_bytes.rename_parent(top, b"any.vmdk", b"base.vmdk")
    huge(base, at=1 << 16)
    far = (70 << 30) // 512
    huge(top, at=1 << 16, grain=far)
    vmdk_bytes.adopt(top, base)
    # The grain before the last one ends in the middle of it.
    for copy in range(2):
        table = (1 << 16) + (copy * (7 << 15) + (7 << 15) - 1) * 4
        vmdk_bytes.patch(top, table * 512 + 510 * 4, struct.pack("<I", far - 64))
    # Nobody looks whether 70 GiB have changed: the plan is not reached.
    support.assert_refused(run_instar("commit", "--dry-run", top), "ERROR_OVERLAY_CORRUPT", "overlaps")


def test_block_devices(lab):
    """What is there can be written in place, and emptied; for more, a vmdk has to grow, and a device does not."""
    base = lab.make("base.vmdk", size=8 * MIB, writes=["write -P 1 0 4M"])
    os.truncate(base, 12 * MIB)
    with Loop(base) as below:
        top = lab.dir / "top.vmdk"
        create(top, backing=below, backing_fmt="vmdk", fmt="vmdk")
        qemu_io(top, "write -P 9 1M 300k", fmt="vmdk")
        wanted = lab.raw(top)
        os.truncate(top, 12 * MIB)
        with Loop(top) as above:
            support.commit(above, "-b", below)
        assert lab.raw(top) == lab.raw(base) == wanted
        assert not vmdk_bytes.Image(top).grains() and vmdk_bytes.Image(top).parent_cid == vmdk_bytes.Image(base).cid
        os.truncate(top, 64 * KIB)
        qemu_io(top, "write -P 7 5M 64k", fmt="vmdk")
        refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", below, files=[base], mentions=["a block device has nothing there"])
