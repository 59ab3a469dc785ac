"""`instar check`: the numbers, the JSON and the exit status of `qemu-img check`, on images right and wrong."""

from __future__ import annotations

import random

import pytest
import qcow2_bytes
import support
from qcow2_bytes import COPIED, ZERO

OFFSET = 0x00FF_FFFF_FFFF_FE00


def checked(image, *options, rc=None, fmt=None):
    """`instar check` with JSON; the image stays as it is."""
    chosen = ["-f", fmt] if fmt else []
    with support.untouched(image):
        result = support.run_instar("check", "--output", "json", *chosen, *options, image)
    assert rc is None or result.rc == rc, str(result)
    return result


def same_as_qemu(image):
    """Both tools agree in every key, in the exit status, and in the summary for people."""
    theirs = support.qemu_img("check", "--output", "json", image, rc=None)
    ours = checked(image, rc=theirs.rc)
    assert ours.json_of_sandbox == theirs.json
    human = support.qemu_img("check", image, rc=None)
    assert support.run_instar("check", image).stdout == human.stdout
    return ours


def filled(path, seed=1, size="24M", **options):
    """An image with data, zeroes and compressed clusters here and there."""
    rng = random.Random(seed)
    support.create(path, size, **options)
    commands = []
    for number in range(24):
        at = rng.randrange(0, 23 * 1024, 4)
        kind = rng.choice(["write -P 7", "write -P 7", "write -z", "write -zu"])
        commands.append(f"{kind} {at}k {rng.choice([4, 64, 300])}k")
    support.qemu_io(path, *commands)
    return path


