"""`instar compare`: the words and the exit statuses of `qemu-img compare`, on every format, through whole chains."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import time

import pytest
import support
from support import MIB

CHUNK = 4096


def both(first, second, *options, cwd=None):
    """Both tools say the same; returns the status. A raw image has no mark: instar wants to be told."""
    if "-f" not in options:
        options = (*options, *(part for option, image in (("-f", first), ("-F", second)) if image.suffix == ".raw"
                               for part in (option, "raw")))
    theirs = support.run("qemu-img", "compare", *options, first, second, cwd=cwd)
    with support.untouched(first, second):
        ours = support.run_instar("compare", *options, first, second, cwd=cwd)
    assert (ours.rc, ours.stdout) == (theirs.rc, theirs.stdout), f"{ours}\n{theirs}"
    assert ours.stderr == ""
    return ours.rc


def differ_at(first, second):
    """The first sector of the guest's disk that differs, by raw copies that qemu-img made."""
    raw = [support.run("qemu-img", "convert", "-O", "raw", image, f"{image}.raw") and open(f"{image}.raw", "rb").read()
           for image in (first, second)]
    longest = max(map(len, raw))
    raw = [content.ljust(longest, b"\0") for content in raw]
    return next((at for at in range(0, longest, 512) if raw[0][at:at + 512] != raw[1][at:at + 512]), None)


