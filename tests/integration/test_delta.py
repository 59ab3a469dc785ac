"""VMware's delta disks (vmfsSparse and seSparse) over flat disks and over each other, as ESXi leaves them on a datastore.
Oracles: `qemu-img`, which reads all of them, and the readers of `delta_bytes`. `qemu-img` can commit none of them: of an extent
of ESX it leaves the overlay full and its parentCID stale, and where a table is missing it writes over the header."""

from __future__ import annotations

import os
import random
import re
import shutil

import delta_bytes
import pytest
import support
from delta_bytes import COWD, FLAT, SESPARSE, Cowd, Disk, content
from support import KIB, MIB, TIB, create, qemu_img, qemu_io, refuse, run_instar

SEEDS = 96 if os.environ.get("INSTAR_DEEP") else 8
UNIT = {COWD: 512, SESPARSE: 4096}
ALONE = "whose descriptor has to be named"


def make(directory, name, kind, size, grains=None, *, parent=None, hint=None, newline=b"\n", cid=None, data=b"", extent=None, **text):
    """A disk of one extent, with its descriptor; `parent` is a descriptor, beside it unless there is a `hint`."""
    line, word = delta_bytes.LINE[kind]
    file = directory / f"{name}-{word}.vmdk"
    if kind == COWD:
        delta_bytes.cowd(file, size, grains or {}, **(extent or {}))
    elif kind == SESPARSE:
        delta_bytes.sesparse(file, size, grains or {}, **(extent or {}))
    else:
        file.write_bytes(data.ljust(size, b"\0"))
    path = directory / f"{name}.vmdk"
    if parent is not None:
        text |= {"parent": Disk(parent).id("CID"), "hint": hint or parent.name.encode()}
    cid = random.Random(name).randrange(0x10000000, 0xFFFFFFF0) if cid is None else cid
    path.write_bytes(delta_bytes.descriptor(kind, [(size // 512, line, file.name.encode())], cid=cid, newline=newline, **text))
    return path


def raw(path, fmt="vmdk"):
    """The bytes that a guest reads, by qemu."""
    to = path.parent / "read.tmp"
    qemu_img("convert", "-f", fmt, "-O", "raw", path, to)
    data = to.read_bytes()
    to.unlink()
    return data


def drawn(rng, kind, size, count=40, grain=None):
    """Grains of an extent in any order: runs of them, and for seSparse zeroes of both kinds."""
    grain = grain or UNIT[kind]
    grains = {}
    for _ in range(count):
        at = rng.randrange(-(-size // grain))
        for number in range(at, min(at + rng.choice([1, 1, 2, 9]), -(-size // grain))):
            state = rng.choice([1, 2, 0, 0, 0]) if kind == SESPARSE else 0
            grains[number] = state or rng.randbytes(min(grain, size - number * grain))
    order = list(grains)
    rng.shuffle(order)
    return {number: grains[number] for number in order}


def rest(path):
    """A descriptor without the digits of its content IDs."""
    return re.sub(rb"^(CID|parentCID)=[0-9a-fA-F]{8}", rb"\1=", path.read_bytes(), flags=re.M)


def commit(*chain, options=(), keep=False):
    """Commit the first image of a chain into its second, and hold everything against what was there."""
    top, base = chain[:2]
    wanted, before = content(*chain), {path: rest(path) for path in chain}
    old, held = Disk(base).id("CID"), [path for path in Disk(top).files[1:]]
    assert raw(top) == wanted, "the reader of the tests, or qemu, is wrong"
    below = {path: path.read_bytes() for disk in chain[2:] for path in Disk(disk).files}
    full = {path: path.read_bytes() for path in held}
    result = support.commit(top, *(["-d"] if keep else []), *options)
    assert content(*chain[1:]) == wanted == raw(base), f"the backing reads wrong\n{result}"
    assert content(*chain) == wanted == raw(top), f"the overlay reads wrong\n{result}"
    assert all(rest(path) == text for path, text in before.items()), "a descriptor has changed elsewhere"
    assert Disk(top).id("parentCID") == Disk(base).id("CID") != old
    assert all(path.read_bytes() == data for path, data in below.items()), "an ancestor has changed"
    for path in held:
        if keep:
            assert path.read_bytes() == full[path]
        else:
            Cowd(path).assert_fresh()
    for _, kind, path in Disk(base).lines:
        if kind == "VMFSSPARSE":
            Cowd(path).assert_tidy()
    for path in (top, base):
        assert run_instar("check", path).rc == 0
    return result


# --- Chains as ESXi leaves them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
def test_chains_are_merged_from_the_top(tmp_path, seed):
    """A flat base and up to four deltas of either kind, the top one committed until only the base is left."""
    rng = random.Random(seed)
    size = rng.randrange(3000, 40000) * 512
    newline = rng.choice([b"\n", b"\r\n"])
    chain = [make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size // 2), newline=newline)]
    for number in range(1, rng.randrange(2, 6)):
        # Nothing can be committed into a seSparse disk.
        kind = rng.choice([COWD, SESPARSE]) if number > 1 or rng.random() < 0.7 else COWD
        if Disk(chain[0]).kind == SESPARSE:
            kind = SESPARSE
        grain = rng.choice([1, 1, 1, 2, 8, 128]) if kind == COWD else 8
        extent = {"grain": grain, "lazy": rng.random() < 0.7, "room": rng.choice([0, 0, MIB])} if kind == COWD else {
            "first": rng.choice([0, 4090]), "skip": rng.choice([0, 3])}
        grains = drawn(rng, kind, size, rng.choice([0, 5, 60]), grain * 512)
        chain.insert(0, make(tmp_path, f"vm-{number:06}", kind, size, grains, parent=chain[0], newline=newline, extent=extent))
    while len(chain) > 1:
        top = Disk(chain[0])
        if Disk(chain[1]).kind == SESPARSE:
            with support.untouched(*(file for path in chain for file in Disk(path).files)):
                refuse("ERROR_UNSUPPORTED_FORMAT", chain[0], "-d", mentions=["seSparse", "cannot be committed into"])
            # All layers above the flat disk, or the extent of ESX, that is below.
            wanted = content(*chain)
            target = next(path for path in chain if Disk(path).kind != SESPARSE)
            support.commit(chain[0], "-b", target)
            assert content(*chain[chain.index(target) :]) == wanted == raw(target) == raw(chain[0])
            chain = chain[chain.index(target) :]
            continue
        if top.kind == COWD and Cowd(top.files[1]).grains or top.kind == SESPARSE and drawn_anything(top):
            commit(*chain, keep=top.kind == SESPARSE)
        chain.pop(0)


def drawn_anything(disk):
    return delta_bytes.sesparse_content(disk.files[1], b"\1" * disk.lines[0][0] * 512) != b"\1" * disk.lines[0][0] * 512


def test_an_emptied_delta_is_written_and_committed_again(tmp_path):
    rng = random.Random(5)
    size = 9 * MIB + 512
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    top = make(tmp_path, "vm-000001", COWD, size, drawn(rng, COWD, size), parent=base)
    for _ in range(3):
        commit(top, base)
        # What ESX does next: into the directory that is there, from the first free sector on.
        delta_bytes.cowd(Disk(top).files[1], size, drawn(rng, COWD, size))
    commit(top, base)
    assert not run_instar("commit", top).rc, "an empty one is committed, too"


def test_a_snapshot_in_the_middle_is_committed_and_the_one_above_goes_on(tmp_path):
    rng = random.Random(6)
    size = 5 * MIB
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    middle = make(tmp_path, "vm-000001", COWD, size, drawn(rng, COWD, size), parent=base)
    top = make(tmp_path, "vm-000002", COWD, size, drawn(rng, COWD, size), parent=middle)
    wanted, text = content(top, middle, base), top.read_bytes()
    commit(middle, base)
    assert top.read_bytes() == text
    commit(top, middle, base)
    assert content(top, middle, base) == wanted == raw(top)


def of_parent(line):
    return line.startswith((b"parentCID", b"parentFileNameHint"))


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("kind", [COWD, SESPARSE])
def test_a_snapshot_gets_the_disk_below_the_one_that_is_committed(tmp_path, kind, newline):
    """Its descriptor is longer than a sector, of which only the first changes."""
    rng = random.Random(7)
    size = 5 * MIB
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    middle = make(tmp_path, "vm-000001", COWD, size, drawn(rng, COWD, size), parent=base)
    top = make(tmp_path, "vm-000002", kind, size, drawn(rng, kind, size), parent=middle, newline=newline, track="vm-000002-ctk.vmdk")
    wanted, before = content(top, middle, base), [path.read_bytes() for path in Disk(top).files]
    support.commit(middle, "--relink", top)
    for path in Disk(middle).files:
        path.unlink()
    text, *extents = (path.read_bytes() for path in Disk(top).files)
    assert len(text) == len(before[0]) > 512 and text[512:] == before[0][512:] and extents == before[1:]
    lines, were = text.split(b"\n"), before[0].split(b"\n")
    assert [line for line in lines if not of_parent(line)] == [line for line in were if not of_parent(line)]
    end = newline.rstrip(b"\n")
    assert b'parentFileNameHint="vm.vmdk"       ' + end in lines
    assert Disk(top).id("parentCID") == Disk(base).id("CID")
    assert content(top, base) == wanted == raw(top)


def test_a_name_that_a_descriptor_has_no_room_for_is_set_by_hand(tmp_path):
    rng = random.Random(8)
    size = 5 * MIB
    base = make(tmp_path, "a-disk-with-a-long-name", FLAT, size, data=rng.randbytes(size))
    middle = make(tmp_path, "vm-000001", COWD, size, drawn(rng, COWD, size), parent=base)
    top = make(tmp_path, "vm-000002", COWD, size, drawn(rng, COWD, size), parent=middle, track="vm-000002-ctk.vmdk")
    wanted, files = content(top, middle, base), [path for disk in (top, base) for path in Disk(disk).files]
    mentions = ("at most 14 bytes", "with a text editor")
    refuse("ERROR_UNSUPPORTED_FORMAT", middle, "--relink", top, files=files, mentions=mentions)
    said = run_instar("commit", "--relink", top, middle).stderr
    support.commit(middle)
    text = re.sub(rb"^parentCID=.*$", re.search(r"parentCID=\w+", said)[0].encode(), top.read_bytes(), flags=re.M)
    top.write_bytes(text.replace(b'"vm-000001.vmdk"', b'"a-disk-with-a-long-name.vmdk"'))
    assert Disk(top).id("parentCID") == Disk(base).id("CID")
    assert content(top, base) == wanted == raw(top)
    for path in Disk(middle).files:
        path.unlink()
    commit(top, base)


@pytest.mark.parametrize("kind", [COWD, SESPARSE])
def test_what_else_reads_them(tmp_path, kind):
    """`compare` finds no difference to the plain bytes, and one where there is one; `map` covers the disk."""
    rng = random.Random(8)
    size = 3 * MIB + 512
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    top = make(tmp_path, "vm-000001", kind, size, drawn(rng, kind, size), parent=base)
    plain = tmp_path / "plain.raw"
    plain.write_bytes(content(top, base))
    assert run_instar("compare", "-f", "vmdk", "-F", "raw", top, plain).rc == 0
    runs = run_instar("map", "--output", "json", top).json
    assert sum(run["length"] for run in runs) == size and {run["depth"] for run in runs} == {0, 1}
    held = sum(run["length"] for run in runs if run["depth"] == 0)
    grains = {number for number in range(size // UNIT[kind] + 1) if number in
              (Cowd(Disk(top).files[1]).grains if kind == COWD else sesparse_grains(top))}
    assert held == sum(min(UNIT[kind], size - number * UNIT[kind]) for number in grains)
    data = bytearray(plain.read_bytes())
    data[size // 2] ^= 1
    plain.write_bytes(data)
    assert run_instar("compare", "-f", "vmdk", "-F", "raw", top, plain).rc == 1


def sesparse_grains(path):
    """The grains that a seSparse disk holds: those that hide what is below, whatever that is."""
    size = Disk(path).lines[0][0] * 512
    one, other = (delta_bytes.sesparse_content(Disk(path).files[1], byte * size) for byte in (b"\1", b"\2"))
    return {number for number in range(-(-size // 4096)) if one[number * 4096] == other[number * 4096]}


# --- Other formats above, and below ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
def test_qcow2_into_deltas(tmp_path, seed):
    """New tables, new grains and grains that are there, over what shows from below."""
    rng = random.Random(seed)
    size = rng.randrange(2000, 30000) * 512
    grain = rng.choice([1, 1, 4, 128])
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    grains = drawn(rng, COWD, size, rng.choice([0, 3, 50]), grain * 512)
    delta = make(tmp_path, "vm-000001", COWD, size, grains, parent=base, newline=b"\r\n",
                 extent={"grain": grain, "lazy": rng.random() < 0.7, "stale": rng.random() < 0.2, "room": rng.choice([0, 700])})
    text, flat = rest(delta), Disk(base).files[1].read_bytes()
    top = create(tmp_path / "top.qcow2", backing=delta.name, backing_fmt="vmdk", cluster_size=rng.choice([512, 4096, 65536]))
    for _ in range(2):
        for _ in range(rng.randrange(1, 12)):
            at = rng.randrange(size // 512) * 512
            length = min(rng.choice([512, 5 * KIB, 64 * KIB, 700 * KIB]), size - at)
            qemu_io(top, rng.choice([f"write -P {rng.randrange(1, 255)}", "write -z"]) + f" {at} {length}")
        wanted = raw(top, "qcow2")
        old = Disk(delta).id("CID")
        support.commit(top)
        assert content(delta, base) == wanted == raw(delta) == raw(top, "qcow2")
        Cowd(Disk(delta).files[1]).assert_tidy()
        assert rest(delta) == text and Disk(delta).id("CID") != old and Disk(base).files[1].read_bytes() == flat
        assert run_instar("check", delta).rc == 0


def test_a_chain_of_kinds(tmp_path):
    """monolithicSparse over an extent of ESX over monolithicSparse over seSparse over flat."""
    rng = random.Random(9)
    size = 6 * MIB
    flat = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    sesparse = make(tmp_path, "vm-000001", SESPARSE, size, drawn(rng, SESPARSE, size), parent=flat)
    hosted = create(tmp_path / "hosted.vmdk", backing=sesparse.name, backing_fmt="vmdk", fmt="vmdk")
    qemu_io(hosted, "write -P 3 100k 300k", "write -P 4 5M 64k", fmt="vmdk")
    import vmdk_bytes

    delta = make(tmp_path, "vm-000002", COWD, size, drawn(rng, COWD, size), parent=flat)
    delta.write_bytes(re.sub(rb'parentCID=\w+', b"parentCID=%08x" % vmdk_bytes.Image(hosted).cid, delta.read_bytes())
                      .replace(b'"vm.vmdk"', b'"hosted.vmdk"'))
    top = create(tmp_path / "top.vmdk", backing=delta.name, backing_fmt="vmdk", fmt="vmdk")
    qemu_io(top, "write -P 5 150k 40k", "write -P 6 3M 9k", "write -P 7 6290944 512", fmt="vmdk")
    wanted = raw(top)
    support.commit(top)
    assert raw(top) == wanted == raw(delta)
    Cowd(Disk(delta).files[1]).assert_tidy()
    support.commit(delta)
    assert raw(top) == wanted == raw(delta) == raw(hosted)
    Cowd(Disk(delta).files[1]).assert_fresh()
    refuse("ERROR_UNSUPPORTED_FORMAT", hosted, files=Disk(sesparse).files, mentions=["seSparse"])
    support.commit(hosted, "-b", flat)
    assert raw(top) == wanted == raw(flat) == content(flat)


@pytest.mark.parametrize("kinds", [(COWD, COWD), (COWD, FLAT), (SESPARSE, FLAT)])
def test_several_extents(tmp_path, kinds):
    """Parts of a disk in files of their own: ESXi does not write that, and QEMU reads it."""
    rng = random.Random(3)
    sizes = [3 * MIB + 512, 2 * MIB, MIB]
    disks = []
    for name, kind in (("base", kinds[1]), ("top", kinds[0])):
        lines = []
        for number, size in enumerate(sizes):
            part = make(tmp_path, f"{name}-{number}", kind, size, None if kind == FLAT else drawn(rng, kind, size, 9),
                        data=rng.randbytes(size // 3))
            lines.append((size // 512, delta_bytes.LINE[kind][0], Disk(part).files[1].name.encode()))
        path = tmp_path / f"{name}.vmdk"
        parent = {"parent": Disk(disks[0]).id("CID"), "hint": disks[0].name.encode()} if disks else {}
        path.write_bytes(delta_bytes.descriptor(kind, lines, cid=rng.randrange(1 << 31, 1 << 32), **parent))
        disks.insert(0, path)
    commit(*disks, keep=kinds[0] == SESPARSE)


# --- What QEMU has written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [False, True])
def test_a_first_free_sector_that_qemu_left_behind(tmp_path, new):
    """QEMU never raises it: what it has added is not written over, neither as overlay nor as backing."""
    rng = random.Random(4)
    size = 6 * MIB
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    delta = make(tmp_path, "vm-000001", COWD, size, drawn(rng, COWD, size, 9), parent=base, extent={"lazy": False})
    free = Cowd(Disk(delta).files[1]).free
    qemu_io(delta, "write -P 9 64k 100k", "write -P 8 3M 5k", fmt="vmdk")
    assert Cowd(Disk(delta).files[1]).free == free, "QEMU has learned it"
    # Into grains that are there, and into new ones: either way the number is right afterwards.
    top = create(tmp_path / "top.qcow2", backing=delta.name, backing_fmt="vmdk", cluster_size=512)
    if not new:
        qemu_io(top, "write -P 1 70k 80k")
    else:
        qemu_io(top, "write -P 1 100k 200k", "write -P 2 5M 64k")
    wanted = raw(top, "qcow2")
    before = len(Cowd(Disk(delta).files[1]).grains)
    support.commit(top)
    assert content(delta, base) == wanted == raw(delta)
    Cowd(Disk(delta).files[1]).assert_tidy()
    assert (len(Cowd(Disk(delta).files[1]).grains) > before) == new
    support.commit(delta)
    assert content(base) == wanted == raw(delta)
    Cowd(Disk(delta).files[1]).assert_fresh()


# --- Descriptors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding, name", [("windows-1252", "Größe"), ("UTF-8", "Größe"), ("GBK", "快照"), ("Shift_JIS", "スナップ")])
@pytest.mark.parametrize("absolute", [False, True])
def test_names_in_any_encoding_and_in_a_datastore(tmp_path, encoding, name, absolute):
    rng = random.Random(1)
    size = MIB
    base = make(tmp_path, name, FLAT, size, data=rng.randbytes(size), encoding=encoding)
    top = make(tmp_path, f"{name}-000001", COWD, size, drawn(rng, COWD, size), parent=base, encoding=encoding, newline=b"\r\n",
               hint=(f"/vmfs/volumes/4e5f7a0c-9b3d/vm/{name}.vmdk" if absolute else f"{name}.vmdk").encode(encoding))
    for path in (base, top):
        path.write_bytes(path.read_bytes().replace(name.encode() + b"-", name.encode(encoding) + b"-"))
    wanted = Cowd(tmp_path / f"{name}-000001-delta.vmdk").content((tmp_path / f"{name}-flat.vmdk").read_bytes())
    before = {path: rest(path) for path in (base, top)}
    assert run_instar("info", "--backing-chain", "--output", "json", top).rc == 0
    support.commit(top)
    assert (tmp_path / f"{name}-flat.vmdk").read_bytes() == wanted
    Cowd(tmp_path / f"{name}-000001-delta.vmdk").assert_fresh()
    assert before == {path: rest(path) for path in (base, top)}


def test_a_parent_beside_its_child_is_one_only_by_its_content_id(tmp_path):
    size = MIB
    hint = b"/vmfs/volumes/datastore1/vm/vm.vmdk"
    base = make(tmp_path, "vm", FLAT, size)
    top = make(tmp_path, "vm-000001", COWD, size, {1: b"a" * 512}, parent=base, hint=hint)
    other = make(tmp_path, "vm", FLAT, size, cid=0x12345678)
    refuse("ERROR_PARENT_MISMATCH", top, files=Disk(other).files)
    base.unlink()
    result = run_instar("commit", top)
    assert result.rc == 1 and hint.decode() in result.stderr, str(result)


def test_changed_block_tracking_is_kept_and_said(tmp_path):
    size = MIB
    base = make(tmp_path, "vm", FLAT, size, track="vm-ctk.vmdk")
    top = make(tmp_path, "vm-000001", COWD, size, {1: b"a" * 512}, parent=base, track="vm-000001-ctk.vmdk", newline=b"\r\n")
    assert "changeTrackPath" in commit(top, base).stderr


# --- What is refused --------------------------------------------------------------------------------------------------


def test_sesparse_is_only_read(tmp_path):
    rng = random.Random(2)
    size = 2 * MIB
    base = make(tmp_path, "vm", FLAT, size, data=rng.randbytes(size))
    top = make(tmp_path, "vm-000001", SESPARSE, size, drawn(rng, SESPARSE, size), parent=base)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[*Disk(top).files, *Disk(base).files], mentions=["seSparse", "commit it with -d"])
    over = create(tmp_path / "over.qcow2", backing=top.name, backing_fmt="vmdk")
    qemu_io(over, "write -P 1 0 64k")
    refuse("ERROR_UNSUPPORTED_FORMAT", over, files=Disk(top).files, mentions=["seSparse", "cannot be committed into", "-b"])
    notes = run_instar("info", "--output", "json", top).json["notes"]
    assert any("only read" in note for note in notes), notes
    commit(top, base, keep=True)


def test_a_journal_that_was_not_replayed(tmp_path):
    base = make(tmp_path, "vm", FLAT, MIB)
    top = make(tmp_path, "vm-000001", SESPARSE, MIB, {0: b"a" * 4096}, parent=base, extent={"replay": 1})
    files = [*Disk(top).files, *Disk(base).files]
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "-d", files=files, mentions=["journal", "ESXi"])
    assert run_instar("info", top).rc == 0


def test_an_extent_is_no_image(tmp_path):
    base = make(tmp_path, "vm", FLAT, MIB)
    for name, kind in (("a", COWD), ("b", SESPARSE)):
        extent = Disk(make(tmp_path, name, kind, MIB, parent=base)).files[1]
        for command in ("info", "check", "commit"):
            result = run_instar(command, extent)
            assert result.rc and ALONE in result.stderr, str(result)


@pytest.mark.parametrize("at, value, words", [
    (4, 3, "version 3"), (8, 0x1B, "flags 0x1b"), (16, 3, "grainSize"), (20, 0, "gdOffset"), (20, 0xFFFFFFFF, "directory"),
    (24, 0, "numGDEntries"), (24, 0xFFFFFFFF, "directory"), (12, 4095, "the descriptor says"), (2048, 3, "overlaps"),
    (2048, 0xFFFFFFFF, "past the end"),
])
def test_damage_is_found_before_anything_changes(tmp_path, at, value, words):
    base = make(tmp_path, "vm", FLAT, 2 * MIB)
    top = make(tmp_path, "vm-000001", COWD, 2 * MIB, {0: b"a" * 512, 7: b"b" * 512}, parent=base)
    extent = Disk(top).files[1]
    data = bytearray(extent.read_bytes())
    data[at : at + 4] = value.to_bytes(4, "little")
    extent.write_bytes(data)
    with support.untouched(*Disk(top).files, *Disk(base).files):
        result = run_instar("commit", top)
    assert result.rc and words in result.stderr and len(result.stderr.splitlines()) == 1, str(result)


@pytest.mark.parametrize("field, value, words", [
    (1, 1, "version"), (3, 16, "grain size"), (5, 1, "flags"), (7, 1, "reserved"), (10, 1 << 60, "volatile"),
    (16, 1 << 40, "grain directory"), (17, 0, "needs"), (18, 1 << 40, "past the end"), (24, 1 << 50, "past the end"),
    (8 * 64, 0x1000000000000001, "past the end"), (8 * 64, 5, "has no meaning"), (9 * 64, 1 << 62, "has no meaning"),
])
def test_damage_of_sesparse_is_found_before_anything_changes(tmp_path, field, value, words):
    base = make(tmp_path, "vm", FLAT, 2 * MIB)
    top = make(tmp_path, "vm-000001", SESPARSE, 2 * MIB, {0: b"a" * 4096, 7: b"b" * 4096}, parent=base)
    extent = Disk(top).files[1]
    data = bytearray(extent.read_bytes())
    data[8 * field : 8 * field + 8] = value.to_bytes(8, "little")
    extent.write_bytes(data)
    with support.untouched(*Disk(top).files, *Disk(base).files):
        result = run_instar("commit", "-d", top)
    assert result.rc and words in result.stderr and len(result.stderr.splitlines()) == 1, str(result)


def test_a_first_free_sector_far_behind_the_file(tmp_path):
    """The file would have to become longer than an entry can name; one that only has a gap gets the gap."""
    size = 2 * MIB
    base = make(tmp_path, "vm", FLAT, size)
    delta = make(tmp_path, "vm-000001", COWD, size, parent=base)
    top = create(tmp_path / "top.qcow2", backing=delta.name, backing_fmt="vmdk")
    qemu_io(top, "write -P 1 0 5k")
    extent = Disk(delta).files[1]
    for free, good in ((0xFFFFFFFF, False), (9000, True)):
        data = bytearray(extent.read_bytes())
        data[28:32] = free.to_bytes(4, "little")
        extent.write_bytes(data)
        if not good:
            refuse("ERROR_UNSUPPORTED_FORMAT", top, files=Disk(delta).files, mentions=["longer than"])
            continue
        wanted = raw(top, "qcow2")
        support.commit(top)
        assert content(delta, base) == wanted == raw(delta)
        Cowd(extent).assert_tidy()
        assert min(Cowd(extent).grains.values()) >= 9000


# --- Large disks ------------------------------------------------------------------------------------------------------


def test_large_disks_with_little_in_them(tmp_path):
    """Directories and tables in holes cost nothing: 60 TiB of seSparse, and 2 TiB of ESX."""
    for kind, size, at in ((SESPARSE, 60 * TIB, 8), (COWD, 2 * TIB - MIB, 1)):
        unit = UNIT[kind]
        # ext4 has no files of more than 16 TiB.
        parts = [min(10 * TIB, size - start) for start in range(0, size, 10 * TIB)]
        files = [tmp_path / f"{kind}-{number}-flat.vmdk" for number in range(len(parts))]
        for file, length in zip(files, parts):
            file.touch()
            os.truncate(file, length)
        lines = [(length // 512, "VMFS", file.name.encode()) for file, length in zip(files, parts)]
        base = tmp_path / f"{kind}.vmdk"
        base.write_bytes(delta_bytes.descriptor(FLAT, lines, cid=0x12345678))
        grains = {number: bytes([number % 250 + 1]) * unit for number in (0, 5, size // unit // 2, size // unit - 1)}
        top = make(tmp_path, f"{kind}-1", kind, size, grains, parent=base)
        support.commit(top, *(["-d"] if kind == SESPARSE else []))
        for number, data in grains.items():
            part, at = divmod(number * unit, 10 * TIB)
            with files[part].open("rb") as file:
                file.seek(at)
                assert file.read(unit) == data
        assert sum(file.stat().st_blocks for file in files) * 512 <= MIB
        if kind == COWD:
            Cowd(Disk(top).files[1]).assert_fresh()
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir(exist_ok=True)
