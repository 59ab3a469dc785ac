"""VDI: as overlay, backing and ancestor. Oracles: the reader of `vdi_bytes`; `qemu-img` for images without a parent, which it
reads, writes and commits into; FATtools for chains, which checks both UUIDs of a parent that it looks for in the working
directory."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import shutil
import struct

import pytest
import support
import vdi_bytes
from FATtools import vdiutils
from support import KIB, MIB, create, qemu_img, qemu_io, refuse, run_instar
from vdi_bytes import Image, content, make

GLOB = vdiutils.glob.glob
SEEDS = 96 if os.environ.get("INSTAR_DEEP") else 8


def raw(path, fmt="vdi"):
    """The bytes that a guest reads, by qemu."""
    to = path.parent / "read.tmp"
    qemu_img("convert", "-f", fmt, "-O", "raw", path, to)
    data = to.read_bytes()
    to.unlink()
    return data


@contextlib.contextmanager
def fattools(*chain, mode="rb"):
    """The chain as FATtools opens it, the top-most image first. It refuses a parent whose UUIDs are not the recorded ones."""
    here = os.getcwd()
    os.chdir(chain[0].parent)
    # It opens every image in the working directory until one is the parent, children of others among them, and those do
    # the same: without an end, unless each finds its parent first.
    vdiutils.glob.glob = lambda _: [f"./{path.name}" for path in reversed(chain[1:])]
    image = None
    try:
        image = vdiutils.Image(chain[0].name, mode)
        yield image
    finally:
        if image:
            image.close()
            atexit.unregister(image.close)
        vdiutils.glob.glob = GLOB
        os.chdir(here)


def seen(*chain):
    """The bytes that a guest reads, by FATtools."""
    with fattools(*chain) as image:
        return bytes(image.read(image.size))


def fattools_write(*chain, writes):
    with fattools(*chain, mode="r+b") as image:
        for at, data in writes:
            image.seek(at)
            image.write(data)


def drawn(rng, size, block=MIB, states=("data", "zero", "none", "none")):
    """Blocks of an image, in any order."""
    blocks = {}
    for number in rng.sample(range(-(-size // block)), -(-size // block)):
        state = rng.choice(states)
        if state != "none":
            length = min(block, size - number * block)
            blocks[number] = None if state == "zero" else rng.randbytes(64) * (length // 64) + b"\1" * (length % 64)
    return blocks


def check(path, leaks=0):
    """`instar check` finds nothing, and neither does qemu's, where it opens the image."""
    result = run_instar("check", "--output", "json", path)
    assert (result.rc, result.json.get("leaks", 0)) == (0 if leaks == 0 else 3, leaks), str(result)
    if Image(path).link == vdi_bytes.NULL and Image(path).block == MIB:
        support.assert_clean(path, "vdi")


def commit(base, *layers, options=(), tidy=True):
    """Commit the first of `layers`, each above the next and the last above `base`, and hold all against what was there."""
    wanted = content(*layers, base)
    tail = content(base)[len(wanted) :]
    before = [Image(layer) for layer in layers]
    old = Image(base)
    result = support.commit(layers[0], "-b", base, *options)
    assert content(base) == wanted + tail, f"the backing reads wrong\n{result}"
    assert content(*layers, base) == wanted, f"the overlay reads wrong\n{result}"
    now, lowest = Image(base), Image(layers[-1])
    assert now.create == old.create and (now.modify != old.modify) == any(image.held for image in before)
    assert lowest.goes_with(now)
    for layer, was in zip(layers, before):
        image = Image(layer)
        image.assert_tidy()
        assert (image.create, image.modify) == (was.create, was.modify), "those above it do not go with it any more"
        if len(layers) == 1:
            assert (image.held, image.allocated, len(image.bytes)) == (0, 0, image.data)
            check(layer)
    if tidy:
        now.assert_tidy()
        check(base)
    return result


