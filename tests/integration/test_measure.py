"""`instar measure`: the numbers of `qemu-img measure`, and what a commit really needs."""

from __future__ import annotations

import os
import random

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
    assert ours.json == {key: value for key, value in theirs.json.items() if key != "bitmaps"}, f"{ours}\n{theirs}"
    text = support.run("qemu-img", "measure", *args).stdout.splitlines()
    human = support.run_instar("measure", *args).stdout.splitlines()
    assert human == [line for line in text if not line.startswith("bitmaps")]


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
    before = base.stat().st_size
    with support.untouched(base, mid, overlay):
        measured = support.run_instar("measure", "--commit", "--output", "json", *chosen, overlay)
    assert measured.rc == 0, str(measured)
    support.commit(overlay, *chosen)
    after = base.stat().st_size
    unit = options.get("cluster_size", 65536 if base_fmt == "vmdk" else 512)
    assert measured.json["required"] - measured.json["growth"] == before
    assert after <= measured.json["required"] <= after + unit, f"{base_fmt}, {unit}: {after} {measured}"


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
