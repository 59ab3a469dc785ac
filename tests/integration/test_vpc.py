"""VHD (qemu's name is vpc): fixed, dynamic and differencing images, as overlays, backings and ancestors.

Oracles: qemu for fixed and dynamic images; libvhdi and FATtools for chains, and a reader of the tests' own, from the
specification. qemu is never asked about a differencing image: it ignores the parent, and writes over its sectors. libvhdi takes
all bits behind a set one of the same byte for set: it is asked about runs of whole bytes of the bitmap only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil

import hyper_v
import pytest
import pyvhdi
import support
import vhd_bytes
from FATtools import vhdutils
from hyper_v import by_libvhdi, check
from support import GIB, KIB, MIB, commit, qemu_img, qemu_io, refuse, run_instar
from vhd_bytes import DIFFERENCING, DYNAMIC, FIXED, SECTOR, Maker, View, content

BASE, MIDDLE, TOP = (bytes([n]) * 16 for n in (4, 5, 6))
RELATIVE = (b"W2ru", ".\\base.vhd".encode("utf-16-le"))
make, by_qemu = (functools.partial(function, "vpc") for function in (hyper_v.make, hyper_v.by_qemu))


@contextlib.contextmanager
def inside(directory):
    """FATtools takes relative names from the working directory."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def by_fattools(path) -> bytes:
    image = vhdutils.Image(os.fspath(path), "rb")
    data = bytearray()
    while len(data) < image.size:
        image.seek(len(data))
        data += image.read(min(MIB, image.size - len(data)))
    image.close()
    return bytes(data)


def random_runs(rng, size, count, unit=1):
    """Runs of sectors, in units of so many, with random bytes."""
    runs = []
    sectors = size // SECTOR
    for _ in range(count):
        length = min(rng.choice([1, 1, 2, 7, 30, 400, 5000]) * unit, sectors)
        first = rng.randrange(0, max(1, sectors - length + 1)) // unit * unit
        runs.append((first, rng.randbytes(length * SECTOR)))
    return runs


def child(path, size, parent, identity=TOP, **options):
    return Maker(DIFFERENCING, size, identity, parent, name="base.vhd",
                 locators=options.pop("locators", [RELATIVE]), **options).write(path)


def assert_emptied(path):
    view = View(path)
    view.assert_sound()
    assert view.held() == 0
    # Footer, header, names, table, and for XenServer's the batmap: nothing else is left.
    assert path.stat().st_size < 64 * KIB


@pytest.mark.parametrize("size", [SECTOR, MIB, 50 * MIB + SECTOR, 300 * GIB])
def test_created_images_are_what_others_take_them_for(tmp_path, size):
    disk = tmp_path / "disk.vhd"
    make(disk, size=size)
    assert support.virtual_size(disk, "vpc") == size
    handle = pyvhdi.file()
    handle.open(os.fspath(disk))
    assert handle.get_media_size() == size
    handle.close()
    assert vhdutils.Image(os.fspath(disk), "rb").size == size
    check(disk)
    assert run_instar("info", "--output", "json", disk).json["virtual-size"] == size
    if size < GIB:
        assert by_qemu(disk) == bytes(size) == by_libvhdi(disk) == content(disk)
    last = size - SECTOR
    qemu_io(disk, f"write -P 7 {last} 512", fmt="vpc")
    assert run_instar("compare", "-f", "vpc", "-F", "vpc", disk, disk).rc == 0
    if size < GIB:
        assert content(disk) == bytes(last) + b"\7" * SECTOR == by_libvhdi(disk)
        fixed = tmp_path / "fixed.vhd"
        make(fixed, "-o", "subformat=fixed", size=size)
        assert fixed.stat().st_size == size + SECTOR
        assert by_qemu(fixed) == bytes(size) == by_libvhdi(fixed) == by_fattools(fixed)