# --- qcow2 into VDI -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
def test_qcow2_into_vdi_as_qemu_does_it(tmp_path, seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 40) * MIB - rng.choice([0, 512, 300 * KIB])
    base, top = tmp_path / "base.vdi", tmp_path / "top.qcow2"
    create(base, size, fmt="vdi", static=rng.choice(["on", "off"]))

    def writes(count):
        for _ in range(count):
            at = rng.randrange(size // 512) * 512
            length = min(rng.choice([512, 64 * KIB, 3 * MIB]), size - at)
            yield rng.choice([f"write -P {rng.randrange(1, 255)}", "write -z"]) + f" {at} {length}"

    qemu_io(base, *(w for w in writes(6) if "-z" not in w), fmt="vdi")
    create(top, backing="base.vdi", backing_fmt="vdi", cluster_size=rng.choice([512, 65536, 2 * MIB]))
    qemu_io(top, *writes(12))
    wanted = raw(top, "qcow2")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (base, top):
        shutil.copy(path, theirs)
    qemu_img("commit", "-q", top.name, cwd=theirs)
    support.commit(top)
    assert raw(base) == wanted == content(base) == raw(theirs / "base.vdi")
    assert raw(top, "qcow2") == wanted
    Image(base).assert_tidy()
    check(base)
    # qemu can write to it, and it is committed into once more.
    qemu_io(base, *(w for w in writes(4) if "-z" not in w), fmt="vdi")
    qemu_io(top, *writes(4))
    wanted = raw(top, "qcow2")
    support.commit(top)
    assert raw(base) == wanted == content(base)
    Image(base).assert_tidy()


@pytest.mark.parametrize("was,new", [("8M", "100M"), ("8M", "300M"), ("8703K", "150M"), ("127M", "2G"), ("5T", "20T")])
def test_a_base_grows(tmp_path, was, new):
    """qemu leaves a map no more room than to the next 512 bytes: 128 entries. Behind that, blocks make way for it."""
    base, top = tmp_path / "base.vdi", tmp_path / "top.qcow2"
    create(base, was, fmt="vdi")
    qemu_io(base, "write -P 1 0 3M", "write -P 2 7M 1M", fmt="vdi")
    old = Image(base)
    create(top, new, backing="base.vdi", backing_fmt="vdi")
    end = support.virtual_size(top)
    qemu_io(top, "write -P 3 1M 1k", f"write -P 4 {end - 5 * MIB} 2M")
    flat = support.flatten(top, tmp_path / "flat.qcow2")
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, files=[base])
    support.commit(top, "--resize-backing")
    support.assert_same_content(base, flat, "vdi")
    now = Image(base)
    now.assert_tidy()
    check(base)
    moved = -(-end // MIB) > (old.data - old.map) // 4
    assert (now.data != old.data) == moved and now.size == end
    # It grows again, and qemu writes to it.
    qemu_io(base, "write -P 5 6M 1M", f"write -P 6 {end - MIB} 1k", fmt="vdi")
    Image(base).assert_tidy()


def test_a_static_base_does_not_grow(tmp_path):
    base, top = create(tmp_path / "base.vdi", 2 * MIB, fmt="vdi", static="on"), tmp_path / "top.qcow2"
    create(top, 3 * MIB, backing="base.vdi", backing_fmt="vdi")
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", files=[base], mentions=["a static image cannot grow"])


def test_vdi_below_the_target_fills_it_up(tmp_path):
    """A cluster that is written in part gets the rest from a VDI below, through its zero blocks."""
    root, base, top = tmp_path / "root.vdi", tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    make(root, 6 * MIB, {0: b"\x11" * MIB, 3: None, 4: b"\x22" * MIB})
    create(base, backing="root.vdi", backing_fmt="vdi", cluster_size=2 * MIB)
    create(top, backing="base.qcow2", cluster_size=64 * KIB)
    qemu_io(top, "write -P 9 512k 64k", "write -P 8 3M 64k", "write -z 4500k 128k")
    wanted = raw(top, "qcow2")
    with support.untouched(root):
        support.commit(top)
    assert raw(base, "qcow2") == wanted == raw(top, "qcow2")


# --- VDI into VDI -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_child_into_its_base(tmp_path, seed):
    rng = random.Random(1000 + seed)
    size = rng.randrange(1, 16) * MIB - rng.choice([0, 512, 300 * KIB])
    base, top = tmp_path / "base.vdi", tmp_path / "top.vdi"
    static = rng.random() < 0.3
    kind = vdi_bytes.STATIC if static else vdi_bytes.DYNAMIC
    make(base, size, drawn(rng, size, states=("data",) if static else ("data", "zero", "none")), kind=kind,
         align=rng.choice([512, 4096, MIB]), header=rng.choice([384, 400]))
    make(top, size, drawn(rng, size), parent=base, align=rng.choice([512, MIB]), kind=rng.choice([1, 3, 4]))
    if Image(top).type == vdi_bytes.DIFFERENCING:
        assert seen(top, base) == content(top, base)
    commit(base, top)
    wanted = content(top, base)
    assert raw(base) == wanted
    if Image(top).type == vdi_bytes.DIFFERENCING:
        assert seen(top, base) == wanted


@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB, 4 * MIB])
def test_blocks_of_other_sizes(tmp_path, block):
    rng = random.Random(block)
    size = 9 * MIB + 512
    base, top = tmp_path / "base.vdi", tmp_path / "top.vdi"
    make(base, size, drawn(rng, size, block), block=block)
    make(top, size, drawn(rng, size, block), parent=base, block=block)
    commit(base, top)
    top.unlink()
    # Of other sizes than the base's, too: parts of a block are filled up.
    other = make(tmp_path / "other.vdi", size, drawn(rng, size, MIB // 2), parent=base, block=MIB // 2, extra=512)
    commit(base, other)


def test_gaps_that_another_program_left_are_filled(tmp_path):
    """With a gap and a number that only counts, the next block of qemu's is written over one that is there."""
    base, top = tmp_path / "base.vdi", tmp_path / "top.vdi"
    make(base, 9 * MIB, {0: b"\1" * MIB, 5: b"\2" * MIB}, gaps=[0, 2])
    bytes_ = bytearray(base.read_bytes())
    struct.pack_into("<I", bytes_, 388, 2)
    base.write_bytes(bytes_)
    make(top, 9 * MIB, {1: b"\3" * MIB, 2: b"\4" * MIB}, parent=base)
    result = run_instar("check", base)
    assert result.rc == 2 and "another program would write the next block over" in result.stderr, str(result)
    commit(base, top)
    wanted = bytearray(content(base))
    qemu_io(base, "write -P 7 8M 1M", fmt="vdi")
    wanted[8 * MIB :] = b"\7" * MIB
    assert content(base) == wanted


def test_a_chain_of_fattools(tmp_path):
    """Made and written by another program, merged layer by layer, and read and written by it again."""
    rng = random.Random(7)
    base, one, two, three = [tmp_path / f"{name}.vdi" for name in ("base", "one", "two", "three")]

    def write(*chain, count=5):
        places = [rng.randrange(12 * MIB - 300 * KIB) // 512 * 512 for _ in range(count)]
        fattools_write(*chain, writes=[(at, rng.randbytes(rng.choice([512, 4096, 300 * KIB]))) for at in places])

    vdiutils.mk_dynamic(str(base), 12 * MIB)
    write(base, count=8)
    chain = [base]
    for path in (one, two, three):
        with fattools(*chain):
            vdiutils.mk_diff(path.name, chain[0].name)
        chain.insert(0, path)
        write(*chain)
    wanted = seen(*chain)
    assert wanted == content(*chain)
    # Its children have names of their own: links give them those that are looked for.
    for path in chain:
        os.symlink(path.name, tmp_path / Image(path).name)
    support.commit(three)
    assert seen(*chain) == seen(two, one, base) == content(*chain) == wanted
    assert Image(three).held == 0
    Image(two).assert_tidy()
    write(*chain, count=4)
    wanted = seen(*chain)
    assert wanted == content(*chain)
    # All of it into the base, in one pass: the layers between become stale, but for the lowest.
    support.commit(three, "-b", base)
    assert raw(base) == wanted == content(*chain)
    Image(base).assert_tidy()
    check(base)


def test_an_emptied_child_is_written_and_committed_again(tmp_path):
    base, top = tmp_path / "base.vdi", tmp_path / "top.vdi"
    make(base, 5 * MIB, {0: b"\1" * MIB})
    make(top, 5 * MIB, {1: b"\2" * MIB}, parent=base)
    commit(base, top)
    fattools_write(top, base, writes=[(3 * MIB, b"\3" * 4096)])
    wanted = seen(top, base)
    assert wanted[3 * MIB : 3 * MIB + 4096] == b"\3" * 4096
    commit(base, top)
    assert raw(base) == wanted


# --- whose parent is which ----------------------------------------------------------------------------------------


def virtualbox(path, depth, size=6 * MIB):
    """A machine's disk and its snapshots, in their folder, under the names that VirtualBox gives them: the base first."""
    snapshots = path / "Snapshots"
    snapshots.mkdir()
    rng = random.Random(depth)
    chain = [make(path / "disk.vdi", size, drawn(rng, size))]
    for _ in range(depth):
        new = make(snapshots / "new.vdi", size, drawn(rng, size), parent=chain[-1])
        chain.append(new.rename(snapshots / Image(new).name))
    return chain


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_snapshots_of_virtualbox(tmp_path, depth):
    base, *layers = virtualbox(tmp_path, depth)
    commit(base, *reversed(layers))


@pytest.mark.parametrize("link", [False, True])
def test_a_snapshot_in_the_middle(tmp_path, link):
    """Its parent is found under VirtualBox's name; the base in an allowed directory, by its UUIDs or a link to it."""
    base, one, two, three = virtualbox(tmp_path, 3)
    uuid = Image(base).name
    mentions = [uuid, "--allow-backing-dir", "ln -s"]
    refuse("ERROR_BACKING_NOT_FOUND", three, "-b", two, files=[base, one, two], mentions=mentions)
    # Nothing can be allowed for `info`, which follows names wherever they lead: what it says is all that helps.
    shown = run_instar("info", "--backing-chain", three)
    support.assert_refused(shown, "ERROR_BACKING_NOT_FOUND", uuid, "ln -s")
    assert "--allow-backing-dir" not in shown.stderr, str(shown)
    if link:
        os.symlink("../disk.vdi", one.parent / uuid)
        mentions = ["--allow-backing-dir"]
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", three, "-b", two, files=[base, one, two], mentions=mentions)
    wanted = content(three, two, one, base)
    support.commit(three, "--allow-backing-dir", tmp_path)
    assert content(three, two, one, base) == content(two, one, base) == wanted
    assert Image(three).goes_with(Image(two)) and Image(two).goes_with(Image(one)) and Image(one).goes_with(Image(base))
    if link:
        listed = json.loads(run_instar("info", "--backing-chain", "--output", "json", three).stdout)
        assert [image["virtual-size"] for image in listed] == [6 * MIB] * 4
    assert run_instar("map", "--allow-backing-dir", tmp_path, three).rc == 0
    result = run_instar("compare", "--allow-backing-dir", tmp_path, three, two)
    assert result.stdout == "Images are identical.\n", str(result)


def test_the_other_children_of_a_target_are_stale(tmp_path):
    base, one, two = tmp_path / "base.vdi", tmp_path / "one.vdi", tmp_path / "two.vdi"
    make(base, 4 * MIB, {0: b"\1" * MIB})
    make(one, 4 * MIB, {1: b"\2" * MIB}, parent=base)
    make(two, 4 * MIB, {2: b"\3" * MIB}, parent=base)
    commit(base, one, options=["--ignore-siblings"])
    os.symlink("base.vdi", tmp_path / Image(base).name)
    for options in ([], ["-b", base]):
        refuse("ERROR_PARENT_MISMATCH", two, *options, files=[base])
    support.assert_refused(run_instar("map", two), "ERROR_PARENT_MISMATCH")
    with pytest.raises(BaseException, match="altered after snapshot"):
        seen(two, base)
    # One that holds nothing changes nothing.
    commit(base, one, options=["--ignore-siblings"])


def test_each_child_gives_its_base_another_state(tmp_path):
    base, one, two, backup = tmp_path / "base.vdi", tmp_path / "one.vdi", tmp_path / "two.vdi", tmp_path / "backup"
    make(base, 4 * MIB, {0: b"\1" * MIB})
    make(one, 4 * MIB, {1: b"\2" * MIB}, parent=base)
    make(two, 4 * MIB, {2: b"\3" * MIB}, parent=base)
    shutil.copy(base, backup)
    commit(base, one, options=["--ignore-siblings"])
    shutil.copy(backup, base)
    commit(base, two)
    # It is not what it was with the other child's content in it.
    refuse("ERROR_NOT_IN_CHAIN", one, "-b", base, mentions=["has not the identity that is recorded there"])


def test_a_base_that_was_restored_after_a_commit_is_refused(tmp_path):
    base, top, backup = tmp_path / "base.vdi", tmp_path / "top.vdi", tmp_path / "backup"
    make(base, 4 * MIB, {0: b"\1" * MIB})
    make(top, 4 * MIB, {1: b"\2" * MIB}, parent=base)
    shutil.copy(base, backup)
    commit(base, top)
    shutil.copy(backup, base)
    refuse("ERROR_NOT_IN_CHAIN", top, "-b", base, mentions=["has not the identity that is recorded there"])


@pytest.mark.parametrize("sandbox", support.SANDBOXES)
def test_a_parent_is_found_by_its_uuid(tmp_path, sandbox):
    """By every command, among the files beside the image, whatever it is called."""
    base, top, unlike = tmp_path / "a disk", tmp_path / "top.vdi", tmp_path / "unlike.vdi"
    make(base, 4 * MIB, {0: b"\1" * MIB})
    shutil.copy(base, unlike)
    make(top, 4 * MIB, {1: b"\2" * MIB}, parent=base)
    # Neither of these: other content, a copy of the child, a file that may not be read, what is no image, a dangling link.
    with unlike.open("r+b") as file:
        file.seek(408)
        file.write(b"\7" * 16)
    (tmp_path / "closed.vdi").touch(0)
    os.mkfifo(tmp_path / "pipe.vdi")
    (tmp_path / "broken.vdi").write_bytes(base.read_bytes()[:200])
    os.symlink("nowhere", tmp_path / "link.vdi")
    wanted = content(top, base)
    use = ("--sandbox", sandbox)
    listed = run_instar("info", "--backing-chain", "--output", "json", top).json
    assert [os.path.basename(image["filename"]) for image in listed] == ["top.vdi", "a disk"]
    assert "a disk" in run_instar("map", *use, top).stdout
    assert run_instar("check", *use, top).rc == 0
    assert run_instar("compare", *use, top, top).rc == 0
    done = run_instar("convert", *use, "-O", "raw", top, tmp_path / "new")
    assert done.rc == 0 and (tmp_path / "new").read_bytes() == wanted, str(done)
    copy = shutil.copy(base, tmp_path / "copy")
    mentions = [os.fspath(base), os.fspath(copy), "several files"]
    for more in ([], ["--dry-run"]):
        refuse("ERROR_BACKING_NOT_FOUND", top, *use, *more, files=[base, copy], mentions=mentions)
    os.unlink(copy)
    # It passes the same gate as a name.
    for name, mode in [(".hidden", 0o644), ("executable", 0o755)]:
        moved = base.rename(tmp_path / name)
        moved.chmod(mode)
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, *use, files=[moved], mentions=[moved.name])
        moved.chmod(0o644)
        moved.rename(base)
    support.commit(top, *use)
    assert Image(base).content() == content(top, base) == wanted and Image(top).held == 0
    assert Image(top).goes_with(Image(base))


def test_a_parent_that_is_not_named(tmp_path):
    (tmp_path / "bases").mkdir()
    base, other, top = tmp_path / "bases/base.vdi", tmp_path / "other.vdi", tmp_path / "top.vdi"
    make(base, 4 * MIB, {0: b"\1" * MIB})
    make(other, 4 * MIB, {0: b"\5" * MIB})
    make(top, 4 * MIB, {1: b"\2" * MIB}, parent=base)
    uuid = Image(base).name
    refuse("ERROR_BACKING_NOT_FOUND", top, files=[base], mentions=[uuid])
    refuse("ERROR_NOT_IN_CHAIN", top, "-b", other, files=[base, other], mentions=[uuid])
    qcow2 = create(tmp_path / "base.qcow2", 4 * MIB)
    refuse("ERROR_NOT_IN_CHAIN", top, "-b", qcow2, files=[qcow2], mentions=[uuid])
    shown = run_instar("info", top).stdout
    assert f"parent uuid: {uuid[1:-5]}\n" in shown and "or another image beside it with that uuid" in shown, shown
    base.rename(tmp_path / uuid)
    wanted = content(top, tmp_path / uuid)
    support.commit(top)
    assert content(tmp_path / uuid) == wanted


def test_qcow2_over_a_chain_of_vdi(tmp_path):
    """Layers of several formats in one pass: the lowest, a VDI, follows the base."""
    base = make(tmp_path / "base.vdi", 6 * MIB, {0: b"\1" * MIB, 2: b"\2" * MIB})
    middle = make(tmp_path / "middle.vdi", 6 * MIB, {1: b"\3" * MIB, 2: None}, parent=base)
    os.symlink("base.vdi", tmp_path / Image(base).name)
    top = create(tmp_path / "top.qcow2", 6 * MIB)
    qemu_io(top, "write -P 7 2500k 100k", "write -P 8 5M 512")
    # qemu opens no differencing VDI: it cannot look at this backing.
    qemu_img("rebase", "-u", "-b", "middle.vdi", "-F", "vdi", top)
    wanted = bytearray(content(middle, base))
    wanted[2500 * KIB : 2600 * KIB] = b"\x07" * (100 * KIB)
    wanted[5 * MIB : 5 * MIB + 512] = b"\x08" * 512
    # Into the VDI child: what is not written of a block comes from its parent.
    into = tmp_path / "into"
    into.mkdir()
    for path in (base, middle, top):
        shutil.copy(path, into)
    os.symlink("base.vdi", into / Image(base).name)
    support.commit(into / "top.qcow2")
    assert content(into / "middle.vdi", into / "base.vdi") == wanted
    Image(into / "middle.vdi").assert_tidy()
    # All into the base.
    support.commit(top, "-b", base)
    assert content(base) == wanted and Image(middle).goes_with(Image(base))


def test_vdi_takes_a_vmdk_and_raw_in_its_chain(tmp_path):
    """qcow2 layers join formats that record no identity of each other: raw below, vmdk beside it."""
    raw_base = tmp_path / "root.raw"
    raw_base.write_bytes(random.Random(3).randbytes(4 * MIB))
    for fmt in ("raw", "vmdk"):
        root = tmp_path / f"root.{fmt}"
        if fmt == "vmdk":
            qemu_img("convert", "-f", "raw", "-O", "vmdk", raw_base, root)
        middle = create(tmp_path / f"middle-{fmt}.qcow2", backing=root.name, backing_fmt=fmt)
        qemu_io(middle, "write -P 3 1M 64k")
        flat = tmp_path / f"flat-{fmt}.vdi"
        qemu_img("convert", "-f", "qcow2", "-O", "vdi", middle, flat)
        top = create(tmp_path / f"top-{fmt}.qcow2", backing=flat.name, backing_fmt="vdi")
        qemu_io(top, "write -P 4 1M 4k", "write -z 2M 64k")
        wanted = raw(top, "qcow2")
        support.commit(top)
        assert raw(flat) == wanted
        Image(flat).assert_tidy()
        assert run_instar("compare", flat, top).rc == 0


# --- what cannot be worked with -----------------------------------------------------------------------------------


def patched(path, at, fmt, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(fmt, data, at, *values)
    path.write_bytes(data)
    return path


def test_what_is_refused_by_name(tmp_path):
    def pair(at=None, fmt="<I", value=0, which="base", **options):
        base = make(tmp_path / "base.vdi", 4 * MIB, {0: b"\1" * MIB}, **options)
        top = create(tmp_path / "top.qcow2", 4 * MIB, backing=None)
        qemu_io(top, "write -P 1 1M 4k")
        qemu_img("rebase", "-u", "-b", "base.vdi", "-F", "vdi", top)
        if at is not None:
            patched(base, at, fmt, value)
        return top

    cases = [
        (dict(extra=512), "ERROR_UNSUPPORTED_FORMAT", "cbBlockExtra"),
        (dict(at=368, fmt="<Q", value=4 * MIB - 100), "ERROR_UNSUPPORTED_FORMAT", "multiple of 512"),
        (dict(at=68, value=2), "ERROR_UNSUPPORTED_FORMAT", "version 0.2"),
        (dict(at=76, value=4), "ERROR_UNSUPPORTED_FORMAT", "uuidLinkage is null"),
        (dict(at=MIB, value=7), "ERROR_BACKING_CORRUPT", "past the end of the file"),
        (dict(at=MIB + 4, value=0), "ERROR_BACKING_CORRUPT", "the same place"),
        (dict(at=384, value=0xFFFFFFFF), "ERROR_PARSE_FAILED", "within the map"),
        (dict(at=392, fmt="<16s", value=b""), "ERROR_PARSE_FAILED", "uuidCreate is null"),
    ]
    for options, code, words in cases:
        top = pair(**options)
        refuse(code, top, files=[tmp_path / "base.vdi"], mentions=[words])


def test_a_static_child_and_a_map_in_a_hole(tmp_path):
    base = make(tmp_path / "base.vdi", 4 * MIB, {0: b"\1" * MIB})
    top = make(tmp_path / "top.vdi", 4 * MIB, {0: b"\1" * MIB}, parent=base, kind=vdi_bytes.STATIC)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", base, files=[base], mentions=["static image, and has a parent"])
    # Four bytes for each MiB of a pebibyte, none of which take space.
    huge = make(tmp_path / "huge.vdi", 4 * MIB, parent=base)
    with huge.open("r+b") as file:
        file.truncate(5 << 40)
        file.seek(340)
        file.write(struct.pack("<2I", 512, 0xFFFFFE00))
        file.seek(368)
        file.write(struct.pack("<Q4I", (1 << 29) * MIB, MIB, 0, 1 << 29, 0))
        file.seek(512)
        file.write(b"\xff" * 512)
    result = run_instar("check", huge)
    assert result.rc == 2 and "the rest of it was not looked at" in result.stderr, str(result)


def test_check(tmp_path):
    image = make(tmp_path / "image.vdi", 4 * MIB, {0: b"\1" * MIB, 2: b"\2" * MIB})
    check(image)
    patched(image, 388, "<I", 4)
    result = run_instar("check", image)
    assert result.rc == 3 and "2 of 4 slots are used by no block" in result.stderr, str(result)
    for at, value, words in [(MIB + 4, 1, "in the same place as another one"), (MIB + 4, 9, "past the end of the file")]:
        damaged = patched(support.copy(image, tmp_path / "damaged.vdi"), at, "<I", value)
        result = run_instar("check", damaged)
        assert result.rc == 2 and words in result.stderr, str(result)


def test_map(tmp_path):
    base = make(tmp_path / "base.vdi", 4 * MIB, {0: b"\1" * MIB, 1: b"\2" * MIB})
    top = make(tmp_path / "top.vdi", 4 * MIB, {1: None, 3: b"\3" * MIB}, parent=base)
    base.rename(tmp_path / Image(base).name)
    runs = json.loads(run_instar("map", "--output", "json", top).stdout)
    seen = [(run["start"] // MIB, run["length"] // MIB, run["depth"], run["data"]) for run in runs if run["data"]]
    assert seen == [(0, 1, 1, True), (3, 1, 0, True)]


# --- new images ---------------------------------------------------------------------------------------------------


def test_create(tmp_path):
    for name, options, size in [("a.vdi", [], 5 * MIB + 512), ("b.vdi", ["-o", "static=on"], 3 * MIB), ("c.vdi", [], 300 << 30)]:
        path = tmp_path / name
        result = run_instar("create", "-q", "-f", "vdi", *options, path, str(size))
        assert result.rc == 0, str(result)
        assert support.virtual_size(path, "vdi") == size
        check(path)
        measured = json.loads(run_instar("measure", "-O", "vdi", *options, "--size", str(size), "--output", "json").stdout)
        assert measured["required"] == path.stat().st_size
    qemu_io(tmp_path / "a.vdi", "write -P 5 1M 1M", "write -P 6 5M 512", fmt="vdi")
    child = tmp_path / "child.vdi"
    result = run_instar("create", "-q", "-f", "vdi", "-b", "a.vdi", "-F", "vdi", child)
    assert result.rc == 0, str(result)
    assert Image(child).goes_with(Image(tmp_path / "a.vdi")) and Image(child).type == vdi_bytes.DIFFERENCING
    base = tmp_path / "a.vdi"
    assert seen(child, base) == raw(base)
    fattools_write(child, base, writes=[(2 * MIB, b"\7" * MIB)])
    commit(base, child)
    assert raw(base)[2 * MIB : 3 * MIB] == b"\7" * MIB
    for options, words in [(["-o", "static=maybe"], "must be on or off"), (["-b", "x.raw", "-F", "raw"], "has to be a vdi")]:
        (tmp_path / "x.raw").write_bytes(bytes(MIB))
        result = run_instar("create", "-f", "vdi", *options, "new.vdi", "1M", cwd=tmp_path)
        assert result.rc == 1 and words in result.stderr, str(result)


def test_info(tmp_path):
    base = make(tmp_path / "base.vdi", 4 * MIB, {0: b"\1" * MIB})
    top = make(tmp_path / "top.vdi", 4 * MIB, {0: b"\1" * MIB, 1: None}, parent=base)
    shown = json.loads(run_instar("info", "--output", "json", top).stdout)
    data = shown["format-specific"]["data"]
    parent = Image(base).name[1:-5]
    assert (data["image-type"], data["allocated-blocks"], data["parent-uuid"]) == ("differencing", 1, parent)
    assert (shown["cluster-size"], shown["virtual-size"], shown["backing-filename"]) == (MIB, 4 * MIB, Image(base).name)