def scribble(rng, size, count):
    kinds = ["write -P 5", "write -P 5", "write -P 6", "write -z", "write -zu", "discard"]
    for _ in range(count):
        at = rng.randrange(size // CHUNK) * CHUNK
        yield f"{rng.choice(kinds)} {at} {min(rng.choice([4, 64, 100]) * 1024, size - at)}"


def make(directory, rng, name, fmt, size, writes, layers):
    """A chain of so many layers with these writes, spread over them in order; its top-most image."""
    image, backing = None, None
    for layer in range(layers):
        image = directory / f"{name}{layer}.{fmt}"
        options = {"cluster_size": rng.choice([4096, 65536])} if fmt == "qcow2" else {}
        support.create(image, size if backing is None else None, fmt=fmt, backing=backing and backing.name,
                       backing_fmt=fmt, **options)
        part = writes[layer * len(writes) // layers:(layer + 1) * len(writes) // layers]
        support.qemu_io(image, *(write for write in part if fmt == "qcow2" or "z" not in write and "discard" not in write), fmt=fmt)
        backing = image
    return image


@pytest.mark.parametrize("strict", [False, True], ids=["content", "strict"])
@pytest.mark.parametrize("seed", range(6))
def test_drawn_pairs(seed, strict, tmp_path):
    rng = random.Random(seed)
    size = 4 * MIB
    options = ["-s"] if strict else []
    statuses = set()
    for round_ in range(4):
        directory = tmp_path / str(round_)
        directory.mkdir()
        writes = list(scribble(rng, size, 8))
        first = make(directory, rng, "a", rng.choice(["qcow2", "vmdk", "raw"]), size, writes, 1)
        if rng.random() < 0.5:
            writes.append(f"write -P 9 {rng.randrange(size // CHUNK) * CHUNK} 512")
        second = make(directory, rng, "b", "qcow2", size, writes, rng.choice([1, 2, 3]))
        status = both(first, second, *options)
        assert strict or (status == 0) == (differ_at(first, second) is None)
        statuses |= {status, both(second, first, *options)}
        assert both(first, first, *options) == 0
        if rng.random() < 0.5:
            packed = directory / "packed.qcow2"
            support.qemu_img("convert", "-c", "-O", "qcow2", second, packed)
            assert strict or both(second, packed) == 0
            both(first, packed, *options)
    assert statuses <= {0, 1}


def test_a_difference_in_compressed_data_is_found(tmp_path):
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    support.create(plain, 4 * MIB)
    support.qemu_io(plain, "write -P 1 0 4M")
    shutil.copy(plain, changed)
    support.qemu_io(changed, f"write -P 2 {3 * MIB + 1024} 512")
    packed = {}
    for image in (plain, changed):
        packed[image] = tmp_path / f"{image.name}.packed"
        support.qemu_img("convert", "-c", "-O", "qcow2", image, packed[image])
    result = support.run_instar("compare", packed[plain], packed[changed])
    assert (result.rc, result.stdout) == (1, f"Content mismatch at offset {3 * MIB + 1024}!\n")
    assert support.run_instar("compare", packed[plain], plain).rc == 0
    assert support.run_instar("compare", packed[changed], plain).rc == 1


@pytest.mark.parametrize("fmt", ["qcow2", "raw", "vmdk"])
def test_sizes(fmt, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    support.create(short, 2 * MIB, fmt=fmt)
    support.create(long, 5 * MIB, fmt="qcow2")
    for image, kind in ((short, fmt), (long, "qcow2")):
        support.qemu_io(image, "write -P 7 64k 64k", fmt=kind)
    formats = ["-f", fmt, "-F", "qcow2"]
    assert both(short, long, *formats) == 0
    assert both(short, long, *formats, "-s") == 1
    assert both(short, long, *formats, "-q") == 0
    support.qemu_io(long, "write -P 0 3M 64k")
    assert both(short, long, *formats) == 0, "zeroes that are written are zeroes"
    support.qemu_io(long, "write -P 1 4M 512")
    assert both(short, long, *formats) == 1
    assert both(long, short, "-f", "qcow2", "-F", fmt, "-q") == 1


def test_a_raw_image_that_ends_within_a_sector(tmp_path):
    odd, whole = tmp_path / "odd", tmp_path / "whole"
    odd.write_bytes(b"x" * 1000)
    whole.write_bytes((b"x" * 1000).ljust(1024, b"\0"))
    assert both(odd, whole, "-f", "raw", "-F", "raw") == 0
    whole.write_bytes((b"x" * 1000).ljust(1024, b"y"))
    assert both(odd, whole, "-f", "raw", "-F", "raw") == 1


def test_what_both_have_below_them_is_not_read(tmp_path):
    base = tmp_path / "base"
    support.create(base, 64 * MIB)
    support.qemu_io(base, "write -P 3 0 64M")
    for name in ("one", "two"):
        support.create(tmp_path / name, backing="base")
        support.qemu_io(tmp_path / name, "write -P 4 1M 64k")
    assert both(tmp_path / "one", tmp_path / "two") == 0
    traced = support.run("strace", "-f", "-e", "trace=pread64", "-o", tmp_path / "trace", support.instar_binary(), "compare",
                         tmp_path / "one", tmp_path / "two")
    assert traced.rc == 0, str(traced)
    read = sum(int(line.rsplit("= ", 1)[1].split()[0]) for line in (tmp_path / "trace").read_text().splitlines()
               if "pread64" in line and line.rsplit("= ", 1)[1][0].isdigit())
    assert read < 4 * MIB, f"{read} bytes were read of 64 MiB that are the same file"


def test_json(tmp_path):
    for name, size in (("one", MIB), ("two", 2 * MIB)):
        support.create(tmp_path / name, size)
    compare = lambda *options: support.run_instar("compare", "--output", "json", *options, tmp_path / "one", tmp_path / "two")
    assert (compare().rc, compare().json_of_sandbox) == (0, {"virtual-sizes": [MIB, 2 * MIB], "difference": None})
    assert compare("-s").json["difference"] == {"kind": "size"}
    support.qemu_io(tmp_path / "two", "write -P 1 64k 4k")
    assert (compare().rc, compare().json["difference"]) == (1, {"kind": "content", "offset": 65536})
    support.qemu_img("resize", "-q", tmp_path / "one", "2M")
    assert compare("-s").json["difference"] == {"kind": "allocation", "offset": 65536}


def test_each_image_may_use_its_own_directory_only(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        support.create(tmp_path / name / "base", MIB)
        support.create(tmp_path / name / "top", backing="base")
    assert both(tmp_path / "a/top", tmp_path / "b/top") == 0
    # What the first image records must not lead beside the second one.
    support.qemu_img("rebase", "-u", "-b", tmp_path / "b/base", "-F", "qcow2", tmp_path / "a/top")
    result = support.run_instar("compare", tmp_path / "a/top", tmp_path / "b/top")
    assert result.rc == 2 and "ERROR_WRITE_TARGET_NOT_ALLOWED" in result.stderr, str(result)
    allowed = support.run_instar("compare", "--allow-backing-dir", tmp_path / "b", tmp_path / "a/top", tmp_path / "b/top")
    assert (allowed.rc, allowed.stdout) == (0, "Images are identical.\n"), str(allowed)


def test_what_cannot_be_compared(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    support.create(good, MIB)
    support.qemu_io(good, "write -P 1 0 1M")
    shutil.copy(good, bad)
    missing = support.run_instar("compare", good, tmp_path / "missing")
    assert missing.rc == 2 and "ERROR_IMAGE_NOT_FOUND" in missing.stderr and str(tmp_path / "missing") in missing.stderr
    assert support.run_instar("compare", good).rc == 2
    # The first L2 entry points into the middle of a cluster.
    content = bytearray(bad.read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    l2 = int.from_bytes(content[l1:l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    content[l2:l2 + 8] = (1 << 63 | 0x50200).to_bytes(8, "big")
    bad.write_bytes(content)
    damaged = support.run_instar("compare", "--output", "json", bad, good)
    assert damaged.rc == 3 and damaged.error["file"] == str(bad), str(damaged)


def test_the_format_of_each_image_has_its_option(tmp_path):
    image, raw = support.create(tmp_path / "image", MIB), tmp_path / "raw"
    raw.write_bytes(b"\1" * MIB)
    support.qemu_io(image, "write -P 1 0 1M")
    for first, second, option in [(raw, image, "-f"), (image, raw, "-F")]:
        done = support.run_instar("compare", first, second)
        assert done.rc == 2 and f"if it is a plain disk, add {option} raw" in done.stderr, str(done)
        done = support.run_instar("compare", option, "raw", first, second)
        assert (done.rc, done.stdout) == (0, "Images are identical.\n"), str(done)
    assert support.run_instar("compare", "--a-format", "raw", "--b-format", "qcow2", raw, image).rc == 0
    assert support.run_instar("compare", "-T", "none", image, image).rc == 0
    assert support.run_instar("compare", "-T", "bogus", image, image).rc == 2


def test_what_is_no_image_is_called_by_its_name(tmp_path):
    image = support.create(tmp_path / "image", MIB)
    foreign = {"qed": "QED"}
    for fmt, name in foreign.items():
        other = support.create(tmp_path / fmt, MIB, fmt=fmt)
        done = support.run_instar("compare", image, other)
        words = [f"looks like a {name} image, for which no plugin is loaded", "convert it to qcow2 with the program that made it"]
        assert done.rc == 2 and all(word in done.stderr for word in words), str(done)
        # The advice works.
        converted = tmp_path / f"{fmt}.qcow2"
        support.qemu_img("convert", "-f", fmt, "-O", "qcow2", other, converted)
        done = support.run_instar("compare", image, converted)
        assert "Images are identical." in done.stdout, str(done)
    (tmp_path / "empty").touch()
    (tmp_path / "gz").write_bytes(gzip.compress(image.read_bytes()))
    for name, words in [("empty", "is empty: if it is a plain disk, add -F raw"), ("gz", "compressed with gzip: unpack it")]:
        done = support.run_instar("compare", image, tmp_path / name)
        assert done.rc == 2 and words in done.stderr, str(done)


@pytest.mark.parametrize("size", [512, 4096, 65536, MIB + 512, 4 * MIB - 512])
def test_a_stream_optimized_vmdk_may_end_within_a_grain(size, tmp_path):
    raw, stream = tmp_path / "disk.raw", tmp_path / "stream.vmdk"
    raw.write_bytes(random.Random(size).randbytes(size))
    support.qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, stream)
    assert both(raw, stream, "-f", "raw", "-F", "vmdk") == 0
    assert support.run_instar("check", stream).rc == 0
    top = support.create(tmp_path / "top.vmdk", backing="stream.vmdk", backing_fmt="vmdk", fmt="vmdk")
    assert both(top, raw, "-f", "vmdk", "-F", "raw") == 0
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    assert both(raw, stream, "-f", "raw", "-F", "vmdk") == 1


def test_progress(tmp_path):
    for name in ("one", "two"):
        support.create(tmp_path / name, 8 * MIB, fmt="raw")
        support.qemu_io(tmp_path / name, "write -P 1 0 8M", fmt="raw")
    result = support.run_instar("compare", "-p", "-f", "raw", "-F", "raw", tmp_path / "one", tmp_path / "two")
    assert result.rc == 0 and result.stdout == "Images are identical.\n"
    assert "100 % (8388608 of 8388608 bytes, 8 MiB of 8 MiB)" in result.stderr and result.stderr.endswith("instar: done\n"), result.stderr
    assert os.path.getsize(tmp_path / "one") == 8 * MIB


def test_a_small_file_that_claims_a_huge_disk_costs_little(tmp_path):
    # Every entry of L1 names the same L2 table, every entry of that the same cluster: 4 TiB in half a megabyte.
    for name in ("one", "two"):
        image = tmp_path / name
        support.create(image, 4 << 40)
        support.qemu_io(image, "write -P 1 0 64k")
        content = bytearray(image.read_bytes())
        size, l1 = int.from_bytes(content[36:40], "big"), int.from_bytes(content[40:48], "big")
        first = content[l1:l1 + 8]
        l2 = int.from_bytes(first, "big") & 0x00FFFFFFFFFFFE00
        content[l1:l1 + 8 * size] = first * size
        content[l2:l2 + 65536] = content[l2:l2 + 8] * 8192
        image.write_bytes(content)
    began = time.monotonic()
    result = support.run_instar("compare", tmp_path / "one", tmp_path / "two")
    assert result.rc in (2, 3) and str(tmp_path) in result.stderr and result.stderr.count("\n") == 1, str(result)
    # qemu-img reads on for hours.
    assert time.monotonic() - began < support.TIMEOUT / 2
    for command in (["map"], ["measure", "-O", "qcow2"]):
        result = support.run_instar(*command, tmp_path / "one")
        assert result.rc == 1 and "ERROR_LIMIT_EXCEEDED" in result.stderr and "again and again" in result.stderr, str(result)[-2000:]
