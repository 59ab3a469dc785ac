"""VHDX: fixed, dynamic and differencing images, as overlays, backings and ancestors.

Oracles: qemu for images without a parent, with sectors of 512 bytes; libvhdi for chains, with sectors of either size; and a
reader of the tests' own, from the specification, which replays logs. libvhdi does not replay them, takes a child's block of
zeroes for one that is not there, and reads the bits of a chunk without a sector bitmap from the beginning of the file ("vhdxfile"
makes sectors 1, 2 and 4 the child's): it is asked about none of these. qemu cannot open an image with a parent at all.
"""

from __future__ import annotations

import functools
import os
import random
import shlex
import shutil
import struct
import uuid

import hyper_v
import pytest
import pyvhdi
import support
import vhdx_bytes
from FATtools import vhdxutils
from hyper_v import by_libvhdi, check
from support import GIB, KIB, MIB, commit, qemu_img, qemu_io, refuse, run_instar
from vhdx_bytes import DIFFERENCING, DYNAMIC, FIXED, Maker, View, braces, content

BASE, MIDDLE, TOP = (bytes([n]) * 16 for n in (4, 5, 6))
RELATIVE = ("relative_path", ".\\base.vhdx")
SECOND = ("parent_linkage2", braces(vhdx_bytes.NULL))
make, by_qemu = (functools.partial(function, "vhdx") for function in (hyper_v.make, hyper_v.by_qemu))


def random_runs(rng, size, count, sector=512):
    runs, sectors = [], size // sector
    for _ in range(count):
        length = min(rng.choice([1, 1, 2, 7, 30, 400, 3000]), sectors)
        runs.append((rng.randrange(0, max(1, sectors - length + 1)), rng.randbytes(length * sector)))
    return runs


def child(path, size, parent, identity=TOP, pairs=(RELATIVE, SECOND), **options):
    return Maker(DIFFERENCING, size, identity, parent, pairs=list(pairs), **options).write(path)


def assert_emptied(path, parent):
    """Nothing is held, and every program finds that it goes with its parent."""
    view = View(path)
    view.assert_sound()
    assert view.held() == 0 and view.linkage() == View(parent).data_write
    assert path.stat().st_size <= 5 * MIB, "header section, log, metadata, table"


def fattools(path, mode="rb"):
    """FATtools takes names from the working directory."""
    return vhdxutils.Image(path.name, mode)


def by_fattools(path) -> bytes:
    image, data = fattools(path), bytearray()
    while len(data) < image.size:
        image.seek(len(data))
        data += image.read(min(image.block, image.size - len(data)))
    image.close()
    return bytes(data)


def fattools_write(path, runs):
    image = fattools(path, "rb+")
    for at, data in runs:
        image.seek(at)
        image.write(data)
    image.close()