def test_creation_is_refused(tmp_path):
    disk, base = tmp_path / "disk.vhd", tmp_path / "base.vhd"
    make(base, size=MIB)
    support.create(tmp_path / "base.qcow2", MIB)
    for options, size, words in [
        ((), 2041 * GIB, "2040 GiB"),
        (("-o", "subformat=none"), MIB, "subformat"),
        (("-b", "base.qcow2", "-F", "qcow2"), None, "has to be a VHD"),
        (("-b", "base.vhd", "-F", "vpc", "-u"), MIB, "leave out -u"),
        (("-b", "base.vhd", "-F", "vpc"), 2 * MIB, "as large as"),
        (("-b", "base.vhd", "-F", "vpc", "-o", "subformat=fixed"), None, "fixed"),
    ]:
        assert words in make(disk, *options, size=size, rc=1).stderr
    assert not disk.exists()


@pytest.mark.parametrize("options", [{}, {"force_size": "on"}, {"subformat": "fixed"}, {"subformat": "fixed", "force_size": "on"}])
def test_a_qcow2_overlay_over_images_of_qemu(tmp_path, options):
    """Sizes by geometry and exact ones, partial clusters, zeroes over data."""
    for seed in range(4):
        rng = random.Random(seed)
        base, top, expected = (tmp_path / f"{seed}-{name}" for name in ("base.vhd", "top.qcow2", "expected"))
        support.create(base, rng.choice([MIB, 7 * MIB, 11 * MIB + SECTOR]), fmt="vpc", **options)
        size = support.virtual_size(base, "vpc")
        assert run_instar("info", "--output", "json", "-f", "vpc", base).json["virtual-size"] == size
        span = [rng.randrange(size // 2 // SECTOR) * SECTOR for _ in range(6)]
        qemu_io(base, *(f"write -P {n + 1} {at} {rng.choice([512, 3072, 200 * KIB])}" for n, at in enumerate(span[:3])), fmt="vpc")
        support.create(top, backing=base.name, backing_fmt="vpc", cluster_size=rng.choice([512, 4096, 65536]))
        qemu_io(top, *(f"write -P {n + 9} {at} {rng.choice([512, 1536, 300 * KIB])}" for n, at in enumerate(span)),
                f"write -z {span[0]} 4096", f"write -P 99 {size - SECTOR} 512")
        qemu_img("convert", "-O", "raw", top, expected)
        commit(top)
        wanted = expected.read_bytes()
        assert by_qemu(base) == wanted
        assert content(base) == wanted
        View(base).assert_sound()
        check(base)
        assert support.holds_no_clusters(top)


@pytest.mark.parametrize("seed", range(12))
def test_chains_of_any_sectors(tmp_path, seed):
    """Bits of any pattern, blocks of different sizes, a batmap, gaps: what the chain read, the base reads, and so does the child."""
    rng = random.Random(seed)
    size = rng.choice([5, 9]) * MIB - rng.choice([0, 0, 3]) * SECTOR
    unit = 8 if seed % 3 == 0 else 1
    size -= size % (unit * SECTOR)
    kind = [DYNAMIC, FIXED, DIFFERENCING][seed % 3 if unit == 1 else rng.randrange(3)]
    root, base, top = (tmp_path / name for name in ("root.vhd", "base.vhd", "top.vhd"))
    blocks = [512 * KIB, 2 * MIB, 4 * MIB]
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 5, unit)).write(root)
    xen = rng.random() < 0.5
    options = {"block": rng.choice(blocks), "runs": random_runs(rng, size, 8, unit), "gap": rng.choice([0, 0, 3])}
    if kind == DIFFERENCING:
        name = (b"W2ru", ".\\root.vhd".encode("utf-16-le"))
        child(base, size, BASE, MIDDLE, locators=[name], batmap=xen, **options)
    else:
        Maker(kind, size, MIDDLE, batmap=xen, **options).write(base)
    child(top, size, MIDDLE, batmap=rng.random() < 0.5, block=rng.choice(blocks),
          runs=random_runs(rng, size, 12, unit), tail=rng.random() < 0.8)
    below = [root] if kind == DIFFERENCING else []
    before = content(top, base, *below)
    if unit == 8 and View(top).footers == 2:
        assert by_libvhdi(top, base, *below) == before
    assert run_instar("info", "--output", "json", top).json["virtual-size"] == size
    held = View(top).sectors() | (View(base).sectors() if kind == DIFFERENCING else set())
    commit(top)
    assert content(base, *below) == before
    assert content(top, base, *below) == before
    assert_emptied(top)
    View(base).assert_sound()
    assert View(base).identity == MIDDLE, "children know it by that"
    if kind == DIFFERENCING:
        # No sector became the base's own that was not written: what the parent holds still shows.
        assert View(base).sectors() == held
    else:
        assert by_qemu(base) == before
    if unit == 8:
        assert by_libvhdi(base, *below) == before
        assert by_libvhdi(top, base, *below) == before
    for image in (top, base):
        check(image)


