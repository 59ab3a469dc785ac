"""`instar convert` into what is there (-n), on top of a backing file (-B), from several images, with all of it allocated, with
bitmaps: the content, and what is allocated, by the word of qemu-img."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import support
from support import MIB


def convert(*args, rc=0, cwd=None):
    result = support.run_instar("convert", *args, cwd=cwd)
    assert result.rc == rc, str(result)
    return result


def same(first, first_fmt, second, second_fmt, strict=False):
    options = ["-s"] if strict else []
    compared = support.run("qemu-img", "compare", *options, "-f", first_fmt, "-F", second_fmt, first, second)
    assert compared.rc == 0, str(compared)


def refused(name, *args, mentions=(), files=()):
    with support.untouched(*files):
        for output in ([], ["--output", "json"]):
            support.assert_refused(support.run_instar("convert", *args, *output), name, *mentions)


def chain(directory, rng, sizes, cluster=65536, fmt="qcow2"):
    """A chain of these sizes, the base first: data, zeroes and discarded parts in each layer."""
    names = []
    for index, size in enumerate(sizes):
        layer = directory / f"layer{index}.{fmt}"
        options = {"cluster_size": cluster} if fmt == "qcow2" else {}
        support.create(layer, size, fmt=fmt, backing=names[-1].name if names else None, backing_fmt=fmt, **options)
        for _ in range(6):
            at = rng.randrange(size // 512) * 512
            length = min(rng.choice([512, 4096, 70_144, 300_032]), size - at)
            support.qemu_io(layer, f"write -P {rng.randrange(1, 255)} {at} {length}", fmt=fmt)
        if fmt == "qcow2":
            support.qemu_io(layer, f"write -z {rng.randrange(size // 65536) * 65536} 64k")
        names.append(layer)
    return names


def held(image):
    """What the top-most image itself allocates."""
    runs = support.run("qemu-img", "map", "--output=json", image)
    return [run for run in json.loads(runs.stdout) if run["depth"] == 0 and run["present"]]


# -B


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fmt", ["qcow2", "vmdk"])
def test_on_a_layer_of_its_own_chain(seed, fmt, tmp_path):
    """The layers above the backing file are copied, be they several, and nothing below it."""
    rng = random.Random(seed)
    sizes = [rng.choice([3, 5]) * MIB for _ in range(3)] if fmt == "qcow2" else [4 * MIB] * 3
    layers = chain(tmp_path, rng, sizes, rng.choice([4096, 65536]), fmt)
    place = rng.randrange(2)
    target = tmp_path / "target"
    with support.untouched(*layers):
        convert("-O", fmt, "-B", layers[place].name, "-F", fmt, layers[-1], target)
    same(layers[-1], fmt, target, fmt)
    assert support.info(target)["backing-filename"] == layers[place].name
    support.assert_clean(target, fmt=fmt)
    if place == 1:
        theirs = tmp_path / "theirs"
        support.qemu_img("convert", "-O", fmt, "-B", layers[place].name, "-F", fmt, layers[-1], theirs)
        same(theirs, fmt, target, fmt)


def test_only_what_the_layers_above_hold_is_copied(tmp_path):
    base, top, target = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "target.qcow2"))
    support.create(base, 64 * MIB)
    support.qemu_io(base, "write -P 1 0 48M")
    support.create(top, backing="base.qcow2")
    support.qemu_io(top, "write -P 2 1M 64k", "write -z 2M 64k")
    convert("-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", top, target)
    assert target.stat().st_size < 2 * MIB
    support.qemu_io(target, "read -P 1 0 1M", "read -P 2 1M 64k", "read -P 0 2M 64k", "read -P 1 3M 1M", "read -P 0 48M 16M")
    # Whole clusters of another size take the rest from the backing file.
    convert("-O", "qcow2", "-o", "cluster_size=2M", "-B", "base.qcow2", "-F", "qcow2", top, target)
    same(top, "qcow2", target, "qcow2")


def test_on_another_file_that_is_said_to_hold_the_same(tmp_path):
    base, copy, top, target = (tmp_path / name for name in ("base.qcow2", "copy.raw", "top.qcow2", "target.qcow2"))
    support.create(base, 4 * MIB)
    support.qemu_io(base, "write -P 1 0 2M")
    support.create(top, backing="base.qcow2")
    support.qemu_io(top, "write -P 2 1M 64k", "write -P 3 3000k 1k")
    support.qemu_img("convert", "-O", "raw", base, copy)
    result = convert("-O", "qcow2", "-B", "copy.raw", "-F", "raw", top, target)
    assert "nothing was compared" in result.stderr
    same(top, "qcow2", target, "qcow2")
    theirs = tmp_path / "theirs.qcow2"
    support.qemu_img("convert", "-O", "qcow2", "-B", "copy.raw", "-F", "raw", top, theirs)
    assert sum(run["length"] for run in held(theirs)) == sum(run["length"] for run in held(target)) == 2 * 65536


def test_a_source_without_a_backing_file_hides_all_of_the_new_one(tmp_path):
    base, source, target = (tmp_path / name for name in ("base.qcow2", "source.qcow2", "target.qcow2"))
    support.create(base, 4 * MIB)
    support.qemu_io(base, "write -P 1 0 4M")
    support.create(source, 4 * MIB)
    support.qemu_io(source, "write -P 2 1M 64k")
    convert("-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", source, target)
    same(source, "qcow2", target, "qcow2")
    raw = tmp_path / "raw"
    with open(raw, "wb") as file:
        file.truncate(4 * MIB)
        file.seek(2 * MIB)
        file.write(b"\x07" * MIB)
    convert("-f", "raw", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", raw, target)
    same(raw, "raw", target, "qcow2")


def test_backing_files_that_cannot_be(tmp_path):
    base, top, target = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "target.qcow2"))
    support.create(base, 4 * MIB)
    support.create(top, backing="base.qcow2")
    convert("-O", "qcow2", "-B", "base.qcow2", top, target, rc=2)
    convert("-O", "qcow2", "-F", "qcow2", top, target, rc=2)
    convert("-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "-S", "0", top, target, rc=2)
    convert("-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", top, top, target, rc=2)
    files = [base, top, target]
    on = ["-O", "qcow2", "-F", "qcow2", "-B"]
    refused("ERROR_CHAIN_LOOP", *on, "top.qcow2", top, target, files=files, mentions=["is read"])
    refused("ERROR_BACKING_NOT_FOUND", *on, "absent.qcow2", top, target, files=files)
    refused("ERROR_FORMAT_MISMATCH", "-O", "qcow2", "-F", "raw", "-B", "base.qcow2", top, target, files=files)
    refused("ERROR_CHAIN_LOOP", *on, "base.qcow2", top, base, files=files, mentions=["part of what is read"])
    refused("ERROR_OPEN_FAILED", *on, "nbd://host/x", top, target, files=files)
    result = support.run_instar("convert", "-O", "raw", "-B", "base.qcow2", "-F", "qcow2", top, target)
    assert result.rc == 1 and not target.exists(), str(result)
    # The new image's backing file is the file that it replaces.
    other = tmp_path / "other.qcow2"
    shutil.copy(base, other)
    refused("ERROR_CHAIN_LOOP", *on, "other.qcow2", top, other, files=[*files, other])


# -n


@pytest.mark.parametrize("target_fmt", ["raw", "qcow2", "vmdk", "vdi", "vhdx", "parallels", "vpc", "qcow"])
@pytest.mark.parametrize("source_fmt", ["raw", "qcow2"])
def test_into_what_is_there(source_fmt, target_fmt, tmp_path):
    """Data and zeroes: nothing of what stood there is left, but behind the end of the disk that is read."""
    rng = random.Random(source_fmt + target_fmt)
    source, target = tmp_path / "source", tmp_path / "target"
    support.create(source, 6 * MIB, fmt=source_fmt)
    for _ in range(8):
        at = rng.randrange(6 * MIB // 512) * 512
        support.qemu_io(source, f"write -P {rng.randrange(1, 255)} {at} {min(70_144, 6 * MIB - at)}", fmt=source_fmt)
    support.create(target, 8 * MIB, fmt=target_fmt)
    support.qemu_io(target, "write -P 77 0 8M", fmt=target_fmt)
    inode = target.stat().st_ino
    with support.untouched(source):
        convert("-n", "-f", source_fmt, "-O", target_fmt, source, target)
    assert target.stat().st_ino == inode
    compared = support.run("qemu-img", "compare", "-f", source_fmt, "-F", target_fmt, source, target)
    assert "only differ in size" in compared.stdout or "Content mismatch at offset 6291456" in compared.stdout, str(compared)
    support.qemu_io(target, "read -P 77 6M 2M", fmt=target_fmt)
    if target_fmt in {"qcow2", "vmdk", "vdi", "vhdx", "parallels"}:
        support.assert_clean(target, fmt=target_fmt)


def test_a_target_that_is_said_to_be_zero_gets_no_zeroes(tmp_path):
    source, target = tmp_path / "source.raw", tmp_path / "target.raw"
    with open(source, "wb") as file:
        file.truncate(4 * MIB)
        file.write(b"\x05" * MIB)
    target.write_bytes(b"\x09" * (4 * MIB))
    convert("-n", "--target-is-zero", "-f", "raw", source, target)
    assert target.read_bytes() == b"\x05" * MIB + b"\x09" * (3 * MIB)
    convert("-n", "-f", "raw", source, target)
    assert target.read_bytes() == source.read_bytes()


def test_targets_that_are_not_written_in_place(tmp_path):
    source, target, small = (tmp_path / name for name in ("source.qcow2", "target.qcow2", "small.qcow2"))
    support.create(source, 4 * MIB)
    support.qemu_io(source, "write -P 5 0 4M")
    support.create(small, 3 * MIB)
    support.create(target, 4 * MIB)
    support.create(tmp_path / "overlay.qcow2", backing="target.qcow2")
    os.link(source, tmp_path / "hard")
    (tmp_path / "link").symlink_to("source.qcow2")
    into = ["-n", "-O", "qcow2", source]
    files = [source, target, small]
    refused("ERROR_UNSUPPORTED_FORMAT", *into, small, files=files, mentions=["resize"])
    refused("ERROR_UNSUPPORTED_FORMAT", *into, tmp_path / "overlay.qcow2", files=files, mentions=["backing file"])
    refused("ERROR_IMAGE_NOT_FOUND", *into, tmp_path / "absent", files=files)
    refused("ERROR_FORMAT_MISMATCH", "-n", "-O", "vmdk", source, target, files=files)
    for name in ("source.qcow2", "hard", "link"):
        refused("ERROR_CHAIN_LOOP", *into, tmp_path / name, files=files, mentions=["part of what is read"])
    # What is below the source is read, too.
    refused("ERROR_CHAIN_LOOP", "-n", "-O", "qcow2", tmp_path / "overlay.qcow2", target, files=files)
    for options in (["-B", "small.qcow2", "-F", "qcow2"], ["-o", "cluster_size=4k"]):
        convert(*options, *into, target, rc=2)
    convert("--target-is-zero", "-O", "qcow2", source, target, rc=2)
    holder = subprocess.Popen(["qemu-io", target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        while b"ops/sec" not in holder.stdout.readline():
            pass
        refused("ERROR_IMAGE_IN_USE", *into, target, mentions=["target.qcow2"])
    finally:
        holder.communicate(b"quit\n")


def test_an_interrupted_one_leaves_a_sound_image(tmp_path):
    """In place: not all of the disk, but an image that checks clean, and that the next run completes."""
    source, target = tmp_path / "source.raw", tmp_path / "target.qcow2"
    source.write_bytes(os.urandom(24 * MIB))
    support.create(target, 24 * MIB)
    args = [support.instar_binary(), "convert", "-n", "-r", "10M", "-f", "raw", "-O", "qcow2", source, target]
    for sent in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(0.8)
        process.send_signal(sent)
        stderr = process.communicate()[1]
        assert process.returncode != 0
        assert sent == signal.SIGKILL or b"part of the disk" in stderr
        checked = support.run("qemu-img", "check", target)
        assert checked.rc in (0, 3), str(checked)
    convert("-n", "-f", "raw", "-O", "qcow2", source, target)
    same(source, "raw", target, "qcow2")


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices take root")
def test_onto_a_block_device(tmp_path):
    source, disk = tmp_path / "source.qcow2", tmp_path / "disk"
    support.create(source, 6 * MIB)
    support.qemu_io(source, "write -P 5 1M 2M")
    disk.write_bytes(b"\x09" * (8 * MIB))
    attached = support.run("losetup", "-f", "--show", disk)
    if attached.rc != 0:
        pytest.skip("no loop devices")
    device = attached.stdout.strip()
    try:
        held = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount holds it
        before = disk.read_bytes()
        for options in ([], ["-O", "qcow2"], ["-n"], ["-n", "-O", "qcow2"]):
            refused("ERROR_IMAGE_IN_USE", *options, source, device, mentions=["is mounted", "lsblk"])
        support.assert_refused(support.run_instar("create", "-f", "qcow2", device, "6M"), "ERROR_IMAGE_IN_USE")
        assert disk.read_bytes() == before
        os.close(held)

        refused("ERROR_OPEN_FAILED", source, device, mentions=["block device", ": -n writes into it"])
        # The same advice for both ways of asking; followed, it leads to the image.
        made = f"instar create -f qcow2 '{device}' SIZE"
        refused("ERROR_OPEN_FAILED", "-O", "qcow2", source, device, mentions=[made])
        refused("ERROR_FORMAT_MISMATCH", "-n", "-O", "qcow2", source, device, mentions=[made])
        assert support.run_instar("create", "-f", "qcow2", device, "6M").rc == 0
        convert("-n", "-O", "qcow2", source, device)
        support.run("blockdev", "--flushbufs", device)
        support.assert_same_content(device, source)
        large = tmp_path / "large.qcow2"
        support.create(large, 9 * MIB)
        refused("ERROR_UNSUPPORTED_FORMAT", "-n", large, device, mentions=["enlarge the device"])
        disk.write_bytes(before)
        support.run("blockdev", "--flushbufs", device)
        convert("-n", "-O", "raw", source, device)
        support.run("blockdev", "--flushbufs", device)
        # A file of a chain, by way of a device that stands on it.
        result = support.run_instar("convert", "-n", "-f", "raw", "-O", "raw", disk, device)
        support.assert_refused(result, "ERROR_CHAIN_LOOP")
    finally:
        support.run("losetup", "-d", device)
    content = disk.read_bytes()
    assert content == bytes(MIB) + b"\x05" * (2 * MIB) + bytes(3 * MIB) + b"\x09" * (2 * MIB)


# Several sources


@pytest.mark.parametrize("sizes", [[MIB, 2 * MIB], [MIB, 512, 0, 3 * MIB + 512], [1000, 70_000, 5], [65_536] * 5])
@pytest.mark.parametrize("target_fmt", ["raw", "qcow2", "vmdk"])
def test_several_disks(sizes, target_fmt, tmp_path):
    rng = random.Random(len(sizes))
    sources = []
    for index, size in enumerate(sizes):
        source = tmp_path / f"{index}.raw"
        source.write_bytes(rng.randbytes(size))
        sources.append(source)
    theirs, target = tmp_path / "theirs", tmp_path / "target"
    support.qemu_img("convert", "-f", "raw", "-O", target_fmt, *sources, theirs)
    convert("-f", "raw", "-O", target_fmt, *sources, target)
    assert support.virtual_size(target, fmt=target_fmt) == support.virtual_size(theirs, fmt=target_fmt)
    same(theirs, target_fmt, target, target_fmt)


def test_several_chains_of_several_kinds(tmp_path):
    rng = random.Random(3)
    for name in "abc":
        (tmp_path / name).mkdir()
    first = chain(tmp_path / "a", rng, [3 * MIB, 4 * MIB + 512])[-1]
    second = chain(tmp_path / "b", rng, [2 * MIB], fmt="vmdk")[-1]
    third = tmp_path / "c/compressed.qcow2"
    support.qemu_img("convert", "-c", "-O", "qcow2", first, third)
    sources = [first, second, third, first]
    theirs, target = tmp_path / "theirs", tmp_path / "target"
    for fmt in ("raw", "qcow2"):
        support.qemu_img("convert", "-O", fmt, *sources, theirs)
        with support.untouched(*sources):
            convert("-O", fmt, *sources, target)
        same(theirs, fmt, target, fmt)
    refused("ERROR_CHAIN_LOOP", "-O", "qcow2", second, first, second, files=sources)


def test_disks_that_are_too_large_together(tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target.raw"
    support.create(source, 1 << 60, cluster_size=2 * MIB)
    refused("ERROR_UNSUPPORTED_FORMAT", "-O", "raw", *[source] * 8, target, mentions=["2^63"])
    assert not target.exists()


# -S


def test_a_target_that_allocates_all_of_its_disk(tmp_path):
    source = tmp_path / "source.raw"
    with open(source, "wb") as file:
        file.truncate(8 * MIB)
        file.seek(3 * MIB)
        file.write(b"\x05" * 70_000)
    for fmt in ("raw", "qcow2", "vdi"):
        target = tmp_path / f"target.{fmt}"
        convert("-S", "0", "-f", "raw", "-O", fmt, source, target)
        same(source, "raw", target, fmt)
        assert target.stat().st_blocks * 512 >= 8 * MIB, fmt
    assert sum(run["length"] for run in held(tmp_path / "target.qcow2") if run["data"]) == 8 * MIB
    for size in ("100", "5G", "17M", "-1", "99999999999999999999"):
        convert("-S", size, "-f", "raw", "-O", "raw", source, tmp_path / "x", rc=2)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
def test_zeroes_are_looked_for_in_data(fmt, packed, tmp_path):
    """Runs of so many zero bytes are left out, and shorter ones are not."""
    source, plain, rng = tmp_path / "source", tmp_path / "plain.raw", random.Random(3)
    content = bytearray(rng.randbytes(12 * MIB + 512))
    for at, length in [(0, 4096), (MIB + 512, 8192), (2 * MIB, 65_536), (3 * MIB - 4096, 3 * MIB), (9 * MIB, 12_288), (10 * MIB + 100, 4096),
                       (11 * MIB, MIB + 512)]:
        content[at:at + length] = bytes(length)
    plain.write_bytes(content)
    shutil.copyfile(plain, source)
    source_fmt = "raw"
    if packed:
        support.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", plain, source)
        source_fmt = "qcow2"
    took = []
    for size in ("512", "4k", "64k", "1M", "16M"):
        target = tmp_path / f"target.{size}"
        convert("-S", size, "-f", source_fmt, "-O", fmt, source, target)
        same(plain, "raw", target, fmt)
        if fmt == "qcow2":
            support.assert_clean(target)
        took.append(target.stat().st_blocks * 512)
    assert took == sorted(took), took
    # With 4k all but three runs of sectors, with 1M only the long ones, of what is plain.
    zeroes = content.count(bytes(4096)) * 4096
    if fmt == "raw":
        assert len(content) - took[1] in range(zeroes - 12_288, zeroes + 8192), f"{took}, of {zeroes} zeroes"
        assert len(content) - took[3] >= 4 * MIB - 8192
    # The zeroes of an image that is written in place, or on a backing file, hide what is there.
    target = tmp_path / "written"
    support.create(target, 13 * MIB, fmt=fmt)
    support.qemu_io(target, "write -P 9 0 13M", fmt=fmt)
    convert("-n", "-S", "4k", "-f", source_fmt, "-O", fmt, source, target)
    shown = tmp_path / "shown"
    support.qemu_img("convert", "-f", fmt, "-O", "raw", target, shown)
    assert shown.read_bytes()[:len(content)] == content


# --bitmaps


def bitmaps(image):
    data = support.info(image)["format-specific"]["data"]
    return {bitmap["name"]: (bitmap["granularity"], bitmap["flags"]) for bitmap in data.get("bitmaps", [])}


def dirty(image, name):
    """What a bitmap calls dirty, by the word of qemu-img, which merges it into one that can be exported."""
    options = f"driver=qcow2,file.filename={image}"
    socket = f"{image}.sock"
    server = subprocess.Popen(["qemu-nbd", "-r", "-k", socket, "-B", name, "--image-opts", options])
    try:
        deadline = time.monotonic() + support.TIMEOUT
        while not os.path.exists(socket):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        spec = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        mapped = support.run("qemu-img", "map", "--output=json", "--image-opts", spec)
        assert mapped.rc == 0, str(mapped)
        return [(run["start"], run["length"]) for run in json.loads(mapped.stdout) if not run["data"]]
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("options", [[], ["-n"]], ids=["new", "in place"])
def test_bitmaps_are_made_in_the_target(options, tmp_path):
    source, target, theirs = (tmp_path / name for name in ("source.qcow2", "target.qcow2", "theirs.qcow2"))
    support.create(source, 8 * MIB)
    support.qemu_img("bitmap", "--add", "-g", "65536", source, "one")
    support.qemu_io(source, "write -P 1 1M 128k")
    support.qemu_img("bitmap", "--add", "-g", "4096", source, "two")
    support.qemu_io(source, "write -P 2 5M 5000")
    if options:
        support.create(target, 8 * MIB, cluster_size=4096)
    convert("--bitmaps", *options, "-O", "qcow2", source, target)
    support.qemu_img("convert", "--bitmaps", "-O", "qcow2", source, theirs)
    same(source, "qcow2", target, "qcow2")
    support.assert_clean(target)
    assert bitmaps(target) == bitmaps(theirs) and len(bitmaps(target)) == 2
    for name in ("one", "two"):
        assert dirty(target, name) == dirty(theirs, name)
    # Without the option, and of what is below the image, there are none.
    top = tmp_path / "top.qcow2"
    support.create(top, backing="source.qcow2")
    convert("-O", "qcow2", source, tmp_path / "without.qcow2")
    convert("--bitmaps", "-O", "qcow2", top, tmp_path / "of_top.qcow2")
    assert not bitmaps(tmp_path / "without.qcow2") and not bitmaps(tmp_path / "of_top.qcow2")


def test_a_disabled_bitmap_stays_disabled(tmp_path):
    source, target, theirs = (tmp_path / name for name in ("source.qcow2", "target.qcow2", "theirs.qcow2"))
    support.create(source, 4 * MIB)
    support.qemu_img("bitmap", "--add", source, "off")
    support.qemu_img("bitmap", "--add", source, "good")
    support.qemu_io(source, "write -P 1 1M 128k")
    support.qemu_img("bitmap", "--disable", source, "off")
    support.qemu_io(source, "write -P 1 3M 64k")
    for options in ([], ["-c"]):
        result = convert("--bitmaps", *options, "-O", "qcow2", source, target)
        support.qemu_img("convert", "--bitmaps", "-O", "qcow2", source, theirs)
        assert result.stderr == "" and bitmaps(target) == bitmaps(theirs), str(result)
        assert "auto" not in bitmaps(target)["off"][1] and "auto" in bitmaps(target)["good"][1]
        support.assert_clean(target)
        for name in ("off", "good"):
            assert dirty(target, name) == dirty(theirs, name) != []


def test_bitmaps_that_cannot_be_made(tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target"
    support.create(source, 4 * MIB)
    support.qemu_img("bitmap", "--add", source, "good")
    result = support.run_instar("convert", "--bitmaps", "-O", "raw", source, target)
    assert result.rc == 1 and result.stderr.count("\n") == 1 and not target.exists(), str(result)
    # A writer that was killed leaves its bitmap in use.
    writer = subprocess.Popen(["qemu-io", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer.stdin.write(b"write 0 64k\nflush\n")
    writer.stdin.flush()
    while b"ops/sec" not in writer.stdout.readline():
        pass
    writer.kill()
    writer.communicate()
    refused("ERROR_UNSUPPORTED_FORMAT", "--bitmaps", "-O", "qcow2", source, target, mentions=["good", "--skip-broken"])
    convert("--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", source, target)
    assert not bitmaps(target)
    convert("--skip-broken-bitmaps", "-O", "qcow2", source, target, rc=2)


def test_standard_output_is_no_target(tmp_path):
    support.create(tmp_path / "a", MIB)
    result = support.run_instar("convert", "-O", "raw", "a", "-", cwd=tmp_path)
    assert result.rc == 2 and "standard output" in result.stderr and not (tmp_path / "-").exists(), str(result)
    assert support.run_instar("convert", "-O", "raw", "a", "./-", cwd=tmp_path).rc == 0 and (tmp_path / "-").exists()
    result = support.run_instar("convert", "-O", "raw", "a", "/dev/stdout", cwd=tmp_path)
    assert result.rc == 1 and result.stdout == "" and "not to a pipe" in result.stderr, str(result)
    os.mkfifo(tmp_path / "fifo")
    result = support.run_instar("convert", "-O", "raw", "a", "fifo", cwd=tmp_path)
    assert result.rc == 1 and "not to a pipe" in result.stderr, str(result)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_target_that_may_not_become_so_long_is_to_blame(fmt, tmp_path):
    support.create(tmp_path / "a", support.FILE_LIMIT + 2 * MIB)
    support.qemu_io(tmp_path / "a", f"write 0 {support.FILE_LIMIT + MIB}")
    limit = ["prlimit", f"--fsize={support.FILE_LIMIT}", support.instar_binary()]
    result = support.run(*limit, "convert", "-O", fmt, tmp_path / "a", tmp_path / "out")
    assert result.rc == 1 and "ERROR_BACKING_IO" in result.stderr and "ulimit -f" in result.stderr, str(result)
    assert not (tmp_path / "out").exists()


def test_a_compressed_image_takes_no_time_for_zeroes_that_are_not_there(tmp_path):
    """1 TiB of them; `-S 0` asks for space, which a compressed image has no use for."""
    support.create(tmp_path / "a", "1T", fmt="raw")
    support.qemu_io(tmp_path / "a", "write -P 5 1M 64k", fmt="raw")
    result = support.run("timeout", "60", support.instar_binary(), "convert", "-f", "raw", "-c", "-S", "0", "-O", "qcow2", tmp_path / "a", tmp_path / "b")
    assert result.rc == 0, str(result)
    assert (tmp_path / "b").stat().st_size < 8 * MIB


@pytest.mark.parametrize(("option", "words"), [("data_file=d", "external data file"), ("data_file_raw=on", "external data file"),
                                               ("encryption=on", "not encrypted"), ("encrypt.format=luks", "not encrypted")])
def test_what_no_image_has_is_said_in_a_sentence(option, words, tmp_path):
    support.create(tmp_path / "a", MIB)
    for command in (["convert", "-O", "qcow2", "-o", option, "a", "b"], ["create", "-f", "qcow2", "-o", option, "b", "1M"]):
        result = support.run_instar(*command, cwd=tmp_path)
        assert result.rc == 1 and words in result.stderr and option.split("=")[0] in result.stderr, str(result)
        assert os.listdir(tmp_path) == ["a"]