def test_a_chain_of_fattools(tmp_path, monkeypatch):
    """Base and child made, written, read and written again by another program."""
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    monkeypatch.chdir(tmp_path)
    pack = vhdxutils.ParentLocator.pack

    def with_all_names(locator):
        # It gives a child one name of its parent, and opens children alone that have three, without directories.
        locator.entries |= dict.fromkeys(("relative_path", "volume_path", "absolute_win32_path"), "base.vhdx")
        locator.wKeyValueCount = len(locator.entries)
        return pack(locator)

    monkeypatch.setattr(vhdxutils.ParentLocator, "pack", with_all_names)
    rng = random.Random(2)

    def runs(count):
        lengths = [rng.choice([512, 5120, 70144, 3 * MIB]) for _ in range(count)]
        return [(rng.randrange(20 * MIB // 512) * 512, rng.randbytes(length)) for length in lengths]

    vhdxutils.mk_dynamic("base.vhdx", 24 * MIB, 2 * MIB)
    # A block that the base does not have, it does not read at all.
    fattools_write(base, [(0, rng.randbytes(24 * MIB))])
    vhdxutils.mk_diff("top.vhdx", "base.vhdx")
    expected = bytearray(by_fattools(base))
    for turn in range(3):
        written = runs(5)
        for at, data in written:
            expected[at : at + len(data)] = data
        fattools_write(top, written)
        assert content(top, base) == expected == by_fattools(top), turn
        result = commit(top, "--output", "json").json
        assert (result["backing"], result["backing_format"]) == (os.fspath(base), "vhdx")
        assert by_fattools(base) == expected == content(base) == by_libvhdi(base) == by_qemu(base), turn
        assert by_fattools(top) == expected == content(top, base)
        assert_emptied(top, base)
    for image in (top, base):
        check(image)


@pytest.mark.parametrize("size", [512, MIB, 50 * MIB + 512, 300 * GIB])
def test_created_images_are_what_others_take_them_for(tmp_path, size):
    disk = tmp_path / "disk.vhdx"
    make(disk, size=size)
    assert support.virtual_size(disk, "vhdx") == size
    handle = pyvhdi.file()
    handle.open(os.fspath(disk))
    assert handle.get_media_size() == size
    handle.close()
    qemu_img("check", "-f", "vhdx", disk)
    check(disk)
    view = View(disk)
    view.assert_sound()
    assert (view.block, view.sector, view.physical) == (32 * MIB, 512, 4096)
    assert run_instar("info", "--output", "json", disk).json["virtual-size"] == size
    if size < GIB:
        assert by_qemu(disk) == bytes(size) == by_libvhdi(disk) == content(disk)
    last = size - 512
    qemu_io(disk, f"write -P 7 {last} 512", fmt="vhdx")
    check(disk)
    if size < GIB:
        assert content(disk) == bytes(last) + b"\7" * 512 == by_libvhdi(disk)
        fixed = tmp_path / "fixed.vhdx"
        make(fixed, "-o", "subformat=fixed,block_size=1M", size=size)
        assert by_qemu(fixed) == bytes(size) == by_libvhdi(fixed)
        assert {state for _, state, _ in View(fixed).blocks()} == {6}
        qemu_img("check", "-f", "vhdx", fixed)


def test_large_sectors(tmp_path):
    disk, over = tmp_path / "disk.vhdx", tmp_path / "over.qcow2"
    make(disk, "-o", "logical_sector_size=4096,block_size=1M", size=5 * MIB)
    assert View(disk).sector == 4096
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "disk.vhdx", "-F", "vhdx", over, str(5 * MIB))
    qemu_img("rebase", "-u", "-b", "", over)
    qemu_io(over, "write -P 5 512 1k", "write -P 6 4M 64k")
    expected = tmp_path / "expected"
    qemu_img("convert", "-O", "raw", over, expected)
    qemu_img("rebase", "-u", "-b", "disk.vhdx", "-F", "vhdx", over)
    commit(over)
    assert content(disk) == expected.read_bytes() == by_libvhdi(disk)


def test_creation_is_refused(tmp_path):
    disk, base = tmp_path / "disk.vhdx", tmp_path / "base.vhdx"
    make(base, size=MIB)
    support.create(tmp_path / "base.qcow2", MIB)
    for options, size, words in [
        ((), 65 * 1024 * GIB, "64 TiB"),
        (("-o", "subformat=none"), MIB, "subformat"),
        (("-o", "block_size=3M"), MIB, "power of two"),
        (("-o", "logical_sector_size=1024"), MIB, "512 or 4096"),
        (("-b", "base.qcow2", "-F", "qcow2"), None, "has to be a VHDX"),
        (("-b", "base.vhdx", "-F", "vhdx", "-u"), MIB, "leave out -u"),
        (("-b", "base.vhdx", "-F", "vhdx"), 2 * MIB, "as large as"),
        (("-b", "base.vhdx", "-F", "vhdx", "-o", "subformat=fixed"), None, "fixed"),
    ]:
        assert words in make(disk, *options, size=size, rc=1).stderr
    assert not disk.exists()


@pytest.mark.parametrize("options", [{}, {"block_size": "1M"}, {"subformat": "fixed"}, {"block_size": "2M", "log_size": "2M"}])
def test_a_qcow2_overlay_over_images_of_qemu(tmp_path, options):
    """Partial clusters, zeroes over data, growth of the file."""
    for seed in range(3):
        rng = random.Random(seed)
        base, top, expected = (tmp_path / f"{seed}-{name}" for name in ("base.vhdx", "top.qcow2", "expected"))
        size = rng.choice([MIB, 7 * MIB, 11 * MIB + 512])
        support.create(base, size, fmt="vhdx", **options)
        span = [rng.randrange(size // 2 // 512) * 512 for _ in range(6)]
        qemu_io(base, *(f"write -P {n + 1} {at} {rng.choice([512, 3072, 200 * KIB])}" for n, at in enumerate(span[:3])), fmt="vhdx")
        support.create(top, backing=base.name, backing_fmt="vhdx", cluster_size=rng.choice([512, 4096, 65536]))
        qemu_io(top, *(f"write -P {n + 9} {at} {rng.choice([512, 1536, 300 * KIB])}" for n, at in enumerate(span)),
                f"write -z {span[0]} 4096", f"write -P 99 {size - 512} 512")
        qemu_img("convert", "-O", "raw", top, expected)
        before = View(base)
        commit(top)
        wanted = expected.read_bytes()
        assert by_qemu(base) == wanted == content(base) == by_libvhdi(base)
        after = View(base)
        after.assert_sound()
        assert after.data_write != before.data_write and after.file_write != before.file_write
        qemu_img("check", "-f", "vhdx", base)
        # qemu leaves room between metadata and blocks.
        assert run_instar("check", base).rc in (0, 3)
        assert support.holds_no_clusters(top)


@pytest.mark.parametrize("seed", range(12))
def test_chains_of_any_sectors(tmp_path, seed):
    """Blocks and sectors of all sizes, bits of any pattern, logs, blocks of zeroes: what the chain read, the base reads, and
    so does the child."""
    rng = random.Random(seed)
    sector = [512, 4096][seed % 2]
    size = rng.choice([5, 9]) * MIB - rng.choice([0, 0, 3]) * sector
    kind = [DYNAMIC, FIXED, DIFFERENCING][seed % 3]
    zeroes, pending, gap = seed % 4 == 3, [rng.random() < 0.4 for _ in range(3)], 4 * (seed % 5 == 4)
    root, base, top = (tmp_path / name for name in ("root.vhdx", "base.vhdx", "top.vhdx"))
    blocks = [MIB, 2 * MIB, 4 * MIB]
    options = lambda count: {  # noqa: E731
        "sector": sector, "block": rng.choice(blocks), "runs": random_runs(rng, size, count, sector), "gap": gap,
    }  # fmt: skip
    Maker(DYNAMIC, size, BASE, pending=pending[0], **options(5)).write(root)
    if kind == DIFFERENCING:
        child(base, size, BASE, MIDDLE, pairs=[("relative_path", "root.vhdx")], pending=pending[1], **options(8))
    else:
        Maker(kind, size, MIDDLE, pending=pending[1], **options(8)).write(base)
    more = options(12)
    if zeroes:
        more["states"] = {1: 2}
        more["runs"] = [(first, data) for first, data in more["runs"] if first * sector + len(data) <= more["block"]]
    pairs = [(RELATIVE,), (RELATIVE, SECOND), (SECOND, RELATIVE)][rng.randrange(3)]
    child(top, size, MIDDLE, pairs=pairs, pending=pending[2], **more)
    below = [root] if kind == DIFFERENCING else []
    before = content(top, base, *below)
    if not any(pending) and not zeroes:
        assert by_libvhdi(top, base, *below) == before
    assert run_instar("info", "--output", "json", top).json["virtual-size"] == size
    held = View(top).sectors() | (View(base).sectors() if kind == DIFFERENCING else set())
    commit(top)
    assert content(base, *below) == before
    assert content(top, base, *below) == before
    assert_emptied(top, base)
    View(base).assert_sound()
    assert View(base).data_write != MIDDLE, "other children are refused now"
    if kind == DIFFERENCING:
        # No sector became the base's own that was not written: what the parent holds still shows.
        assert View(base).sectors() == held and View(base).linkage() == BASE
    elif sector == 512:
        assert by_qemu(base) == before
        qemu_img("check", "-f", "vhdx", base)
    if not pending[0] and not zeroes:
        assert by_libvhdi(base, *below) == before
    for image, options in ((top, {}), (base, {"rc": 3 if gap else 0})):
        check(image, **options)


@pytest.mark.parametrize("pending", [False, True])
def test_other_children_get_the_parent_of_the_overlay(tmp_path, pending):
    """With a log that is to be replayed, and a locator of FATtools', which lacks the second key."""
    rng = random.Random(int(pending))
    size = 5 * MIB
    (tmp_path / "sub").mkdir()
    base, middle, beside, below = (tmp_path / name for name in ("base.vhdx", "middle.vhdx", "top.vhdx", "sub/other.vhdx"))
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 5)).write(base)
    child(middle, size, BASE, MIDDLE, runs=random_runs(rng, size, 8))
    child(beside, size, MIDDLE, b"\7" * 16, pairs=[("relative_path", "middle.vhdx")], pending=pending,
          runs=random_runs(rng, size, 8))
    child(below, size, MIDDLE, b"\x08" * 16, pairs=[SECOND, ("relative_path", "..\\middle.vhdx")],
          runs=random_runs(rng, size, 8))
    wanted = [content(top, middle, base) for top in (beside, below)]
    commit(middle, "--relink", beside, "--relink-in", below.parent)
    middle.unlink()
    for top, read, path in zip((beside, below), wanted, (".\\base.vhdx", ".\\..\\base.vhdx"), strict=True):
        view = View(top)
        view.assert_sound()
        assert view.linkage() == View(base).data_write and view.value("relative_path") == path
        assert content(top, base) == read == by_libvhdi(top, base)
        check(top)
    assert View(beside).data_write == b"\7" * 16, "its own children go with it as before"
    commit(beside)
    assert content(base) == wanted[0] == by_qemu(base)


def test_our_children_are_read_by_others(tmp_path):
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    make(base, "-o", "block_size=1M", size=5 * MIB)
    qemu_io(base, "write -P 1 0 2M", "write -P 2 4M 4k", fmt="vhdx")
    make(top, "-b", "base.vhdx", "-F", "vhdx")
    view, parent = View(top), View(base)
    assert (view.linkage(), view.disk_id, view.block) == (parent.data_write, parent.disk_id, 2 * MIB)
    assert view.value("relative_path") == ".\\base.vhdx"
    handles = [pyvhdi.file(), pyvhdi.file()]
    for handle, path in zip(handles, (top, base), strict=True):
        handle.open(os.fspath(path))
    assert handles[0].get_parent_identifier() == handles[1].get_identifier()
    handles[0].set_parent(handles[1])
    # A qcow2 above it is committed into the child, and the child into its parent: bits of single sectors.
    over, flat = tmp_path / "over.qcow2", tmp_path / "flat.raw"
    flat.write_bytes(by_qemu(base))
    support.qemu_img("create", "-q", "-f", "qcow2", "-b", "flat.raw", "-F", "raw", over, str(5 * MIB))
    qemu_io(over, "write -P 3 1k 512", "write -P 4 3M 64k", "write -z 4M 512", "write -z 1M 1M")
    qemu_img("convert", "-O", "raw", over, tmp_path / "expected")
    expected = (tmp_path / "expected").read_bytes()
    support.qemu_img("rebase", "-u", "-b", "top.vhdx", "-F", "vhdx", over)
    commit(over)
    assert content(top, base) == expected
    linked = View(top)
    assert linked.linkage() == View(base).data_write, "the child's own parent has not changed"
    commit(top)
    assert by_qemu(base) == expected
    assert_emptied(top, base)


def test_sectors_of_a_parent_still_show_after_a_small_write(tmp_path):
    base, top, over = tmp_path / "base.vhdx", tmp_path / "top.vhdx", tmp_path / "over.qcow2"
    Maker(DYNAMIC, 4 * MIB, BASE, runs=[(0, b"\1" * 4 * MIB)]).write(base)
    child(top, 4 * MIB, BASE)
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-o", "cluster_size=512", "-b", "top.vhdx", "-F", "vhdx", over, str(4 * MIB))
    support.qemu_img("rebase", "-u", "-b", "", over)
    qemu_io(over, "write -P 9 5120 512")
    support.qemu_img("rebase", "-u", "-b", "top.vhdx", "-F", "vhdx", over)
    commit(over)
    assert View(top).sectors() == {10}
    wanted = b"\1" * 5120 + b"\x09" * 512 + b"\1" * (4 * MIB - 5632)
    assert content(top, base) == wanted == by_libvhdi(top, base)
    commit(top)
    assert by_qemu(base) == wanted


def test_several_layers_at_once_and_an_overlay_that_is_kept(tmp_path):
    rng = random.Random(3)
    size = 8 * MIB
    base, middle, top = (tmp_path / name for name in ("base.vhdx", "middle.vhdx", "top.vhdx"))
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 5)).write(base)
    child(middle, size, BASE, MIDDLE, runs=random_runs(rng, size, 5))
    child(top, size, MIDDLE, TOP, pairs=[("relative_path", ".\\middle.vhdx"), SECOND], runs=random_runs(rng, size, 5))
    before, kept = content(top, middle, base), top.read_bytes()
    result = run_instar("commit", "-b", "base.vhdx", top, cwd=tmp_path)
    assert result.rc == 0, str(result)
    assert by_qemu(base) == before == content(top, middle, base) == by_libvhdi(top, middle, base)
    assert top.read_bytes() == kept and View(middle).linkage() == View(base).data_write
    commit(middle, "-d")
    assert View(middle).linkage() == View(base).data_write and View(middle).held() > 0
    # Without the second key, a locator is changed by the log only, and the log of an image that is kept stays as it is.
    child(middle, size, View(base).data_write, MIDDLE, pairs=[RELATIVE], runs=random_runs(rng, size, 5))
    refuse("ERROR_UNSUPPORTED_FORMAT", middle, "-d", files=[base], mentions=["cannot be changed in its place"])
    commit(middle)
    assert_emptied(middle, base)