@pytest.mark.parametrize("xen", [False, True])
def test_other_children_get_the_parent_of_the_overlay(tmp_path, xen):
    """By names that FATtools follows, in the same places as before. It takes a Windows path for the name of a file."""
    rng = random.Random(int(xen))
    size = 9 * MIB
    (tmp_path / "sub").mkdir()
    base, middle, beside, below = (tmp_path / name for name in ("base.vhd", "middle.vhd", "top.vhd", "sub/other.vhd"))
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 5, 8)).write(base)
    child(middle, size, BASE, MIDDLE, runs=random_runs(rng, size, 8, 8))
    for top, name in ((beside, ".\\middle.vhd"), (below, "..\\middle.vhd")):
        locators = [(b"W2ru", name.encode("utf-16-le")), (b"W2ku", "C:\\disks\\middle.vhd".encode("utf-16-le"))]
        Maker(DIFFERENCING, size, rng.randbytes(16), MIDDLE, name="middle.vhd", locators=locators, batmap=xen,
              runs=random_runs(rng, size, 8, 8)).write(top)
    wanted = [content(top, middle, base) for top in (beside, below)]
    before = [top.read_bytes() for top in (beside, below)]
    commit(middle, "--relink", beside, "--relink-in", below.parent)
    middle.unlink()
    for top, read, was, name in zip((beside, below), wanted, before, (".\\base.vhd", ".\\..\\base.vhd"), strict=True):
        assert content(top, base) == read == by_libvhdi(top, base)
        (top.parent / name).symlink_to(base)
        with inside(top.parent):
            assert by_fattools(top.name) == read
        # Footers, table and blocks are where they were: what is read of the header is its parent alone.
        now = top.read_bytes()
        assert len(now) == len(was) and now[:SECTOR] == was[:SECTOR] and now[1536 + 2 * SECTOR :] == was[1536 + 2 * SECTOR :]
        codes = [now[at : at + 4] for at in range(SECTOR + 576, SECTOR + 768, 24)]
        assert [code for code in codes if code != bytes(4)] == ([b"W2ru", b"MacX"] if xen else [b"W2ru"])
        check(top)
        View(top).assert_sound()
    commit(beside)
    assert content(base) == wanted[0] == by_qemu(base)


def test_a_child_of_fattools(tmp_path):
    """Made, written, read and written again by another program, which looks for parents by absolute path."""
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    rng = random.Random(1)
    with inside(tmp_path):
        vhdutils.mk_dynamic("base.vhd", 6 * MIB)
        image = vhdutils.Image("base.vhd", "r+b")
        image.seek(MIB)
        image.write(rng.randbytes(3 * MIB))
        image.close()
        vhdutils.mk_diff("top.vhd", os.fspath(base))
        for turn in range(2):
            image = vhdutils.Image("top.vhd", "r+b")
            for _ in range(5):
                image.seek(rng.randrange(5 * MIB))
                image.write(rng.randbytes(rng.choice([1, 512, 70000])))
            image.close()
            before = by_fattools(top)
            assert content(top, base) == before
            result = commit(top, "--output", "json").json
            assert (result["backing"], result["backing_format"]) == (os.fspath(base), "vpc")
            assert by_fattools(base) == before == by_qemu(base), turn
            assert by_fattools(top) == before
            assert_emptied(top)


