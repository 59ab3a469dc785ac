"""`instar measure`: the numbers of `qemu-img measure`, and what a commit really needs."""

from __future__ import annotations

import os
import random
import re

import dirty_bitmaps
import pytest
import support
from support import MIB

CHUNK = 4096
OPTIONS = ["", "cluster_size=4096", "cluster_size=2M", "compat=0.10", "extended_l2=on", "refcount_bits=1", "refcount_bits=64,cluster_size=512"]


def both(*args):
    """Both tools say the same of an image, or of a size."""
    theirs = support.run("qemu-img", "measure", "--output", "json", *args)
    ours = support.run_instar("measure", "--output", "json", *args)
    if theirs.rc != 0:
        assert ours.rc != 0 and "too large" in ours.stderr and "too large" in theirs.stderr, f"{ours}\n{theirs}"
        return
    assert theirs.rc == 0 and (ours.rc, ours.stderr) == (0, ""), f"{ours}\n{theirs}"
    # What is measured without an image needs no sandbox.
    measured = ours.json if "--size" in args else ours.json_of_sandbox
    assert measured == theirs.json, f"{ours}\n{theirs}"
    assert support.run_instar("measure", *args).stdout == support.run("qemu-img", "measure", *args).stdout
    return measured


def scribble(rng, size, count, zeroes=True):
    kinds = ["write -P 5", "write -P 6", *(["write -z", "write -zu", "discard"] if zeroes else [])]
    for _ in range(count):
        at = rng.randrange(size // CHUNK) * CHUNK
        yield f"{rng.choice(kinds)} {at} {min(rng.choice([4, 64, 100, 700]) * 1024, size - at)}"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", ["0", "512", "1M", "1G", "1T", "1000000000"])
def test_sizes(size, options):
    both("-O", "qcow2", *(["-o", options] if options else []), "--size", size)


@pytest.mark.parametrize("size", ["0", "1", "1M", "1000000001"])
def test_raw_sizes(size):
    both("--size", size)
    both("-O", "raw", "--size", size)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "raw"])
def test_images(fmt, seed, tmp_path):
    rng = random.Random(f"{fmt} {seed}")
    base, top = tmp_path / "base", tmp_path / "top"
    support.create(base, 6 * MIB, fmt=fmt)
    support.qemu_io(base, *scribble(rng, 6 * MIB, 8, zeroes=fmt == "qcow2"), fmt=fmt)
    images = [(base, fmt)]
    if fmt != "raw":
        support.create(top, backing="base", backing_fmt=fmt, fmt=fmt)
        support.qemu_io(top, *scribble(rng, 6 * MIB, 4, zeroes=fmt == "qcow2"), fmt=fmt)
        images.append((top, fmt))
    if fmt == "qcow2":
        support.qemu_img("convert", "-c", "-O", "qcow2", top, tmp_path / "packed")
        images.append((tmp_path / "packed", fmt))
    for image, kind in images:
        with support.untouched(image):
            both("-f", kind, image)
            for options in ["", "cluster_size=4096", "cluster_size=1M"]:
                both("-f", kind, "-O", "qcow2", *(["-o", options] if options else []), image)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_snapshots(compat, tmp_path):
    rng = random.Random(compat)
    base, top = tmp_path / "base", tmp_path / "top"
    support.create(base, 8 * MIB)
    support.qemu_io(base, *scribble(rng, 8 * MIB, 3))
    support.create(top, backing="base", backing_fmt="qcow2", compat=compat)
    for name in ["first", "7", "second"]:
        support.qemu_io(top, *scribble(rng, 8 * MIB, 3))
        support.qemu_img("snapshot", "-c", name, top)
    support.qemu_img("snapshot", "-d", "first", top)
    support.qemu_io(top, *scribble(rng, 8 * MIB, 6))
    measured = set()
    with support.untouched(base, top):
        for name in ["7", "second", "2", "3", "snapshot.id=2", "snapshot.name=second", "snapshot.id=3,snapshot.name=second"]:
            for options in ["", "cluster_size=4096"]:
                measured.add(both("-O", "qcow2", *(["-o", options] if options else []), "-l", name, top)["required"])
        measured.add(both("-O", "qcow2", top)["required"])
        for name in ["first", "1", "", "snapshot.id=2,snapshot.name=second"]:
            ours = support.run_instar("measure", "-l", name, top)
            assert ours.rc == 1 and "it has '7', 'second'" in ours.stderr, str(ours)
        ours = support.run_instar("measure", "-l", "7", base)
        assert ours.rc == 1 and "no internal snapshots: leave out -l" in ours.stderr, str(ours)
    assert len(measured) >= 4, "the snapshots are too much alike to tell them apart"


