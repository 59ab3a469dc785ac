"""Disks in several files: split and flat vmdk, as backing, ancestor and overlay. Small extents are described by hand; those that
`qemu-img create` makes are of 2 GiB. The oracle is what qemu reads through the overlay before."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess

import pytest
import support
import vmdk_bytes
from FATtools import vmdkutils
from support import GIB, KIB, MIB, assert_clean, create, qemu_img, qemu_io, refuse

SEEDS = 120 if os.environ.get("INSTAR_DEEP") else 8


def text(parts, kind, cid=0x1234ABCD, parent=None):
    """A descriptor; `parts` are (sectors, type, name, offset or None)."""
    lines = [f"RW {n} {t} \"{name}\"{'' if at is None else f' {at}'}" for n, t, name, at in parts]
    hint = "" if parent is None else f'parentFileNameHint="{parent[0]}"\n'
    return (
        f"# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={0xFFFFFFFF if parent is None else parent[1]:08x}\n"
        f'createType="{kind}"\n{hint}\n# Extent description\n' + "\n".join(lines) + '\n\n#DDB\nddb.adapterType = "ide"\n'
    )


def disk(directory, name, sizes, kind="twoGbMaxExtentSparse", parent=None):
    """A disk of extents of these sizes in bytes; flat ones begin somewhere in their file."""
    parts = []
    for number, size in enumerate(sizes):
        file = directory / f"{name} s{number}.vmdk"
        if kind.endswith("Sparse"):
            create(file, size, fmt="vmdk")
            parts.append((size // 512, "SPARSE", file.name, None))
        else:
            offset = number * 3
            file.write_bytes(bytes(offset * 512 + size))
            parts.append((size // 512, "FLAT", file.name, offset))
    path = directory / f"{name}.vmdk"
    path.write_text(text(parts, kind, parent=None if parent is None else (parent.name, cid(parent))))
    return path


def field(path, key):
    return int(re.search(rf"^{key}=([0-9a-f]+)\r?$".encode(), path.read_bytes(), re.M)[1], 16)


def cid(path):
    return field(path, "CID")


def files_of(path):
    """The files of a disk: the descriptor, and what it names."""
    return [path, *(path.parent / name.decode() for name in re.findall(rb'^RW \d+ \w+ "([^"]+)"', path.read_bytes(), re.M))]


def raw(path, fmt="vmdk"):
    to = path.parent / "read.tmp"
    qemu_img("convert", "-f", fmt, "-O", "raw", path, to)
    data = to.read_bytes()
    to.unlink()
    return data


def check_commit(top, base, *options, top_fmt="vmdk", base_fmt="vmdk", emptied=True):
    wanted, tail = raw(top, top_fmt), raw(base, base_fmt)
    result = support.commit(top, *options)
    assert raw(base, base_fmt) == wanted + tail[len(wanted) :], "the backing reads wrong"
    if emptied:
        assert raw(top, top_fmt) == wanted, "the overlay reads wrong"
    for path, fmt in ((top, top_fmt), (base, base_fmt)):
        if fmt != "raw":
            assert_clean(path, fmt)
    return result


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"])
@pytest.mark.parametrize("over", ["vmdk", "qcow2"])
def test_backings_that_qemu_makes(tmp_path, kind, over):
    base, top = tmp_path / "base.vmdk", tmp_path / f"top.{over}"
    size = 5 * GIB if kind != "monolithicFlat" else 64 * MIB
    create(base, size, fmt="vmdk", subformat=kind)
    writes = ["write -P 1 0 1M", f"write -P 2 {size - 65536} 64k", f"write -P 6 {size // 2} 5k"]
    qemu_io(base, *writes, fmt="vmdk")
    create(top, backing=base.name, backing_fmt="vmdk", fmt=over)
    border = min(2 * GIB, size // 2)
    qemu_io(top, "write -P 3 512k 1M", f"write -P 4 {border - 100 * KIB} 200k", f"write -z {size - 128 * KIB} 64k", fmt=over)
    before = support.content_hash(top, over)
    result = support.commit(top, "--output", "json").json
    assert result["clusters_committed"] > 16
    assert support.content_hash(base, "vmdk") == before == support.content_hash(top, over)
    assert_clean(top, over)
    assert_clean(base, "vmdk")
    for file in files_of(base)[1:]:
        assert not kind.endswith("Sparse") or vmdk_bytes.Image(file, descriptor=False).copies_agree()


def test_overlays_in_several_files_are_emptied(tmp_path):
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    create(base, 4 * GIB + MIB, fmt="vmdk")
    create(top, backing=base.name, backing_fmt="vmdk", fmt="vmdk", subformat="twoGbMaxExtentSparse")
    for round_ in range(2):
        qemu_io(top, f"write -P {5 + round_} {2 * GIB - 64 * KIB} 128k", "write -P 7 4G 1M", "write -P 8 0 64k", fmt="vmdk")
        before = support.content_hash(top, "vmdk")
        found = support.commit(top, "--output", "json").json
        assert found["overlay_clusters_cleared"] == found["clusters_committed"] == 19
        assert support.content_hash(top, "vmdk") == support.content_hash(base, "vmdk") == before
        assert field(top, "parentCID") == cid(base)
        for file in files_of(top)[1:]:
            assert not vmdk_bytes.Image(file, descriptor=False).grains()


def test_every_layer_in_several_files(tmp_path):
    sizes = [2 * MIB, 64 * KIB, 3 * MIB + 64 * KIB]
    root = disk(tmp_path, "root", sizes, "twoGbMaxExtentFlat")
    qemu_io(root, "write -P 1 0 5M", fmt="vmdk")
    base = disk(tmp_path, "base", sizes[::-1], parent=root)
    qemu_io(base, "write -P 2 1M 100k", "write -P 3 3M 1M", fmt="vmdk")
    middle = disk(tmp_path, "middle", [sum(sizes)], parent=base)
    qemu_io(middle, "write -P 4 2000k 300k", fmt="vmdk")
    top = disk(tmp_path, "top", sizes, parent=middle)
    qemu_io(top, "write -P 5 2040k 80k", "write -P 6 5M 1000", fmt="vmdk")
    check_commit(top, middle)
    qemu_io(top, "write -P 7 30k 80k", fmt="vmdk")
    result = check_commit(top, root, "-b", root, emptied=False)
    assert "stale" in result.stderr


def random_disk(rng, directory, name, size, parent=None):
    """A disk of `size` bytes in a random shape."""
    shapes = ["twoGbMaxExtentSparse"] if parent else ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"]
    if rng.random() < 0.3:
        path = directory / f"{name}.vmdk"
        create(path, size, backing=parent and parent.name, backing_fmt="vmdk", fmt="vmdk")
        return path
    # qemu cannot write where an extent ends within a grain, except for the last.
    cuts = sorted({0, size // 512, *(rng.randrange(0, size // 512) // 128 * 128 for _ in range(rng.randrange(5)))})
    return disk(directory, name, [(b - a) * 512 for a, b in zip(cuts, cuts[1:])], rng.choice(shapes), parent)


def write_randomly(rng, path, fmt, size):
    writes = []
    for _ in range(rng.randrange(8)):
        start = rng.randrange(size // 512) * 512
        length = min(size - start, rng.randrange(1, 1 + rng.choice([8, 300, 4000])) * 512)
        writes.append(f"write {rng.choice(['-z', '-P 7', f'-P {rng.randrange(1, 255)}'])} {start} {length}")
    if writes:
        qemu_io(path, *writes, fmt=fmt)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_disks(tmp_path, seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 16 * MIB // 512) * 512
    base = random_disk(rng, tmp_path, "base", size)
    # That gives it another content ID.
    write_randomly(rng, base, "vmdk", size)
    over = rng.choice(["vmdk", "vmdk", "qcow2"])
    if over == "vmdk":
        top = random_disk(rng, tmp_path, "top", size, parent=base)
    else:
        top = tmp_path / "top.qcow2"
        create(top, backing=base.name, backing_fmt="vmdk", cluster_size=rng.choice([512, 4096, 65536]))
    write_randomly(rng, top, over, size)
    check_commit(top, base, top_fmt=over)


def fattools_write(path, runs):
    image = vmdkutils.Image(path.name, "rb+")
    for at, data in runs:
        image.seek(at)
        image.write(data)
    image.close()


def by_fattools(path) -> bytes:
    image = vmdkutils.Image(path.name)
    data = image.read(image.size)
    image.close()
    return bytes(data)


def test_a_chain_of_fattools(tmp_path, monkeypatch):
    """Base and child made, written, read and written again by another program, which checks the content IDs."""
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    # It takes relative names from the working directory.
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    # It takes a content ID for eight digits wherever it replaces one, and writes no leading zeroes.
    monkeypatch.setattr(vmdkutils.random, "randint", lambda _, last: rng.randrange(1 << 28, last))

    def runs(count):
        lengths = [rng.choice([512, 5120, 70000, 3 * MIB]) for _ in range(count)]
        return [(rng.randrange(20 * MIB), rng.randbytes(length)) for length in lengths]

    # Of another size, its last grain table reaches into the grain directory behind it.
    vmdkutils.mk_dynamic("base.vmdk", 32 * MIB)
    fattools_write(base, runs(6))
    vmdkutils.mk_diff("top.vmdk", "base.vmdk")
    expected = bytearray(by_fattools(base))
    for turn in range(3):
        written = runs(5)
        for at, data in written:
            expected[at : at + len(data)] = data
        fattools_write(top, written)
        assert raw(top) == expected == by_fattools(top), turn
        support.commit(top)
        assert raw(base) == expected == by_fattools(base), turn
        assert by_fattools(top) == expected == raw(top)
        assert_clean(base, "vmdk")


def pair(tmp_path, kind="twoGbMaxExtentSparse", sizes=(MIB, 2 * MIB)):
    base = disk(tmp_path, "base", sizes, kind)
    qemu_io(base, f"write -P 1 0 {sum(sizes)}", fmt="vmdk")
    top = disk(tmp_path, "top", sizes, parent=base)
    qemu_io(top, "write -P 2 512k 500k", "write -P 3 900k 120k", fmt="vmdk")
    return base, top


def replace(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize("which", ["base", "top"])
@pytest.mark.parametrize(
    ("name", "error", "mentions"),
    [
        ("../outside.vmdk", "ERROR_WRITE_TARGET_NOT_ALLOWED", "leads outside"),
        ("ABSOLUTE", "ERROR_WRITE_TARGET_NOT_ALLOWED", "leads outside"),
        ("link.vmdk", "ERROR_WRITE_TARGET_NOT_ALLOWED", "leads outside"),
        ("json:{}", "ERROR_WRITE_TARGET_NOT_ALLOWED", "not understood"),
        ("absent.vmdk", "ERROR_BACKING_NOT_FOUND", "does not exist"),
        ("fifo", "ERROR_OPEN_FAILED", "not a regular file"),
        ("/dev/null", "ERROR_WRITE_TARGET_NOT_ALLOWED", "leads outside"),
        ("SELF", "ERROR_CHAIN_LOOP", "used twice"),
        ("SIBLING", "ERROR_CHAIN_LOOP", "used twice"),
        ("OTHER", "ERROR_CHAIN_LOOP", "used twice"),
        ("hard link.vmdk", "ERROR_CHAIN_LOOP", "used twice"),
    ],
)
def test_where_extents_may_not_lead(tmp_path, which, name, error, mentions):
    directory = tmp_path / "images"
    directory.mkdir()
    base, top = pair(directory)
    image = base if which == "base" else top
    outside = tmp_path / "outside.vmdk"
    support.copy(files_of(image)[2], outside)
    (directory / "link.vmdk").symlink_to(outside)
    os.link(files_of(image)[1], directory / "hard link.vmdk")
    os.mkfifo(directory / "fifo")
    other = files_of(top if which == "base" else base)[2].name
    real = {"ABSOLUTE": str(outside), "SELF": image.name, "SIBLING": files_of(image)[1].name, "OTHER": other}.get(name, name)
    replace(image, files_of(image)[2].name.encode(), real.encode())
    named = [file for file in {*files_of(base), *files_of(top), outside} if file.is_file()]
    refuse(error, top, files=[file for file in named if file != top], mentions=[mentions])


def test_extents_in_an_allowed_directory(tmp_path):
    for name in ("images", "data"):
        (tmp_path / name).mkdir()
    base, top = pair(tmp_path / "images")
    extent = files_of(base)[2]
    moved = tmp_path / "data" / extent.name
    extent.rename(moved)
    replace(base, extent.name.encode(), str(moved).encode())
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base, moved], mentions=["--allow-backing-dir"])
    check_commit(top, base, "--allow-backing-dir", moved.parent)


@pytest.mark.parametrize(
    ("kind", "old", "new", "error", "mentions"),
    [
        ("twoGbMaxExtentSparse", b"RW 2048 ", b"RW 2056 ", "ERROR_BACKING_CORRUPT", "the descriptor says 1052672 bytes"),
        ("twoGbMaxExtentSparse", b"RW 2048 ", b"RDONLY 2048 ", "ERROR_UNSUPPORTED_FORMAT", "only RW"),
        ("twoGbMaxExtentSparse", b"RW 2048 SPARSE", b"RW 2048 VMFSRDM", "ERROR_UNSUPPORTED_FORMAT", "VMFSRDM"),
        ("twoGbMaxExtentSparse", b"RW 2048 SPARSE", b"RW 2048 SESPARSE", "ERROR_PARSE_FAILED", "seSparse"),
        ("twoGbMaxExtentSparse", b"RW 2048 SPARSE", b"RW 2048 VMFSSPARSE", "ERROR_PARSE_FAILED", "COWD"),
        ("twoGbMaxExtentSparse", b"twoGbMaxExtentSparse", b"fullDevice", "ERROR_UNSUPPORTED_FORMAT", "fullDevice"),
        ("twoGbMaxExtentSparse", b"RW 2048 ", b"RW 0 ", "ERROR_PARSE_FAILED", "extent 1"),
        ("twoGbMaxExtentFlat", b'" 3', b'" 4', "ERROR_BACKING_CORRUPT", "too short"),
        ("twoGbMaxExtentFlat", b"RW 2048 ", b"RW 18014398509481984 ", "ERROR_PARSE_FAILED", "no size"),
        ("twoGbMaxExtentFlat", b"RW 2048 FLAT", b"RW 2048 SPARSE", "ERROR_PARSE_FAILED", "extent 1 of the descriptor"),
        ("twoGbMaxExtentFlat", b"# Extent", b"\x1b]0;x\x07=1\n# Extent", None, None),
    ],
)
def test_descriptors_that_are_wrong(tmp_path, kind, old, new, error, mentions):
    base, top = pair(tmp_path, kind)
    replace(base, old, new)
    if error is None:
        check_commit(top, base)
        return
    refuse(error, top, files=[*files_of(base), *files_of(top)[1:]], mentions=[mentions])


def test_damage_in_one_extent_is_found_before_anything_changes(tmp_path):
    base, top = pair(tmp_path)
    extent = files_of(base)[2]
    image = vmdk_bytes.Image(extent, descriptor=False)
    table = image.tables(image.directory)[0][0]
    vmdk_bytes.patch(extent, table * 512 + 4 * 20, (2**31).to_bytes(4, "little"))
    refuse("ERROR_BACKING_CORRUPT", top, files=[*files_of(base), *files_of(top)[1:]], mentions=[extent.name, "past the end"])


@pytest.mark.parametrize("which", ["base", "top"])
@pytest.mark.parametrize(
    ("at", "value", "says"),
    [(28, 0x0101010100000000, "descriptor"), (28, (1 << 63) - 1, "descriptor"), (64, 1 << 20, "overHead")],
)
def test_places_in_the_header_of_an_extent_that_are_not_in_the_file(tmp_path, which, at, value, says):
    """`descriptorOffset` and `overHead`, of which emptying takes what may be given back."""
    base = create(tmp_path / "base.vmdk", MIB, fmt="vmdk", subformat="twoGbMaxExtentSparse")
    top = tmp_path / "top.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "-b", "base.vmdk", "-F", "vmdk", top)
    qemu_io(top, "write -P 7 0 192k", fmt="vmdk")
    with open(tmp_path / f"{which}-s001.vmdk", "r+b") as file:
        file.seek(at)
        file.write(value.to_bytes(8, "little"))
    name = "ERROR_OVERLAY_CORRUPT" if which == "top" else "ERROR_BACKING_CORRUPT"
    refuse(name, top, files=[*files_of(top), *files_of(base)], mentions=[says])
    assert support.run_instar("check", tmp_path / f"{which}.vmdk").rc in (1, 2)


def test_a_sibling_that_is_no_extent_keeps_its_header(tmp_path):
    """A descriptor may name any file of its directory as plain bytes; one that is another image is not written to."""
    victim = create(tmp_path / "victim", 64 * KIB)
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(victim.stat().st_size))
    size = victim.stat().st_size // 512
    base = tmp_path / "base.vmdk"
    base.write_text(text([(size, "FLAT", "flat", 0)], "monolithicFlat"))
    top = create(tmp_path / "top", size * 512, backing=base, backing_fmt="vmdk")
    qemu_io(top, "write -P 7 0 4k")
    for name in ("victim", "sparse.vmdk"):
        if name == "sparse.vmdk":
            create(tmp_path / name, size * 512, fmt="vmdk")
            os.truncate(tmp_path / name, max(size * 512, (tmp_path / name).stat().st_size))
        base.write_text(text([(size, "FLAT", name, 0)], "monolithicFlat"))
        other = "qcow2" if name == "victim" else "vmdk"
        words = [tmp_path / name, f"looks like a {other} image", "base.vmdk", "-F vmdk"]
        refuse("ERROR_FORMAT_MISMATCH", top, files=[base, tmp_path / name], mentions=words)


def test_a_guest_that_writes_a_mark_into_its_flat_extent(tmp_path):
    """Whoever names the format is believed, as for raw."""
    base = disk(tmp_path, "base", [4 * MIB], "monolithicFlat")
    create(tmp_path / "other", 64 * KIB)
    with files_of(base)[1].open("r+b") as extent:
        extent.write((tmp_path / "other").read_bytes()[:512])
    top = create(tmp_path / "top", 4 * MIB, backing=base, backing_fmt="vmdk")
    qemu_io(top, "write -P 7 1M 4k")
    refuse("ERROR_FORMAT_MISMATCH", top, files=files_of(base), mentions=["looks like a qcow2 image", "-F vmdk"])
    check_commit(top, base, "-F", "vmdk", top_fmt="qcow2")
    # Where it is only read, nothing is at stake.
    assert support.run_instar("map", base).rc == 0


def test_an_extent_in_use_is_refused(tmp_path):
    base, top = pair(tmp_path)
    path = tmp_path / "socket"
    held = subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", path, "-t", files_of(base)[2]])
    try:
        for _ in range(200):
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(path))
                break
            except OSError:
                held.poll()
                subprocess.run(["sleep", "0.05"], check=True)
        refuse("ERROR_IMAGE_IN_USE", top, files=[base], mentions=[files_of(base)[2].name])
    finally:
        held.terminate()
        held.wait()


def test_more_files_than_devices(tmp_path):
    base, top = pair(tmp_path)
    parts = [(8, "FLAT", f"f{number}", 0) for number in range(600)]
    base.write_text(text(parts, "twoGbMaxExtentFlat", cid=cid(base)))
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base, *files_of(top)[1:]], mentions=["512"])


def test_flat_extents_that_claim_a_parent(tmp_path):
    base, top = pair(tmp_path)
    flat = disk(tmp_path, "flat", [MIB, 2 * MIB], "twoGbMaxExtentFlat", parent=base)
    refuse("ERROR_UNSUPPORTED_FORMAT", flat, files=files_of(base), mentions=["flat extents cannot have a parent"])


def test_holes_stay_holes(tmp_path):
    base = disk(tmp_path, "base", [64 * MIB], "monolithicFlat")
    os.truncate(files_of(base)[1], 0)
    os.truncate(files_of(base)[1], 64 * MIB)
    top = tmp_path / "top.qcow2"
    create(top, backing=base.name, backing_fmt="vmdk")
    qemu_io(top, "write -P 1 1M 1M", "write -z 4M 32M")
    check_commit(top, base, top_fmt="qcow2")
    assert files_of(base)[1].stat().st_blocks * 512 < 3 * MIB


def test_an_interrupted_commit_is_finished(tmp_path):
    base, top = pair(tmp_path)
    wanted = raw(top)
    copies = tmp_path / "copies"
    copies.mkdir()
    for file in [*files_of(base), *files_of(top)]:
        support.copy(file, copies / file.name)
    support.commit(top, "-d")
    # The overlay has followed, and says that it was only announced; the backing did not get there.
    vmdk_bytes.announce(top)
    for file in files_of(base):
        support.copy(copies / file.name, file)
    support.commit(top)
    assert raw(base) == raw(top) == wanted


@pytest.mark.parametrize("kind", ["twoGbMaxExtentSparse", "monolithicFlat"])
def test_info(tmp_path, kind):
    base, _ = pair(tmp_path, kind, sizes=(MIB,))
    ours = support.run_instar("info", "--output", "json", base).json
    theirs = qemu_img("info", "--output", "json", base).json
    assert (ours["format"], ours["virtual-size"]) == (theirs["format"], theirs["virtual-size"])
    for key in ("cid", "parent-cid", "create-type"):
        assert ours["format-specific"]["data"][key] == theirs["format-specific"]["data"][key]


ENCODINGS = [("windows-1252", "cp1252", "grün"), ("GBK", "gbk", "猫盘"), ("Shift_JIS", "cp932", "ディスク"), ("Big5", "big5", "磁碟")]


@pytest.mark.parametrize("raw_bytes", [False, True])
@pytest.mark.parametrize("name,codec,stem", ENCODINGS)
def test_names_in_the_encoding_of_the_descriptor(tmp_path, name, codec, stem, raw_bytes):
    """VMware writes the names in the encoding that the descriptor names. The files have that name in UTF-8, or, where the
    disk was copied by a program that knows nothing of it, the bytes of the descriptor."""
    on_disk = (lambda text: text.encode(codec)) if raw_bytes else os.fsencode
    directory = os.fsencode(tmp_path)
    flat = os.path.join(directory, on_disk(f"{stem}-flat.vmdk"))
    with open(flat, "wb") as file:
        file.write(b"\x11" * MIB + bytes(MIB))
    base = os.path.join(directory, on_disk(f"{stem}.vmdk"))
    header = f'encoding="{name}"\r\n'

    def write(path, parts, kind, **options):
        descriptor = text(parts, kind, **options).replace("\n", "\r\n").replace("createType", header + "createType")
        with open(path, "wb") as file:
            file.write(descriptor.encode(codec))

    write(base, [(4096, "FLAT", f"{stem}-flat.vmdk", 0)], "monolithicFlat")
    extent = tmp_path / "top-s001.vmdk"
    create(extent, 2 * MIB, fmt="vmdk")
    top = tmp_path / "top.vmdk"
    write(top, [(4096, "SPARSE", extent.name, None)], "twoGbMaxExtentSparse", parent=(f"{stem}.vmdk", 0x1234ABCD))
    qemu_io(extent, "write -P 0x22 64k 64k", "write -P 0x33 1M 128k", fmt="vmdk")
    wanted = bytearray(b"\x11" * MIB + bytes(MIB))
    wanted[64 * KIB : 128 * KIB] = b"\x22" * 64 * KIB
    wanted[MIB : MIB + 128 * KIB] = b"\x33" * 128 * KIB
    mapped = support.run_instar("map", "--output", "json", top)
    assert mapped.rc == 0 and {run["depth"] for run in mapped.json} == {0, 1}, mapped
    chain = support.run_instar("info", "--backing-chain", "--output", "json", top)
    assert chain.rc == 0 and len(chain.json) == 2, chain
    support.commit(top)
    with open(flat, "rb") as file:
        assert file.read() == wanted
    assert field(top, "parentCID") == field(tmp_path / os.fsdecode(on_disk(f"{stem}.vmdk")), "CID") != 0x1234ABCD
    assert b"\r\n" in top.read_bytes() and not vmdk_bytes.Image(extent).grains()


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("absolute", [False, True])
def test_descriptors_as_vmware_writes_them(tmp_path, ending, absolute):
    """More keys than QEMU writes, CRLF, a list of changed blocks, and the parent by its whole path."""
    flat = tmp_path / "disk-flat.vmdk"
    flat.write_bytes(b"\x11" * MIB + bytes(MIB))
    base = tmp_path / "disk.vmdk"
    more = '\nisNativeSnapshot="no"\nencoding="UTF-8"\ncreateType'
    tail = '# Change Tracking File\nchangeTrackPath="disk-ctk.vmdk"\n\nddb.longContentID = "0123456789abcdef0123456789abcdef"\n'
    vmfs = text([(4096, "VMFS", flat.name, None)], "vmfs").replace("\ncreateType", more) + tail
    base.write_bytes(vmfs.replace("\n", ending).encode())
    extent = tmp_path / "disk-000001-s001.vmdk"
    create(extent, 2 * MIB, fmt="vmdk")
    qemu_io(extent, "write -P 0x22 64k 64k", fmt="vmdk")
    top = tmp_path / "disk-000001.vmdk"
    hint = str(base) if absolute else base.name
    child = text([(4096, "SPARSE", extent.name, None)], "twoGbMaxExtentSparse", parent=(hint, 0x1234ABCD))
    top.write_bytes(child.replace("\ncreateType", more).replace("\n", ending).encode())
    result = support.commit(top)
    assert "changeTrackPath" in result.stderr
    assert flat.read_bytes()[64 * KIB : 128 * KIB] == b"\x22" * 64 * KIB
    assert base.read_bytes().count(ending.encode()) == vmfs.count("\n")
    assert re.search(rb"^parentCID=([0-9a-f]+)\r?$", top.read_bytes(), re.M)[1] == re.search(
        rb"^CID=([0-9a-f]+)\r?$", base.read_bytes(), re.M
    )[1]
    assert raw(top) == raw(base)