def test_our_children_are_read_and_written_by_others(tmp_path):
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    make(base, size=5 * MIB)
    qemu_io(base, "write -P 1 0 2M", "write -P 2 4M 4k", fmt="vpc")
    make(top, "-b", "base.vhd", "-F", "vpc")
    assert View(top).parent == View(base).identity
    handle = pyvhdi.file()
    handle.open(os.fspath(top))
    assert handle.get_parent_filename() == "base.vhd"
    handle.close()
    assert by_libvhdi(top, base) == by_qemu(base)
    # A qcow2 above it is committed into the child, and the child into its parent: bits of single sectors.
    over = tmp_path / "over.qcow2"
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "top.vhd", "-F", "vpc", over, str(5 * MIB))
    qemu_io(over, "write -P 3 1k 512", "write -P 4 3M 64k", "write -z 4M 512")
    flat = run_instar("map", "--output", "json", over)
    assert flat.rc == 0, str(flat)
    expected = bytearray(by_qemu(base))
    # A cluster of the overlay is 64 KiB, of which qemu filled the rest from what it takes for the child: zeroes.
    own = tmp_path / "own.raw"
    support.qemu_img("convert", "-O", "raw", over, own)
    for at in (0, 3 * MIB, 4 * MIB):
        expected[at : at + 64 * KIB] = own.read_bytes()[at : at + 64 * KIB]
    commit(over)
    assert content(top, base) == bytes(expected) == by_libvhdi(top, base)
    commit(top)
    assert by_qemu(base) == bytes(expected)
    assert_emptied(top)


def test_sectors_of_a_parent_still_show_after_a_small_write(tmp_path):
    """What qemu gets wrong: one sector is written, and only that one is the child's."""
    base, top, over = tmp_path / "base.vhd", tmp_path / "top.vhd", tmp_path / "over.qcow2"
    Maker(DYNAMIC, 4 * MIB, BASE, runs=[(0, b"\1" * 4 * MIB)]).write(base)
    child(top, 4 * MIB, BASE)
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-o", "cluster_size=512", "-b", "top.vhd", "-F", "vpc", over, str(4 * MIB))
    qemu_io(over, "write -P 9 5120 512")
    commit(over)
    assert View(top).sectors() == {10}
    wanted = b"\1" * 5120 + b"\x09" * 512 + b"\1" * (4 * MIB - 5632)
    assert content(top, base) == wanted == by_libvhdi(base)[:5120] + b"\x09" * 512 + by_libvhdi(base)[5632:]
    commit(top)
    assert by_qemu(base) == wanted


def test_several_layers_at_once(tmp_path):
    rng = random.Random(3)
    size = 8 * MIB
    base, middle, top = (tmp_path / name for name in ("base.vhd", "middle.vhd", "top.vhd"))
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 5)).write(base)
    child(middle, size, BASE, MIDDLE, runs=random_runs(rng, size, 5))
    child(top, size, MIDDLE, TOP, runs=random_runs(rng, size, 5),
          locators=[(b"W2ru", ".\\middle.vhd".encode("utf-16-le"))])
    before = content(top, middle, base)
    result = run_instar("commit", "-b", "base.vhd", top, cwd=tmp_path)
    assert result.rc == 0, str(result)
    assert by_qemu(base) == before == content(top, middle, base)
    # As with the files of one cluster: a chain of a qcow2, two VHDs.
    over = tmp_path / "over.qcow2"
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "top.vhd", "-F", "vpc", over, str(size))
    assert run_instar("compare", "-f", "qcow2", "-F", "vpc", over, base).rc == 0