def test_a_snapshot_has_the_size_that_it_had(tmp_path):
    image = tmp_path / "image"
    support.create(image, 8 * MIB)
    support.qemu_io(image, "write -P 5 0 1M")
    support.qemu_img("snapshot", "-c", "small", image)
    before = support.run_instar("measure", "--output", "json", "-O", "qcow2", image).json_of_sandbox
    support.qemu_img("resize", image, "64M")
    support.qemu_io(image, "write -P 6 60M 1M")
    assert support.run_instar("measure", "--output", "json", "-O", "qcow2", "-l", "small", image).json_of_sandbox == before
    support.qemu_img("snapshot", "-a", "small", image)
    assert both("-O", "qcow2", image) == before


def test_bitmaps(tmp_path):
    base, image = tmp_path / "base", tmp_path / "image"
    support.create(base, 64 * MIB)
    support.create(image, backing="base", backing_fmt="qcow2")
    support.qemu_img("bitmap", "--add", base, "below")
    assert both("-O", "qcow2", image)["bitmaps"] == 0, "those of the backing are not the image's"
    for number, granularity in enumerate(["512", "4096", "64k", "2M"]):
        support.qemu_img("bitmap", "--add", "-g", granularity, image, "b" * (number * 300 + 1))
    support.qemu_img("bitmap", "--disable", image, "b")
    for options in ["", "cluster_size=512", "cluster_size=2M", "compat=0.10"]:
        measured = both("-O", "qcow2", *(["-o", options] if options else []), image)
        assert measured.get("bitmaps", 0) > 0 or options == "compat=0.10"
    both("-O", "raw", image)
    old = tmp_path / "old"
    support.create(old, 64 * MIB, compat="0.10")
    assert "bitmaps" not in both("-O", "qcow2", old)


def test_a_vmdk_of_the_measured_size_is_made(tmp_path):
    # qemu-img does not measure vmdk: what it makes is the oracle.
    image = tmp_path / "image"
    support.create(image, 64 * MIB)
    support.qemu_io(image, "write -P 5 0 3M", "write -P 6 40M 1M")
    for subformat in ("monolithicSparse", "monolithicFlat"):
        option = f"subformat={subformat}"
        measured = support.run_instar("measure", "-O", "vmdk", "-o", option, "--output", "json", image).json
        made = tmp_path / subformat
        made.mkdir()
        support.qemu_img("convert", "-O", "vmdk", "-o", option, image, made / "disk.vmdk")
        length = sum(path.stat().st_size for path in made.iterdir())
        # The descriptors are not equally long.
        assert length - 1024 <= measured["required"] <= length + 256 * 1024, f"{subformat}: {measured} {length}"
        assert measured["fully-allocated"] >= 64 * MIB


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"])
def test_a_vmdk_in_several_files_has_room_for_its_descriptor(subformat, tmp_path):
    image = tmp_path / "image"
    support.create(image, 5 * 1024 * MIB)
    support.qemu_io(image, "write -P 5 0 3M", "write -P 6 4000M 1M")
    option = f"subformat={subformat}"
    measured = support.run_instar("measure", "-O", "vmdk", "-o", option, "--output", "json", image).json["required"]
    for name, make in {
        "theirs": lambda path: support.qemu_img("convert", "-O", "vmdk", "-o", option, image, path),
        "ours": lambda path: support.run_instar("create", "-f", "vmdk", "-o", option, path, "5G"),
    }.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / ("a-long-name-" * 10 + ".vmdk"))
        length = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        assert 0 < length <= measured, f"{name}: {length}, {measured}"


