"""`instar map`: the runs of `qemu-img map`, on every format, through whole chains."""

from __future__ import annotations

import random

import pytest
import qcow2_bytes
import support
from support import MIB, run_instar

CHUNK = 4096


def normal(runs):
    """qemu-img's runs; of zeroes in a cluster that is kept for later, instar does not say where that cluster is, and of
    an empty disk it makes no run."""
    merged = []
    for run in filter(lambda run: run["length"], runs):
        run = dict(run)
        if run["zero"] and not run["data"] and run.get("offset") != run["start"]:
            run.pop("offset", None)
        last = merged[-1] if merged else None
        if last is not None and goes_on(last, run):
            last["length"] += run["length"]
        else:
            merged.append(run)
    return merged


def goes_on(last, run):
    keys = ("depth", "present", "zero", "data", "compressed")
    same = all(last[key] == run[key] for key in keys) and ("offset" in last) == ("offset" in run)
    return same and ("offset" not in run or last["offset"] + last["length"] == run["offset"])


def same_as_qemu(image, fmt=None, human=True, options=()):
    """Both tools agree: in JSON run by run, and for people letter by letter."""
    chosen = ["-f", fmt] if fmt else []
    theirs = support.qemu_img("map", "--output=json", *chosen, *options, image)
    with support.untouched(image):
        ours = support.run_instar("map", "--output", "json", *chosen, *options, image)
    assert ours.rc == 0 and ours.stderr == "", str(ours)
    assert ours.json == normal(theirs.json)
    assert len(ours.stdout.splitlines()) == max(len(ours.json), 1)
    if human and not any(run["compressed"] for run in ours.json):
        text = support.run_instar("map", *chosen, *options, image)
        assert text.rc == 0 and text.stdout == support.qemu_img("map", *chosen, *options, image).stdout
    return ours.json


def scribble(path, rng, size, fmt="qcow2", count=12, zeroes=True):
    """Data and zeroes here and there."""
    kinds = ["write -P 5", "write -P 6", "write -z", "write -zu"] if zeroes else ["write -P 5"]
    commands = []
    for _ in range(count):
        at = rng.randrange(0, size // CHUNK) * CHUNK
        length = min(rng.choice([4, 64, 64, 200]) * 1024, size - at)
        commands.append(f"{rng.choice(kinds)} {at} {length}")
    support.qemu_io(path, *commands, fmt=fmt)


QCOW2 = [
    {},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": "2M"},
    {"extended_l2": "on", "cluster_size": "16k"},
    {"preallocation": "metadata"},
    {"preallocation": "falloc"},
]


@pytest.mark.parametrize("options", QCOW2, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_qcow2(tmp_path, options):
    image = tmp_path / "image"
    support.create(image, "8M", **options)
    scribble(image, random.Random(1), 8 * MIB)
    runs = same_as_qemu(image)
    assert any(run["data"] for run in runs) and any(not run["present"] or run["zero"] for run in runs)


@pytest.mark.parametrize("depth", range(2, 9))
def test_chains(tmp_path, depth):
    """Layers of other cluster sizes and lengths; what the top-most of them holds is what is seen."""
    rng = random.Random(depth)
    below = None
    for layer in range(depth):
        image = tmp_path / f"layer{layer}"
        size = rng.choice([4, 6, 7]) * MIB
        # A backing is recorded as an absolute path, so that both tools name it alike.
        support.create(image, size, backing=below, cluster_size=rng.choice(["4k", "64k", "1M"]))
        scribble(image, rng, size, count=6)
        below = image
    runs = same_as_qemu(below)
    assert {run["depth"] for run in runs} > {0}


def test_raw_below(tmp_path):
    """The holes of a raw backing are zeroes that its file has a place for."""
    base, top = tmp_path / "base.raw", tmp_path / "top"
    with base.open("wb") as file:
        file.truncate(3 * MIB + 1000)
        for at in (0, MIB, 2 * MIB + 12288):
            file.seek(at)
            file.write(b"x" * 70000)
    support.create(top, "4M", backing=base, backing_fmt="raw")
    scribble(top, random.Random(3), 4 * MIB, count=4)
    runs = same_as_qemu(top)
    assert any(run["depth"] == 1 and run["zero"] and "offset" in run for run in runs)


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 1000000, 3 * MIB])
def test_raw(tmp_path, size):
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(size)
        if size > 100000:
            file.seek(500000)
            file.write(b"data")
    same_as_qemu(image, fmt="raw", human=size > 0)