@pytest.mark.parametrize("locators, name, place", [
    ([(b"W2ru", r".\sub\p.vhd")], "", "sub/p.vhd"),
    ([(b"W2ru", r"p.vhd")], "", "p.vhd"),
    ([(b"W2ku", r"C:\VMs\disks\p.vhd")], "", "disks/p.vhd"),
    ([(b"W2ku", r"\\server\share\VMs\p.vhd")], "", "VMs/p.vhd"),
    ([(b"W2ku", r"D:\elsewhere\p.vhd")], "", "p.vhd"),
    ([(b"MacX", "file://./a%20b/p.vhd")], "", "a b/p.vhd"),
    ([(b"MacX", "file://localhost/Users/x/p.vhd")], "", "p.vhd"),
    ([], r"C:\VMs\größe.vhd", "größe.vhd"),
    ([(b"W2ru", r".\gone.vhd"), (b"W2ku", r"C:\gone\too.vhd")], "p.vhd", "p.vhd"),
    ([(b"Wi2r", "old"), (b"W2ku", "C:\\p.vhd\0\0")], "", "p.vhd"),
])  # fmt: skip
def test_parents_are_found_by_what_is_recorded(tmp_path, locators, name, place):
    parent = tmp_path / place
    parent.parent.mkdir(exist_ok=True)
    Maker(DYNAMIC, 2 * MIB, BASE, runs=[(8, b"\1" * SECTOR)]).write(parent)
    top = tmp_path / "top.vhd"
    encoded = [(code, text.encode("utf-8" if code == b"MacX" else "utf-16-le")) for code, text in locators]
    Maker(DIFFERENCING, 2 * MIB, TOP, BASE, name=name, locators=encoded, runs=[(16, b"\2" * SECTOR)]).write(top)
    result = commit(top, "--output", "json").json
    assert result["backing"] == os.fspath(parent)
    assert by_qemu(parent) == bytes(4096) + b"\1" * SECTOR + bytes(3584) + b"\2" * SECTOR + bytes(2 * MIB - 8704)


def test_the_order_of_names(tmp_path):
    """The relative path first, then the name in the header beside the child, then the absolute path."""
    def image(place, mark):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True, parents=True)
        return Maker(DYNAMIC, MIB, BASE, runs=[(0, bytes([mark]) * SECTOR)]).write(path)

    first, second, third = image("rel/p.vhd", 1), image("p.vhd", 2), image("abs/q.vhd", 3)
    locators = [(b"W2ku", "C:\\abs\\q.vhd".encode("utf-16-le")), (b"W2ru", ".\\rel\\p.vhd".encode("utf-16-le"))]
    top = tmp_path / "top.vhd"
    Maker(DIFFERENCING, MIB, TOP, BASE, name="C:\\x\\p.vhd", locators=locators).write(top)
    for path in (first, second, third):
        assert commit(top, "--output", "json").json["backing"] == os.fspath(path)
        path.unlink()
    result = run_instar("commit", top)
    assert result.rc == 1 and "does not exist" in result.stderr, str(result)


def test_an_identity_proves_the_parent(tmp_path):
    size = 2 * MIB
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    Maker(DYNAMIC, size, MIDDLE).write(base)
    child(top, size, BASE, runs=[(0, b"\2" * SECTOR)])
    refuse("ERROR_PARENT_MISMATCH", top, files=[base], mentions=[BASE.hex(), MIDDLE.hex()])
    for command in ("map", "check"):
        assert run_instar(command, top).rc != 0
    # The right one under another name: -b stands for the recorded name, which leads nowhere.
    base.unlink()
    moved = Maker(DYNAMIC, size, BASE).write(tmp_path / "moved.vhd")
    commit(top, "-b", "moved.vhd")
    assert by_qemu(moved)[:SECTOR] == b"\2" * SECTOR
    assert_emptied(top)


def test_a_parent_is_not_looked_for_by_its_id(tmp_path):
    """An old copy has it as well, and data in that would be lost."""
    copy = Maker(DYNAMIC, 2 * MIB, BASE, runs=[(0, b"\1" * SECTOR)]).write(tmp_path / "backup of last year.vhd")
    top = child(tmp_path / "top.vhd", 2 * MIB, BASE, runs=[(1, b"\2" * SECTOR)])
    refuse("ERROR_BACKING_NOT_FOUND", top, files=[copy], mentions=["base.vhd", "instar rebase -u -b NEW -F vpc"])
    nameless = Maker(DIFFERENCING, 2 * MIB, TOP, BASE, runs=[(1, b"\2" * SECTOR)]).write(tmp_path / "nameless.vhd")
    refuse("ERROR_NO_BACKING", nameless, files=[copy], mentions=["instar commit -b"])
    top.unlink()
    commit(nameless, "-b", copy.name)