def test_what_is_asked_for_wrongly(tmp_path):
    image = support.create(tmp_path / "image", MIB)
    for args, words in [
        ([], ["FILENAME, or --size SIZE"]),
        (["--size", "8E"], ["more than 2^63 - 1 bytes"]),
        (["--size", "x"], ["k, M, G, T, P or E"]),
        (["--size", str(2**63 - 1)], ["the new disk is too large"]),
        (["-f", "qcow2", "--size", "1M"], ["--size"]),
        (["--image-opts", image], ["name the image by its file name"]),
        (["--object", "secret,id=a", image], ["decrypt the image"]),
    ]:
        done = support.run_instar("measure", *args)
        assert done.rc in (1, 2) and all(word in done.stderr for word in words), str(done)
        assert "faulty" not in done.stderr
    done = support.run_instar("measure", "-O", "qcow2", "-o", "help", image)
    assert done.rc == 0 and "cluster_size=<value>" in done.stdout


@pytest.mark.parametrize("seed", range(12))
def test_a_commit_needs_what_was_measured(seed, tmp_path):
    rng = random.Random(seed)
    size = 8 * MIB
    base_fmt = rng.choice(["qcow2", "qcow2", "raw", "vmdk"])
    base, mid, top = tmp_path / "base", tmp_path / "mid", tmp_path / "top"
    options = {"cluster_size": rng.choice([4096, 65536])} if base_fmt == "qcow2" else {}
    support.create(base, size, fmt=base_fmt, **options)
    support.qemu_io(base, *scribble(rng, size, 6, zeroes=base_fmt == "qcow2"), fmt=base_fmt)
    support.create(mid, backing="base", backing_fmt=base_fmt, cluster_size=rng.choice([4096, 65536]))
    support.qemu_io(mid, *scribble(rng, size, 5))
    chosen = []
    overlay = mid
    if rng.random() < 0.5:
        support.create(top, backing="mid", backing_fmt="qcow2")
        support.qemu_io(top, *scribble(rng, size, 5))
        overlay, chosen = top, ["-b", base]
    if base_fmt == "raw":
        chosen += ["-F", "raw"]
    before, taken = base.stat().st_size, base.stat().st_blocks * 512
    with support.untouched(base, mid, overlay):
        measured = support.run_instar("measure", "--commit", "--output", "json", *chosen, overlay)
    assert measured.rc == 0, str(measured)
    support.commit(overlay, *chosen)
    after = base.stat().st_size
    unit = options.get("cluster_size", 65536 if base_fmt == "vmdk" else 512)
    assert measured.json["required"] - measured.json["growth"] == before
    assert after <= measured.json["required"] <= after + unit, f"{base_fmt}, {unit}: {after} {measured}"
    space = base.stat().st_blocks * 512 - taken
    assert space <= measured.json["additional-space"], f"{base_fmt}: took {space}, {measured}"