@pytest.mark.parametrize("pairs, place", [
    ([("relative_path", r".\sub\p.vhdx")], "sub/p.vhdx"),
    ([("relative_path", r"p.vhdx")], "p.vhdx"),
    ([("absolute_win32_path", r"\\?\C:\VMs\disks\p.vhdx")], "disks/p.vhdx"),
    ([("absolute_win32_path", r"\\?\UNC\server\share\VMs\p.vhdx")], "VMs/p.vhdx"),
    ([("volume_path", r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\VMs\p.vhdx")], "VMs/p.vhdx"),
    ([("absolute_win32_path", r"C:\gone\größe.vhdx"), ("relative_path", r"gone.vhdx")], "größe.vhdx"),
])  # fmt: skip
def test_parents_are_found_by_what_is_recorded(tmp_path, pairs, place):
    parent = tmp_path / place
    parent.parent.mkdir(exist_ok=True)
    Maker(DYNAMIC, 2 * MIB, BASE, runs=[(8, b"\1" * 512)]).write(parent)
    top = child(tmp_path / "top.vhdx", 2 * MIB, BASE, pairs=pairs, runs=[(16, b"\2" * 512)])
    assert run_instar("info", "--output", "json", top).json["full-backing-filename"] == os.fspath(parent)
    result = commit(top, "--output", "json").json
    assert result["backing"] == os.fspath(parent)
    assert by_qemu(parent) == bytes(4096) + b"\1" * 512 + bytes(3584) + b"\2" * 512 + bytes(2 * MIB - 8704)


@pytest.mark.parametrize("recorded", [r".\BASE.VHDX", r"\\?\C:\VMs\Disks\old name.vhdx"])
def test_a_parent_is_found_by_its_identity(tmp_path, recorded):
    """Windows does not tell cases apart, and a parent may have been renamed since."""
    key = "relative_path" if recorded.startswith(".") else "absolute_win32_path"
    top = child(tmp_path / "top.vhdx", 2 * MIB, BASE, pairs=[(key, recorded), SECOND], runs=[(16, b"\2" * 512)])
    mentions = ["record its new name"] if key == "relative_path" else ["tried as well: 'Disks/old name.vhdx', 'old name.vhdx'"]
    refuse("ERROR_BACKING_NOT_FOUND", top, mentions=mentions)
    parent = Maker(DYNAMIC, 2 * MIB, BASE, runs=[(8, b"\1" * 512)]).write(tmp_path / "base.vhdx")
    Maker(DYNAMIC, 2 * MIB, MIDDLE).write(tmp_path / "another.vhdx")
    wanted = content(top, parent)
    assert "base.vhdx" in run_instar("map", top).stdout
    result = commit(top, "--output", "json").json
    assert result["backing"] == os.fspath(parent)
    assert by_qemu(parent) == content(top, parent) == wanted
    assert_emptied(top, parent)
    # The identity that the parent has now is recorded.
    commit(top)


def test_a_parent_that_an_image_may_not_choose_is_not_chosen_by_its_identity(tmp_path):
    """The refusal says which file it is about, and its advice helps."""
    top = child(tmp_path / "top.vhdx", 2 * MIB, BASE, pairs=[("relative_path", "gone.vhdx"), SECOND], runs=[(16, b"\2" * 512)])
    hidden = Maker(DYNAMIC, 2 * MIB, BASE, runs=[(8, b"\1" * 512)]).write(tmp_path / ".hidden.vhdx")
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[hidden], mentions=[hidden, "has the parent's identity", "commit into it with -b"])
    base = tmp_path / "base.vhdx"
    hidden.rename(base)
    base.chmod(0o755)
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base], mentions=[base, "an executable file", f"commit into it with -b '{base}'"])
    for name in ("fifo", "other"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "link.vhdx").symlink_to(base)
    assert "base.vhdx" in run_instar("map", top).stdout, "it is only read"
    commit(top, "-b", base)
    assert by_qemu(base)[16 * 512:17 * 512] == b"\2" * 512