OPTIONS = [
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": "4k", "refcount_bits": 1},
    {"cluster_size": "2M", "refcount_bits": 64},
    {"refcount_bits": 8},
    {"extended_l2": "on", "cluster_size": "16k"},
    {"lazy_refcounts": "on"},
    {"preallocation": "metadata"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_images_that_are_right(tmp_path, options):
    image = filled(tmp_path / "image.qcow2", **options)
    result = same_as_qemu(image)
    assert result.rc == 0 and result.json["allocated-clusters"] > 0
    assert "leaks" not in result.json and result.stderr == ""


def test_an_empty_image(tmp_path):
    support.create(tmp_path / "image", "1T")
    assert same_as_qemu(tmp_path / "image").rc == 0


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters(tmp_path, kind):
    plain = tmp_path / "plain"
    plain.write_bytes(random.Random(2).randbytes(1 << 19) + b"compresses well " * (1 << 16))
    packed = tmp_path / "image"
    support.qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", plain, packed)
    assert same_as_qemu(packed).json["compressed-clusters"] > 10


def test_snapshots_and_bitmaps(tmp_path):
    image = filled(tmp_path / "image", cluster_size="4k")
    support.qemu_img("snapshot", "-c", "one", image)
    support.qemu_io(image, "write -P 9 1M 2M")
    support.qemu_img("snapshot", "-c", "two", image)
    support.qemu_img("bitmap", "--add", "-g", "64k", image, "changes")
    support.qemu_io(image, "write -P 8 9M 2M", "write -z 3M 1M")
    assert same_as_qemu(image).rc == 0


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_a_snapshot_without_its_size(tmp_path, compat):
    """An entry of a snapshot has less extra data than version 3 asks for."""
    image = filled(tmp_path / "image", compat=compat)
    support.qemu_img("snapshot", "-c", "one", image)
    inner = qcow2_bytes.Image(image)
    entry = inner.get("snapshots_offset")
    inner.poke(entry + 36, (8).to_bytes(4, "big"))
    result = same_as_qemu(image)
    assert (result.rc, result.json.get("corruptions", 0)) == ((2, 1) if compat == "1.1" else (0, 0)), str(result)


def test_a_chain_is_checked_one_image_at_a_time(tmp_path):
    """What is below need not even be there."""
    base = filled(tmp_path / "base")
    top = support.create(tmp_path / "top", backing="base") or tmp_path / "top"
    support.qemu_io(top, "write -P 1 0 1M")
    base.unlink()
    assert checked(top, rc=0).json["allocated-clusters"] == 16


SPOILED = [{}, {"cluster_size": 512}, {"cluster_size": "4k", "refcount_bits": 2}, {"refcount_bits": 64}, {"refcount_bits": 1}]


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("options", SPOILED, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("seed", range(2))
def test_wrong_refcounts_and_flags(tmp_path, options, snapshot, seed):
    """Anything for half of the refcounts and a third of the flags: each is found, as what it is."""
    if snapshot and options.get("refcount_bits") == 1:
        options = {**options, "refcount_bits": 16}
    image = filled(tmp_path / "image", seed, size="24M", **options)
    if snapshot:
        support.qemu_img("snapshot", "-c", "one", image)
        support.qemu_io(image, "write -P 9 1M 2M")
    qcow2_bytes.Image(image).spoil_refcounts(random.Random(seed))
    result = same_as_qemu(image)
    assert result.rc == 2 and result.json["corruptions"] > 0


def test_leaks_alone(tmp_path):
    image = filled(tmp_path / "image")
    inner = qcow2_bytes.Image(image)
    with image.open("ab") as file:
        file.write(bytes(3 * inner.cluster_size))
    for number in range(1, 4):
        inner.set_refcount(inner.file_size - number * inner.cluster_size, number)
    result = same_as_qemu(image)
    assert result.rc == 3 and result.json["leaks"] == 3
    assert result.stderr.count("Leaked cluster") == 3 and "refcount=2 reference=0" in result.stderr


def test_a_refcount_block_that_is_missing(tmp_path):
    image = filled(tmp_path / "image", cluster_size=512)
    inner = qcow2_bytes.Image(image)
    inner.poke64(inner.get("refcount_table_offset") + 8, 0)
    result = same_as_qemu(image)
    assert result.rc == 2 and result.json["corruptions"] >= 256


def test_many_findings_are_counted_and_the_first_are_shown(tmp_path):
    image = filled(tmp_path / "image", cluster_size=512)
    inner = qcow2_bytes.Image(image)
    for cluster in range(600, 1400):
        inner.set_refcount(cluster * 512, 0)
    result = same_as_qemu(image)
    lines = result.stderr.splitlines()
    assert len(lines) == 201 and lines[-1] == f"… and {result.json['corruptions'] - 200} more"


def broken(inner, how):
    first = inner.l2_at(inner.data_clusters()[0])
    match how:
        case "data in the header":
            inner.poke64(first, COPIED)
            inner.poke64(first, COPIED | inner.peek64(inner.l1_at()) & OFFSET)
        case "data past the end":
            inner.poke64(first, COPIED | inner.end)
        case "data off its place":
            inner.poke64(first, inner.peek64(first) | 0x200)
        case "L2 table past the end":
            inner.poke64(inner.l1_at(), COPIED | inner.end)
        case "L2 table off its place":
            inner.poke64(inner.l1_at(), inner.peek64(inner.l1_at()) | 0x200)
        case "L2 table twice":
            inner.poke64(inner.l1_at(1), inner.peek64(inner.l1_at(0)))
        case "refcount block past the end":
            inner.poke64(inner.get("refcount_table_offset"), inner.end)
        case "refcount table as L1 table":
            inner.set("l1_offset", inner.get("refcount_table_offset"))
        case "reserved bits":
            inner.poke64(first, inner.peek64(first) | 1 << 57)


STRUCTURES = [
    "data in the header", "data past the end", "data off its place", "L2 table past the end", "L2 table off its place",
    "L2 table twice", "refcount block past the end", "refcount table as L1 table", "reserved bits",
]


@pytest.mark.parametrize("how", STRUCTURES)
def test_structures_that_make_no_sense(tmp_path, how):
    """The check ends there, with the status for corruption, and says so in one line."""
    image = filled(tmp_path / "image", cluster_size="4k")
    broken(qcow2_bytes.Image(image), how)
    result = checked(image, rc=2)
    assert result.json["corruptions"] == 1 and len(result.stderr.splitlines()) == 1, str(result)
    assert result.stderr.startswith("ERROR ") and "the rest was not looked at" in result.stderr
    human = support.run_instar("check", image)
    assert human.rc == 2 and "1 errors were found on the image" in human.stdout


def test_quiet_prints_findings_only(tmp_path):
    image = filled(tmp_path / "image")
    result = support.run_instar("check", "-q", image)
    assert (result.rc, result.stdout, result.stderr) == (0, "", "")
    broken(qcow2_bytes.Image(image), "data past the end")
    result = support.run_instar("check", "-q", image)
    assert (result.rc, result.stdout) == (2, "") and "ERROR" in result.stderr


# --- other formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat", "twoGbMaxExtentFlat"])
def test_vmdk(tmp_path, kind):
    image = tmp_path / "image.vmdk"
    support.create(image, "20M", fmt="vmdk", subformat=kind)
    support.qemu_io(image, "write -P 1 3M 2M", fmt="vmdk")
    assert same_as_qemu(image).rc == 0


def test_a_vmdk_whose_grains_overlap(tmp_path):
    image = tmp_path / "image.vmdk"
    support.create(image, "20M", fmt="vmdk")
    support.qemu_io(image, "write -P 1 0 2M", fmt="vmdk")
    data = bytearray(image.read_bytes())
    directory = int.from_bytes(data[56:64], "little") * 512
    table = int.from_bytes(data[directory : directory + 4], "little") * 512
    data[table : table + 4] = data[table + 4 : table + 8]
    image.write_bytes(data)
    result = checked(image, rc=2)
    # The second copy of the table has the place that was right.
    assert result.json["corruptions"] == 2 and "overlaps" in result.stderr and "second copy" in result.stderr


def test_a_format_without_consistency(tmp_path):
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(support.MIB))
    result = support.run_instar("check", "-f", "raw", image)
    assert result.rc == support.qemu_img("check", "-f", "raw", image, rc=None).rc == 63
    assert len(result.stderr.splitlines()) == 1 and "cannot be checked" in result.stderr


# --- what is refused --------------------------------------------------------------------------------


def fails(image, *options, says, status=1):
    result = support.run_instar("check", *options, image)
    assert result.rc == status and result.stdout == "" and len(result.stderr.splitlines()) == 1, str(result)
    for word in [image.name, *says]:
        assert word in result.stderr, f"{word}: {result.stderr}"


def test_what_is_no_image(tmp_path):
    absent, garbage = tmp_path / "absent", tmp_path / "garbage"
    garbage.write_bytes(bytes(range(256)) * 100)
    fails(absent, says=["does not exist"])
    fails(garbage, says=["begins like no known format"])
    fails(tmp_path, says=["is a directory"])
    image = filled(tmp_path / "image")
    fails(image, "-f", "vmdk", says=["vmdk"])
    result = support.run_instar("check", "--output", "json", absent)
    assert result.rc == 1 and result.error["name"] == "ERROR_IMAGE_NOT_FOUND"


def test_an_image_in_use(tmp_path):
    image = filled(tmp_path / "image")
    with support.Holder(image):
        fails(image, says=["another process"])
        assert support.run_instar("check", "-U", image).rc == 0
    with support.Holder(image, "-r"):
        assert support.run_instar("check", image).rc == 0


def test_another_file_of_the_image_is_gated(tmp_path):
    """An extent outside the directory is looked at only where the operator allows it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    image = here / "image.vmdk"
    support.create(image, "20M", fmt="vmdk", subformat="twoGbMaxExtentSparse")
    (here / "image-s001.vmdk").rename(elsewhere / "image-s001.vmdk")
    image.write_text(image.read_text().replace('"image-s001', f'"{elsewhere}/image-s001'))
    fails(image, says=["--allow-backing-dir"])
    assert support.run_instar("check", "--allow-backing-dir", elsewhere, image).rc == 0