def test_compressed_clusters(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.write_bytes(random.Random(2).randbytes(1 << 18) + b"compresses well " * (1 << 14) + bytes(1 << 20))
    support.qemu_img("convert", "-c", "-O", "qcow2", plain, packed)
    assert any(run["compressed"] for run in same_as_qemu(packed))
    theirs, ours = support.qemu_img("map", packed, rc=1), support.run_instar("map", packed)
    assert ours.rc == theirs.rc == 1
    assert len(ours.stderr.splitlines()) == 1 and "compressed" in ours.stderr and packed.name in ours.stderr


VMDK = ["monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat", "twoGbMaxExtentFlat", "streamOptimized"]


@pytest.mark.parametrize("kind", VMDK)
def test_vmdk(tmp_path, kind):
    image = tmp_path / "image.vmdk"
    if kind == "streamOptimized":
        plain = tmp_path / "plain"
        plain.write_bytes(random.Random(2).randbytes(1 << 20) + bytes(1 << 20) + b"a" * (1 << 20))
        support.qemu_img("convert", "-O", "vmdk", "-o", f"subformat={kind}", plain, image)
    else:
        support.create(image, "20M", fmt="vmdk", subformat=kind)
        scribble(image, random.Random(5), 20 * MIB, fmt="vmdk", zeroes=False)
    assert any(run["data"] for run in same_as_qemu(image))


def test_a_part_of_the_disk(tmp_path):
    image = tmp_path / "image"
    support.create(image, "8M")
    scribble(image, random.Random(9), 8 * MIB)
    for options in (["-s", "1M"], ["-l", "3M"], ["-s", "100k", "-l", "2M"], ["--start-offset", "7M", "--max-length", "9M"]):
        options = [{"-s": "--start-offset", "-l": "--max-length"}.get(option, option) for option in options]
        same_as_qemu(image, options=options)


def test_more_runs_than_fit_into_one_message(tmp_path):
    """Every other cluster of a disk: 20,000 runs."""
    image = tmp_path / "image"
    support.create(image, "20M", cluster_size=512)
    plain = tmp_path / "plain"
    plain.write_bytes((b"x" * 512 + bytes(512)) * (20 * MIB // 1024))
    support.qemu_img("convert", "-n", "-S", "512", "-O", "qcow2", plain, image)
    assert len(same_as_qemu(image)) > 20000


def test_an_empty_disk_and_a_large_one(tmp_path):
    for size in ("0", "4T"):
        image = tmp_path / size
        support.create(image, size)
        runs = same_as_qemu(image)
        assert sum(run["length"] for run in runs) == support.virtual_size(image)


# --- what is refused --------------------------------------------------------------------------------


def fails(image, *options, says):
    result = support.run_instar("map", *options, image)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
    for word in says:
        assert word in result.stderr, f"{word}: {result.stderr}"


def test_what_is_no_image_or_no_chain(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(range(256)) * 100)
    fails(tmp_path / "absent", says=["absent", "does not exist"])
    fails(garbage, says=["garbage", "begins like no known format"])
    base, top = tmp_path / "base", tmp_path / "top"
    support.create(base, "1M")
    support.create(top, backing=base)
    base.unlink()
    fails(top, says=["base", "does not exist"])
    base.symlink_to("top")
    fails(top, says=["top", "leads back to itself"])
    result = support.run_instar("map", "--output", "json", garbage)
    assert result.error["name"] == "ERROR_UNSUPPORTED_FORMAT"


def test_a_backing_elsewhere_is_gated(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    support.create(there / "base", "1M")
    support.qemu_io(there / "base", "write -P 1 0 64k")
    support.create(here / "top", backing=there / "base")
    fails(here / "top", says=["--allow-backing-dir"])
    result = support.run_instar("map", "--output", "json", "--allow-backing-dir", there, here / "top")
    assert result.rc == 0 and result.json[0]["depth"] == 1


def test_damage_ends_the_map(tmp_path):
    image = tmp_path / "image"
    support.create(image, "8M", cluster_size="4k")
    support.qemu_io(image, "write -P 1 0 64k", "write -P 1 5M 64k")
    inner = qcow2_bytes.Image(image)
    inner.poke64(inner.l2_at(0), qcow2_bytes.COPIED | inner.end)
    fails(image, "--output", "json", says=["image", "past the end of the file"])


def test_an_image_in_use(tmp_path):
    image = tmp_path / "image"
    support.create(image, "2M")
    with support.Holder(image):
        fails(image, says=["another process"])
        assert support.run_instar("map", "-U", image).rc == 0
    with support.Holder(image, "-r"):
        assert support.run_instar("map", image).rc == 0


def test_a_reader_that_goes_away(tmp_path):
    """As with every command: one line, and no panic."""
    image = tmp_path / "image"
    support.create(image, "2M")
    result = support.run("sh", "-c", '"$0" map --output json "$1" > /dev/full', support.instar_binary(), image)
    assert result.rc == 1 and "No space left" in result.stderr and len(result.stderr.splitlines()) == 1, str(result)


def test_a_picture_shows_what_is_read(tmp_path):
    """A column for each MiB, drawn here from what qemu-img says of the chain."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    support.create(base, 72 * MIB)
    support.qemu_io(base, "write -P 1 0 20M", "write -P 1 40M 3M")
    support.create(top, backing="base.qcow2", backing_fmt="qcow2")
    support.qemu_io(top, "write -P 2 2M 8M", "write -z 24M 4M", "write -P 3 41M 64k")
    strips = [[" "] * 72 for _ in range(2)]
    for run in support.qemu_img("map", "--output=json", top).json:
        for mib in range(run["start"] // MIB, -(-(run["start"] + run["length"]) // MIB)):
            if run["present"]:
                whole = run["start"] <= mib * MIB and (mib + 1) * MIB <= run["start"] + run["length"]
                kind = "." if run["zero"] else "#" if whole or run["length"] > 900 * 1024 else "+"
                strips[run["depth"]][mib] = kind
    done = support.run_instar("map", "--picture", top)
    assert done.rc == 0, str(done)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("72 MiB of the disk, 1 MiB a column")
    assert [lines[2], lines[4]] == ["|" + "".join(strip) + "|" for strip in strips], done.stdout
    assert lines[1] == f"0 {top}: 8.06 MiB of data, 4 MiB of zeroes" and lines[3].startswith(f"1 {base}: 14.9 MiB")
    part = support.run_instar("map", "--picture=svg", "-s", "2M", "-l", "8M", top)
    assert part.rc == 0 and part.stdout.startswith("<svg ") and "from byte 2097152 on" in part.stdout
    assert part.stdout.count("<rect") == 1 + 72, "the strip of the base has nothing to show"
    assert support.run_instar("map", "--picture", "--output", "json", top).rc == 2


def test_a_chain_that_is_named_from_here_on_is_shown_from_here_on(tmp_path):
    support.create(tmp_path / "base", MIB)
    support.create(tmp_path / "top", backing="base")
    support.qemu_io(tmp_path / "base", "write 0 64k")
    for name in ("top", tmp_path / "top"):
        ours, theirs = run_instar("map", name, cwd=tmp_path), support.qemu_img("map", name, cwd=tmp_path)
        assert ours.stdout == theirs.stdout and ("/base" in ours.stdout) == (name != "top"), str(ours)