def test_an_identity_proves_the_parent(tmp_path):
    size = 2 * MIB
    base, top, sibling = tmp_path / "base.vhdx", tmp_path / "top.vhdx", tmp_path / "sibling.vhdx"
    Maker(DYNAMIC, size, MIDDLE).write(base)
    child(top, size, BASE, runs=[(0, b"\2" * 512)])
    refuse("ERROR_PARENT_MISMATCH", top, files=[base], mentions=[BASE.hex(), MIDDLE.hex()])
    for command in ("map", "check"):
        assert run_instar(command, top).rc != 0
    # The right one under another name: -b stands for the recorded name, which leads nowhere.
    base.unlink()
    moved = Maker(DYNAMIC, size, BASE).write(tmp_path / "moved.vhdx")
    remedy = f"instar rebase -u -b 'moved.vhdx' -F vhdx '{top}'"
    result = commit(top, "-b", "moved.vhdx", "--output", "json")
    assert [remedy in warning for warning in result.json["warnings"]] == [True], str(result)
    assert by_qemu(moved)[:512] == b"\2" * 512
    assert_emptied(top, moved)
    # Other programs go by the name that stands there.
    assert View(top).value("relative_path") == RELATIVE[1]
    assert run_instar(*shlex.split(remedy)[1:]).rc == 0
    assert View(top).value("relative_path") == ".\\moved.vhdx"
    result = commit(top, "-b", "moved.vhdx", "--output", "json")
    assert not result.json.get("warnings"), str(result)
    # Whoever was made on the parent as it was is told so by every command.
    child(sibling, size, BASE, pairs=[("relative_path", "moved.vhdx")], runs=[(1, b"\3" * 512)])
    refuse("ERROR_PARENT_MISMATCH", sibling, files=[moved])
    assert run_instar("map", sibling).rc != 0