# A grain of a vmdk takes as much as it holds of the piece, which nobody knows before.
@pytest.mark.parametrize(("fmt", "factor"), [("raw", 2), ("vmdk", 17), ("qcow2", 5)])
def test_small_pieces_take_whole_blocks_of_a_thin_target(fmt, factor, tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    support.create(base, 64 * MIB, fmt=fmt, **({"preallocation": "metadata"} if fmt == "qcow2" else {}))
    support.create(top, backing="base", backing_fmt=fmt, cluster_size=512)
    support.qemu_io(top, *(f"write -P 5 {at} 512" for at in range(0, 32 * MIB, 64 * 1024)))
    options = ["-b", base, "-F", fmt]
    measured = support.run_instar("measure", "--commit", "--output", "json", *options, top).json
    taken = base.stat().st_blocks * 512
    support.commit(top, *options)
    space = base.stat().st_blocks * 512 - taken
    assert 0 < space <= measured["additional-space"] <= factor * space, f"took {space}, {measured}"


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicFlat"])
def test_a_commit_into_several_files(subformat, tmp_path):
    base, top = tmp_path / "base.vmdk", tmp_path / "top"
    support.create(base, 5 * 1024 * MIB, fmt="vmdk", subformat=subformat)
    support.create(top, backing="base.vmdk", backing_fmt="vmdk")
    support.qemu_io(top, "write -P 5 100M 1M", "write -P 5 3000M 1M", "write -P 5 5119M 1M")
    length = lambda: sum(path.stat().st_size for path in tmp_path.glob("base*"))
    before = length()
    measured = support.run_instar("measure", "--commit", "--output", "json", top).json
    support.commit(top)
    assert measured["required"] - measured["growth"] == before
    assert length() <= measured["required"] <= length() + 3 * 65536, f"{length()} {measured}"


@pytest.mark.parametrize("seed", range(8))
def test_bitmaps_that_are_merged_count(seed, tmp_path):
    rng = random.Random(seed)
    size = 64 * MIB
    base, top = tmp_path / "base", tmp_path / "top"
    unit = rng.choice([512, 4096, 65536])
    support.create(base, size, cluster_size=unit)
    support.create(top, backing="base", backing_fmt="qcow2", cluster_size=rng.choice([512, 65536]))
    # A bitmap that the target has is counted for what the commit writes and for what is merged: often in the same clusters.
    twice = 0
    for number in range(rng.randrange(1, 5)):
        granularity = rng.choice([512, 4096, 65536])
        if rng.random() < 0.5:
            dirty_bitmaps.add(base, f"bitmap {number}", "-g", str(granularity))
            twice += -(-size // granularity // 8 // unit)
        dirty_bitmaps.add(top, f"bitmap {number}", "-g", str(granularity))
    support.qemu_io(base, *scribble(rng, size, 5))
    support.qemu_io(top, *scribble(rng, size, 8))
    before = base.stat().st_size
    with support.untouched(base, top):
        measured = support.run_instar("measure", "--commit", "--bitmaps", "--output", "json", top)
    plain = support.run_instar("measure", "--commit", "--output", "json", top).json
    assert measured.rc == 0, str(measured)
    support.commit(top, "--bitmaps")
    after = base.stat().st_size
    assert measured.json["required"] - measured.json["growth"] == before
    assert after <= measured.json["required"] <= after + (2 + twice) * unit, f"{unit}: {after} {measured}"
    assert measured.json["required"] > plain["required"] or after <= plain["required"], f"{after} {plain}"


def test_a_commit_of_nothing_needs_nothing(tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    # Its last cluster is cut short.
    assert support.run_instar("create", "-f", "qcow2", base, "64M").rc == 0
    assert base.stat().st_size % 65536 != 0
    support.create(top, backing="base", backing_fmt="qcow2")
    measured = support.run_instar("measure", "--commit", "--output", "json", top).json
    assert (measured["growth"], measured["additional-space"]) == (0, 0), measured
    assert measured["required"] == base.stat().st_size
    # For people with a unit, as everywhere else.
    length = base.stat().st_size
    printed = support.run_instar("measure", "--commit", top).stdout
    assert re.match(rf"required size: {length} bytes \(\d+ KiB\)\ngrowth: 0 bytes\nadditional disk space: 0 bytes\nfree: ", printed), printed

def test_what_cannot_be_measured(tmp_path):
    support.create(tmp_path / "image", MIB)
    for args, words in [
        (["-O", "nonesuch", "--size", "1M"], "instar plugins"),
        (["-O", "qcow2", "-o", "cluster_size=7", "--size", "1M"], "cluster_size"),
        (["-l", "snapshot", tmp_path / "image"], "internal snapshots"),
        (["--size", "x"], "number of bytes"),
        ([], "FILENAME"),
        (["--commit", tmp_path / "image"], "backing"),
    ]:
        result = support.run_instar("measure", *args)
        assert result.rc != 0 and words in result.stderr and not result.stdout, str(result)
    assert os.listdir(tmp_path) == ["image"]