def test_names_lead_nowhere_outside(tmp_path):
    (tmp_path / "in").mkdir()
    base = Maker(DYNAMIC, MIB, BASE).write(tmp_path / "base.vhd")
    # What is told is why the first name leads nowhere: before an absolute path, that in the header is looked for.
    outside, missing = "ERROR_WRITE_TARGET_NOT_ALLOWED", "ERROR_BACKING_NOT_FOUND"
    for name, locators in ((outside, [(b"W2ru", "..\\base.vhd".encode("utf-16-le"))]),
                           (missing, [(b"W2ku", os.fspath(base).replace("/", "\\").encode("utf-16-le"))]),
                           (outside, [(b"MacX", f"file://{base}".encode())])):
        top = child(tmp_path / "in/top.vhd", MIB, BASE, locators=locators, runs=[(0, b"\2" * SECTOR)])
        refuse(name, top, files=[base])
        commit(top, "--allow-backing-dir", tmp_path)
        assert_emptied(top)


def test_a_raw_parent_as_xenserver_has_it(tmp_path):
    raw, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    raw.write_bytes(b"\1" * 4 * MIB)
    child(top, 4 * MIB, bytes(16), batmap=True, runs=[(3, b"\2" * SECTOR), (4096, b"\3" * 2 * MIB)])
    before = content(top, raw.read_bytes())
    commit(top)
    assert raw.read_bytes() == before
    assert content(top, before) == before