def test_each_child_gives_its_parent_another_identity(tmp_path):
    """Else the parent, restored from a backup, would be taken for what it was with another child's content in it."""
    size = 2 * MIB
    base, backup = tmp_path / "base.vhdx", tmp_path / "backup"
    one = child(tmp_path / "one.vhdx", size, BASE, TOP, runs=[(0, b"\1" * 512)])
    other = child(tmp_path / "other.vhdx", size, BASE, MIDDLE, runs=[(1, b"\2" * 512)])
    Maker(DYNAMIC, size, BASE).write(backup)
    shutil.copy(backup, base)
    commit(one, "--ignore-siblings")
    first = View(base).data_write
    refuse("ERROR_PARENT_MISMATCH", other, files=[base], mentions=["another child was merged"])
    shutil.copy(backup, base)
    commit(other, "--ignore-siblings")
    assert View(base).data_write not in (first, BASE)
    refuse("ERROR_PARENT_MISMATCH", one, files=[base])
    assert run_instar("map", one).rc != 0


def test_an_interrupted_commit_is_finished(tmp_path):
    """Between the two images: the child has recorded what the parent is about to have, and the parent has it, or not yet."""
    size = 3 * MIB
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    for pairs in ([RELATIVE, SECOND], [RELATIVE]):
        maker = Maker(DYNAMIC, size, BASE, runs=[(0, b"\1" * 4096)])
        child(top, size, BASE, pairs=pairs, runs=[(5, b"\2" * 512), (5000, b"\3" * 512)])
        before = content(top, maker.write(base))
        commit(top)
        announced = View(base).data_write
        for reached in (False, True):
            maker.write(base)
            if reached:
                Maker(DYNAMIC, size, announced, runs=maker.runs).write(base)
            if SECOND in pairs:
                child(top, size, BASE, pairs=[RELATIVE, ("parent_linkage2", braces(announced))], runs=[(5, b"\2" * 512), (5000, b"\3" * 512)])
            else:
                child(top, size, BASE, pairs=pairs, runs=[(5, b"\2" * 512), (5000, b"\3" * 512)])
                with top.open("r+b") as file:
                    file.seek(vhdx_bytes.HEADERS[1])
                    file.write(vhdx_bytes.header(9, announced, TOP))
            assert "interrupted" in run_instar("info", top).stdout
            commit(top)
            assert by_qemu(base) == before == content(top, base)
            assert_emptied(top, base)
    # Neither goes with a parent that is neither.
    Maker(DYNAMIC, size, MIDDLE).write(base)
    refuse("ERROR_PARENT_MISMATCH", top, files=[base])


def test_names_lead_nowhere_outside(tmp_path):
    (tmp_path / "in").mkdir()
    base = Maker(DYNAMIC, MIB, BASE).write(tmp_path / "base.vhdx")
    for pairs in ([("relative_path", "..\\base.vhdx")], [("absolute_win32_path", os.fspath(base).replace("/", "\\"))]):
        top = child(tmp_path / "in/top.vhdx", MIB, View(base).data_write, pairs=pairs, runs=[(0, b"\2" * 512)])
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base])
        commit(top, "--allow-backing-dir", tmp_path)
        assert_emptied(top, base)


def test_growth(tmp_path):
    """A table that has no room for more entries is moved, and both region tables name it by the log."""
    for size, grown in [(5 * MIB, 9 * MIB), (4 * MIB - 512, 200 * GIB)]:
        base, top, expected = (tmp_path / name for name in ("base.vhdx", "top.qcow2", "expected"))
        Maker(DYNAMIC, size, BASE, runs=[(0, b"\1" * 4096), (size // 512 - 1, b"\2" * 512)]).write(base)
        support.create(top, grown, backing="base.vhdx", backing_fmt="vhdx")
        qemu_io(top, f"write -P 3 {size - 1024} 2M", f"write -P 4 {grown - 64 * KIB} 64k")
        refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, files=[base])
        support.flatten(top, expected)
        commit(top, "--resize-backing")
        assert support.virtual_size(base, "vhdx") == grown
        support.assert_same_content(expected, base, second_fmt="vhdx")
        qemu_img("check", "-f", "vhdx", base)
        # The place of a table that was moved is nobody's.
        check(base, rc=3 if grown > GIB else 0)
        view = View(base)
        view.assert_sound()
        assert view.data_write != BASE
        for path in (base, top, expected):
            path.unlink()
    for kind, words in [(FIXED, "fixed VHDX"), (DIFFERENCING, "as large as its parent")]:
        Maker(DYNAMIC, 2 * MIB, BASE).write(tmp_path / "root.vhdx")
        Maker(kind, 2 * MIB, MIDDLE, BASE, pairs=[("relative_path", "root.vhdx")]).write(base)
        support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "base.vhdx", "-F", "vhdx", top, str(4 * MIB))
        refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", files=[base], mentions=[words])


def test_a_target_does_not_outgrow_a_layer_that_stays(tmp_path):
    """Interrupted, nothing could read the one through the other any more."""
    base, middle, top = tmp_path / "base.vhdx", tmp_path / "middle.vhdx", tmp_path / "top.qcow2"
    Maker(DYNAMIC, 2 * MIB, BASE).write(base)
    child(middle, 2 * MIB, BASE, MIDDLE, runs=[(0, b"\1" * 512)])
    support.create(top, 4 * MIB)
    qemu_io(top, "write -P 3 3M 64k")
    support.qemu_img("rebase", "-u", "-f", "qcow2", "-b", "middle.vhdx", "-F", "vhdx", top)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", "-b", base, files=[base, middle], mentions=["middle.vhdx", "as large"])


def test_entries_of_the_log_are_no_longer_than_qemu_takes(tmp_path):
    """One sector in each page of a long table: more pages than an entry has descriptors."""
    base, top = tmp_path / "base.vhdx", tmp_path / "top.qcow2"
    make(base, "-o", "block_size=1M", size=100 * GIB)
    support.create(top, 100 * GIB, backing="base.vhdx", backing_fmt="vhdx")
    # A page of 512 entries is half a GiB of the disk.
    qemu_io(top, *(f"write -P {number} {number * 512}M 64k" for number in range(1, 200)))
    commit(top)
    with base.open("rb") as file:
        file.seek(View(base).log_offset)
        log = file.read(View(base).log_length)
    found = [struct.unpack_from("<I", log, at + 24)[0] for at in range(0, len(log), 4096) if log[at : at + 4] == b"loge"]
    assert len(found) > 1 and 1 < max(found) <= 126, found
    qemu_io(base, *(f"read -P {number} {number * 512}M 64k" for number in range(1, 200)), fmt="vhdx")


def test_what_is_left_of_a_file_that_was_cut_off_can_be_read(tmp_path):
    runs = [(block * 4096, bytes([block + 1]) * 4096) for block in range(8)]
    image = Maker(DYNAMIC, 16 * MIB, BASE, block=2 * MIB, runs=runs).write(tmp_path / "cut.vhdx")
    hyper_v.check_what_is_left_of_a_cut_file(image, content, tmp_path / "new")


def test_a_log_is_replayed_in_memory_and_then_for_good(tmp_path):
    """What qemu makes of a log by replaying it is what is read through it, without a byte of the file being changed."""
    size = 6 * MIB
    rng = random.Random(2)
    base, copy, over = tmp_path / "base.vhdx", tmp_path / "copy.vhdx", tmp_path / "over.qcow2"
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 9), pending=True).write(base)
    copy.write_bytes(base.read_bytes())
    qemu_img("check", "-r", "all", "-f", "vhdx", copy)
    wanted = by_qemu(copy)
    with support.untouched(base):
        assert run_instar("compare", base, copy).rc == 0
        found = run_instar("info", base)
        assert found.rc == 0 and "log is to be replayed" in found.stdout, str(found)
        check(base)
    assert content(base) == wanted
    support.qemu_img("create", "-q", "-f", "qcow2", "-b", "copy.vhdx", "-F", "vhdx", over)
    qemu_io(over, "write -P 9 3M 512")
    support.qemu_img("rebase", "-u", "-b", "base.vhdx", "-F", "vhdx", over)
    commit(over)
    View(base).assert_sound()
    # qemu fills a cluster from below.
    assert by_qemu(base) == wanted[: 3 * MIB] + b"\x09" * 512 + wanted[3 * MIB + 512 :]