@pytest.mark.parametrize("xen", [False, True])
def test_growth(tmp_path, xen):
    """A table that has no room for more entries is moved; a fixed disk gets its footer at the new end."""
    for kind, size in [(DYNAMIC, 5 * MIB), (DYNAMIC, 4 * MIB - SECTOR), (FIXED, 3 * MIB - SECTOR)]:
        base, top, expected = (tmp_path / name for name in ("base.vhd", "top.qcow2", "expected"))
        runs = [(0, b"\1" * 4096), (size // SECTOR - 1, b"\2" * SECTOR)]
        Maker(kind, size, BASE, runs=runs, batmap=xen).write(base)
        # Blocks of 2 MiB: 20 GiB take more entries than the sector of the table has.
        grown = 20 * GIB if kind == DYNAMIC else 9 * MIB
        support.create(top, grown, backing="base.vhd", backing_fmt="vpc")
        qemu_io(top, f"write -P 3 {size - 1024} 2M", f"write -P 4 {grown - 64 * KIB} 64k")
        refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, files=[base])
        support.flatten(top, expected)
        commit(top, "--resize-backing")
        assert support.virtual_size(base, "vpc") == grown
        support.assert_same_content(expected, base, second_fmt="vpc")
        check(base)
        if kind == FIXED:
            # libvhdi takes the original size for that of the disk, which growth leaves as it is.
            assert View(base).content()[:size] == by_libvhdi(base)
        for path in (base, top, expected):
            path.unlink()


@pytest.mark.parametrize("kind", [DYNAMIC, FIXED])
def test_a_disk_in_a_saved_state_does_not_grow(tmp_path, kind):
    """The state of the suspended machine knows its size. Everything else goes on."""
    base = Maker(kind, 4 * MIB, BASE, runs=[(0, b"\1" * 4096)]).write(tmp_path / "base.vhd")
    data = bytearray(base.read_bytes())
    for at in {0, len(data) - SECTOR} if kind == DYNAMIC else {len(data) - SECTOR}:
        data[at + 84] = 1
        data[at : at + SECTOR] = vhd_bytes.sealed(data[at : at + SECTOR], 64)
    base.write_bytes(data)
    for words in (["resize", base, "8M"], ["resize", "--shrink", base, "2M"]):
        with support.untouched(base):
            result = run_instar(*words)
        assert result.rc == 1, str(result)
        assert "--shrink" in words or "saved state" in result.stderr, str(result)
    top = support.create(tmp_path / "top.qcow2", 8 * MIB, backing="base.vhd", backing_fmt="vpc")
    qemu_io(top, "write -P 3 1M 64k")
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", files=[base], mentions=["saved state"])
    same = support.create(tmp_path / "top.qcow2", 4 * MIB, backing="base.vhd", backing_fmt="vpc")
    qemu_io(same, "write -P 3 1M 64k")
    commit(same)
    end = base.read_bytes()[-SECTOR:]
    assert end[84] == 1 and content(base)[MIB : MIB + 64 * KIB] == b"\3" * 64 * KIB


def test_what_is_left_of_a_file_that_was_cut_off_can_be_read(tmp_path):
    runs = [(block * 4096, bytes([block + 1]) * 4096) for block in range(8)]
    image = Maker(DYNAMIC, 16 * MIB, BASE, block=2 * MIB, runs=runs).write(tmp_path / "cut.vhd")
    hyper_v.check_what_is_left_of_a_cut_file(image, content, tmp_path / "new")


def test_a_footer_that_a_guest_wrote_is_data(tmp_path):
    """The last sector of a raw disk is its guest's: what it makes it look like keeps nobody from anything. But it is said: a
    fixed VHD that somebody took for a raw disk looks the same, and loses its footer."""
    raw, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    raw.write_bytes(bytes(MIB - SECTOR) + vhd_bytes.footer(FIXED, MIB - SECTOR, BASE))
    support.create(top, backing="base.raw", backing_fmt="raw")
    qemu_io(top, "write -P 5 0 4k")
    for options in (["--dry-run"], ["--dry-run", "-F", "raw"], []):
        result = run_instar("commit", *options, top)
        assert result.rc == 0 and ("mark of a vpc image" in result.stderr) == ("-F" not in options), str(result)
    assert raw.read_bytes()[:4096] == b"\5" * 4096 and raw.stat().st_size == MIB
    # Nor does the first sector of a fixed disk, but that is said: QEMU would take it for a dynamic one.
    fixed = Maker(FIXED, MIB, BASE, runs=[(0, vhd_bytes.footer(DYNAMIC, MIB, TOP))]).write(tmp_path / "fixed.vhd")
    result = run_instar("info", fixed)
    assert result.rc == 1 and "a guest's" in result.stderr, str(result)


def test_what_an_interrupted_run_leaves_is_finished(tmp_path):
    """No footer at the end, garbage behind the last block: as a crash leaves a new block."""
    size = 6 * MIB
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    Maker(DYNAMIC, size, BASE, runs=[(0, b"\1" * SECTOR)], tail=False).write(base)
    with base.open("ab") as file:
        file.write(b"\xee" * 3 * MIB)
    child(top, size, BASE, runs=[(5000, b"\2" * SECTOR), (9000, b"\3" * SECTOR)], tail=False)
    found = run_instar("check", base)
    assert found.rc == 3 and "footer at the end is missing" in found.stderr, str(found)
    before = content(top, base)
    assert before.count(0xEE) == 0
    commit(top)
    assert by_qemu(base) == before
    View(base).assert_sound()
    assert_emptied(top)
    for image in (base, top):
        check(image)


def damaged(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


@pytest.mark.parametrize("offset, data, code, words", [
    (1536 + 512, b"\0\0\0\1", "CORRUPT", "overlaps"),
    (1536 + 512, b"\x7f\xff\xff\xff", "CORRUPT", "past the end"),
    (1536 + 512, b"\0\0\0\0", "CORRUPT", "overlaps"),
    (512, b"x", "PARSE_FAILED", "cookie"),
    (512 + 40, b"x", "PARSE_FAILED", "checksum"),
])  # fmt: skip
def test_damage_is_found_before_anything_changes(tmp_path, offset, data, code, words):
    size = 8 * MIB
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    Maker(DYNAMIC, size, BASE, runs=[(0, b"\1" * SECTOR)]).write(base)
    child(top, size, BASE, runs=[(0, b"\2" * SECTOR), (9000, b"\3" * SECTOR)])
    entry = View(top).table_at if offset == 1536 + 512 else offset
    damaged(top, entry, data)
    name = "ERROR_OVERLAY_CORRUPT" if code == "CORRUPT" else f"ERROR_{code}"
    refuse(name, top, files=[base], mentions=[words])


def test_hostile_tables_cost_nothing(tmp_path):
    """2^32 entries in a hole: they are all zero, which is no place for a block."""
    top = child(tmp_path / "top.vhd", 8 * MIB, BASE, runs=[(0, b"\2" * SECTOR)])
    Maker(DYNAMIC, 8 * MIB, BASE).write(tmp_path / "base.vhd")
    data = bytearray(top.read_bytes())
    header = data[512:1536]
    header[16:24] = (1 << 20).to_bytes(8, "big")
    header[28:32] = b"\xff" * 4
    header[32:36] = (512).to_bytes(4, "big")
    end = bytearray(data[:512])
    end[48:56] = (2000 * GIB).to_bytes(8, "big")
    data[512:1536] = vhd_bytes.sealed(header, 36)
    data[:512] = vhd_bytes.sealed(end, 64)
    top.write_bytes(data[:-512])
    os.truncate(top, 20 * GIB)
    for command in (["check"], ["map", "-f", "vpc"], ["commit"]):
        result = run_instar(*command, top)
        assert result.rc != 0 and len(result.stderr.splitlines()) <= 202, str(result)


def test_images_that_are_not_worked_with(tmp_path):
    size = 2 * MIB
    base, top = tmp_path / "base.vhd", tmp_path / "top.vhd"
    Maker(DYNAMIC, size, BASE).write(base)
    child(top, size + MIB, BASE)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", files=[base], mentions=["larger"])
    child(top, size, BASE, creator=b"tap\0", version=1)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base], mentions=["tapdisk 0.1"])
    child(top, size, BASE, batmap=True)
    damaged(top, View(top).table_at + SECTOR + 29, b"\1")
    refuse("ERROR_LUKS_UNSUPPORTED", top, files=[base], mentions=["encryption"])
    over = tmp_path / "over.qcow2"
    child(top, size, BASE)
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "top.vhd", "-F", "vpc", over, str(4 * MIB))
    refuse("ERROR_UNSUPPORTED_FORMAT", over, "--resize-backing", files=[base, top], mentions=["as large as its parent"])