def damaged(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


def test_damage_is_found_before_anything_changes(tmp_path):
    size = 8 * MIB
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    Maker(DYNAMIC, size, BASE, runs=[(0, b"\1" * 512)]).write(base)

    def fresh():
        return child(top, size, BASE, runs=[(0, b"\2" * 512), (9000, b"\3" * 512)])

    table = View(fresh()).table_at
    metadata = View(top).metadata_at
    entry = lambda value: struct.pack("<Q", value)  # noqa: E731
    for offset, data, code, words in [
        (table, entry(MIB | 6), "OVERLAY_CORRUPT", "overlaps the log"),
        (table, entry(1 << 50 | 7), "OVERLAY_CORRUPT", "past the end"),
        (table, entry(6), "OVERLAY_CORRUPT", "overlaps the header section"),
        (table, entry(4), "OVERLAY_CORRUPT", "which no entry"),
        (table + 8 * 4096, entry(0), "OVERLAY_CORRUPT", "sector bitmap is not there"),
        (metadata, b"x", "PARSE_FAILED", "no signature"),
        (metadata + 64 * KIB, struct.pack("<I", 3 * MIB), "PARSE_FAILED", "BlockSize"),
        (metadata + 64 * KIB + 8, entry(8 * MIB + 1), "PARSE_FAILED", "Virtual Disk Size"),
    ]:
        damaged(fresh(), offset, data)
        refuse(f"ERROR_{code}", top, files=[base], mentions=[words])
    fresh()
    for at in vhdx_bytes.HEADERS:
        damaged(top, at + 100, b"x")
    refuse("ERROR_PARSE_FAILED", top, files=[base], mentions=["neither of the two headers"])
    # One of them is enough, and is told of.
    damaged(fresh(), vhdx_bytes.HEADERS[0] + 100, b"x")
    found = run_instar("check", top)
    assert found.rc == 2 and "one of the two headers" in found.stderr, str(found)
    commit(top)
    assert_emptied(top, base)


def test_what_must_be_known_and_is_not_is_refused(tmp_path):
    size, unknown = 2 * MIB, uuid.uuid4().bytes_le
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    Maker(DYNAMIC, size, BASE).write(base)
    child(top, size, BASE, items=[(unknown, 4, b"x" * 8)])
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base], mentions=["metadata item", "required to be known"])
    child(top, size, BASE, items=[(unknown, 3, b"x" * 8)])
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base], mentions=["belongs to the disk"])
    child(top, size, BASE, items=[(unknown, 1, b"x" * 8)], runs=[(0, b"\2" * 512)])
    commit(top)
    assert View(top).item(unknown) == b"x" * 8, "what nobody knows is kept"
    end = 20 * MIB
    for required, rc in ((1, 1), (0, 0)):
        child(top, size, View(base).data_write, regions=[(unknown, end, MIB, required)])
        os.truncate(top, end + MIB)
        result = run_instar("commit", top)
        assert result.rc == rc, str(result)
        assert ("region" in result.stderr and "required" in result.stderr) == bool(required)
    assert top.stat().st_size == end + MIB, "the region that nobody knows is kept"
    for change, words in [({"size": size + MIB}, "as large"), ({"sector": 4096}, "logical sectors")]:
        child(top, **{"size": size, "parent": View(base).data_write, **change})
        refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", files=[base], mentions=[words])


def test_a_target_does_not_outgrow_a_layer_that_stays(tmp_path):
    """Interrupted, nothing could read the one through the other any more."""
    base, middle, top = tmp_path / "base.vhdx", tmp_path / "middle.vhdx", tmp_path / "top.qcow2"
    Maker(DYNAMIC, 2 * MIB, BASE).write(base)
    child(middle, 2 * MIB, BASE, MIDDLE, runs=[(0, b"\1" * 512)])
    support.create(top, 4 * MIB)
    qemu_io(top, "write -P 3 3M 64k")
    support.qemu_img("rebase", "-u", "-f", "qcow2", "-b", "middle.vhdx", "-F", "vhdx", top)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", "-b", base, files=[base, middle], mentions=["middle.vhdx", "as large"])


def test_hostile_logs_and_tables_cost_nothing(tmp_path):
    top = child(tmp_path / "top.vhdx", 8 * MIB, BASE, runs=[(0, b"\2" * 512)])
    Maker(DYNAMIC, 8 * MIB, BASE).write(tmp_path / "base.vhdx")
    view, clean = View(top), top.read_bytes()
    guid, length = b"\x55" * 16, len(clean)

    def logged(pages, flushed=length, log_length=MIB, log_offset=MIB):
        top.write_bytes(clean)
        damaged(top, MIB, vhdx_bytes.log_entry(pages, 1, 0, guid, flushed))
        return damaged(top, vhdx_bytes.HEADERS[1], vhdx_bytes.header(9, BASE, TOP, guid, log_offset, log_length))

    page = b"\0" * 4096
    for image, words in [
        (lambda: logged([(64 * KIB, page)]), "in a header"),
        (lambda: logged([(MIB, page)]), "in the log"),
        (lambda: logged([(3 * MIB, (1 << 62))]), "no VHDX needs that"),
        (lambda: logged([], flushed=length + MIB), "last written"),
        (lambda: logged([(view.metadata_at, page)]), "no signature"),
        (lambda: logged([], log_length=0xFFF00000), "past the end"),
        (lambda: damaged(logged([]), MIB + 100, b"x"), "no valid sequence"),
    ]:
        image()
        for command in (["info"], ["check"], ["commit"]):
            result = run_instar(*command, top)
            assert result.rc != 0 and words in result.stderr and len(result.stderr.splitlines()) <= 3, str(result)
    # 4 GiB of a log in a hole, and a table of 512 MiB in another one.
    top.write_bytes(clean)
    os.truncate(top, 20 * GIB)
    for at in vhdx_bytes.HEADERS:
        damaged(top, at, vhdx_bytes.header(9, BASE, TOP, vhdx_bytes.NULL, 10 * GIB, 0xFFF00000))
    regions = [(vhdx_bytes.BAT, GIB, GIB, 1), (vhdx_bytes.METADATA, view.metadata_at, MIB, 1)]
    for at in vhdx_bytes.TABLES:
        damaged(top, at, vhdx_bytes.region_table(regions))
    damaged(top, view.metadata_at + 64 * KIB + 8, struct.pack("<Q", 64 << 40))
    result = run_instar("check", "--output", "json", top)
    # The blocks that were there are nobody's now.
    assert result.rc == 3 and "allocated-clusters" not in result.json, str(result)


def test_maps_and_comparisons_of_mixed_chains(tmp_path):
    size = 4 * MIB
    base, top, over, flat = (tmp_path / name for name in ("base.vhdx", "top.vhdx", "over.qcow2", "flat.raw"))
    rng = random.Random(5)
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 6)).write(base)
    child(top, size, BASE, runs=[(first, data) for first, data in random_runs(rng, size, 6) if first * 512 + len(data) < 3 * MIB], states={3: 2})
    flat.write_bytes(content(top, base))
    assert run_instar("compare", "-F", "raw", top, flat).rc == 0
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "top.vhdx", "-F", "vhdx", over, str(size))
    assert run_instar("compare", "-F", "raw", over, flat).rc == 0
    runs = run_instar("map", "--output", "json", top).json
    own = {n for run in runs if run["depth"] == 0 for n in range(run["start"] // 512, (run["start"] + run["length"]) // 512)}
    assert own == View(top).sectors()
    for run in runs:
        if run["data"]:
            file = (top, base)[run["depth"]].read_bytes()
            at, length = run["offset"], run["length"]
            assert file[at : at + length] == flat.read_bytes()[run["start"] : run["start"] + length]
    qemu_img("convert", "-f", "raw", "-O", "vmdk", flat, tmp_path / "disk.vmdk")
    assert run_instar("compare", top, tmp_path / "disk.vmdk").rc == 0
    # A qcow2 over the child, all the way into the base.
    qemu_img("rebase", "-u", "-b", "flat.raw", "-F", "raw", over)
    qemu_io(over, "write -P 7 100k 3k", "write -z 2M 64k")
    qemu_img("convert", "-O", "raw", over, tmp_path / "expected")
    qemu_img("rebase", "-u", "-b", "top.vhdx", "-F", "vhdx", over)
    result = run_instar("commit", "-b", "base.vhdx", over, cwd=tmp_path)
    assert result.rc == 0, str(result)
    assert by_qemu(base) == (tmp_path / "expected").read_bytes()
    assert View(top).linkage() == View(base).data_write