def test_maps_and_comparisons_of_mixed_chains(tmp_path):
    size = 4 * MIB
    base, top, over, flat = (tmp_path / name for name in ("base.vhd", "top.vhd", "over.qcow2", "flat.raw"))
    rng = random.Random(5)
    Maker(DYNAMIC, size, BASE, runs=random_runs(rng, size, 6)).write(base)
    child(top, size, BASE, runs=random_runs(rng, size, 6))
    flat.write_bytes(content(top, base))
    assert run_instar("compare", "-F", "raw", top, flat).rc == 0
    support.qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "top.vhd", "-F", "vpc", over, str(size))
    assert run_instar("compare", "-F", "raw", over, flat).rc == 0
    runs = run_instar("map", "--output", "json", top).json
    own = {n for run in runs if run["depth"] == 0 for n in range(run["start"] // SECTOR, (run["start"] + run["length"]) // SECTOR)}
    assert own == View(top).sectors()
    for run in runs:
        if run["data"]:
            file = (top, base)[run["depth"]].read_bytes()
            at, length = run["offset"], run["length"]
            assert file[at : at + length] == flat.read_bytes()[run["start"] : run["start"] + length]
    # A vmdk that was converted from it, and the other way round.
    shutil.copy(flat, tmp_path / "copy.raw")
    qemu_img("convert", "-f", "raw", "-O", "vmdk", flat, tmp_path / "disk.vmdk")
    assert run_instar("compare", top, tmp_path / "disk.vmdk").rc == 0
