"""Backings on block devices: the device is full of stale bytes, and its length is fixed."""

from __future__ import annotations

import os
import random
import re
import subprocess

import pytest
import support
from support import KIB, MIB, refuse


class Loop:
    """A block device of so many bytes, none of which is zero."""

    def __init__(self, path, size):
        path.write_bytes(b"\xee" * size)
        done = subprocess.run(["losetup", "--show", "-f", path], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"this machine has no loop devices: {done.stderr.strip()}")
        self.path, self.device = path, done.stdout.strip()

    def __enter__(self):
        return self.device

    def __exit__(self, *_):
        subprocess.run(["losetup", "-d", self.device], check=True)


def create(device, size, **options):
    support.create(device, size, **options)
    return device


def committed(device, top, tmp_path, *options):
    """Commits; the backing must read as the overlay did, and be right in qemu-img's eyes."""
    before = support.flatten(top, tmp_path / "before.qcow2")
    support.commit(top, "-b", device, *options)
    support.assert_same_content(top, before)
    support.assert_same_content(device, before)
    support.assert_clean(device)
    assert support.holds_no_clusters(top)


def missing(device, top, *options):
    """The bytes that a refusal says are missing; nothing has changed."""
    with support.untouched(top):
        result = support.run_instar("commit", "-b", device, *options, "--output", "json", top)
    error = result.error
    assert error["name"] == "ERROR_NO_SPACE" and "nothing was changed" in error["message"], str(result)
    assert "file system" not in error["message"], str(result)
    return int(re.search(r"(\d+) bytes are missing", error["message"])[1])


@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "size", "start", "length"),
    [
        (512, 16, 4, 1 * MIB, 600 * KIB),
        (512, 64, 8, 2 * MIB, 3 * MIB),  # the refcount table grows and moves
        (4 * KIB, 1, 16, 4 * MIB, 5 * MIB),
        (4 * KIB, 16, 40, 3 * MIB, 20 * MIB),
        (64 * KIB, 64, 40, 3 * MIB, 20 * MIB),
        (2 * MIB, 16, 40, 3 * MIB, 9 * MIB),
    ],
)
def test_what_no_refcount_block_describes_is_free(tmp_path, cluster_size, refcount_bits, size, start, length):
    with Loop(tmp_path / "disk", size * MIB) as device:
        create(device, 64 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits)
        support.qemu_io(device, f"write -P 1 0 {start}")
        top = support.create(tmp_path / "top.qcow2", backing=device, cluster_size=cluster_size)
        support.qemu_io(top, f"write -P 2 {start - 4096} {length}", "write -z 64k 128k", f"write -P 3 {60 * MIB} 700")
        committed(device, top, tmp_path)


def test_a_device_that_is_too_small(tmp_path):
    top = tmp_path / "top.qcow2"

    def made(size):
        create(device, 64 * MIB)
        support.create(top, backing=device)
        support.qemu_io(top, "write -P 2 1M 6M", "write -P 3 60M 1M")

    with Loop(tmp_path / "disk", 2 * MIB) as device:
        made(2 * MIB)
        size = 2 * MIB + missing(device, top)
    with Loop(tmp_path / "disk", size - 64 * KIB) as device:
        made(size)
        assert missing(device, top) == 64 * KIB
        assert missing(device, top, "--dry-run") == 64 * KIB
        measured = support.run_instar("measure", "--commit", "-b", device, "--output", "json", top)
        expected = {"required": size, "growth": 64 * KIB, "additional-space": 0, "free": None, "target": device, "target-format": "qcow2"}
        assert measured.rc == 0 and measured.json_of_sandbox == expected, str(measured)
    with Loop(tmp_path / "disk", size) as device:
        made(size)
        committed(device, top, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_a_device_of_the_measured_size_is_enough(tmp_path, seed):
    rng = random.Random(seed)
    cluster_size, top = rng.choice([512, 4096, 65536]), tmp_path / "top"

    def made(device):
        drawn = random.Random(seed)
        create(device, 4 * MIB, cluster_size=cluster_size)
        support.qemu_io(device, f"write -P 1 {drawn.randrange(64) * 4096} 256k")
        if drawn.random() < 0.5:
            support.qemu_img("snapshot", "-c", "kept", device)
        support.create(top, 16 * MIB, backing=device)
        support.qemu_io(top, *(f"write -P 2 {drawn.randrange(3800) * 4096} 100k" for _ in range(12)))

    with Loop(tmp_path / "disk", 2 * MIB) as device:
        made(device)
        with support.untouched(tmp_path / "disk", top):
            measured = support.run_instar("measure", "--commit", "-b", device, "--resize-backing", "--output", "json", top)
        assert measured.rc == 0, str(measured)
        required = measured.json["required"]
        assert measured.json["growth"] == max(required - 2 * MIB, 0)
    with Loop(tmp_path / "disk", max(required, 2 * MIB)) as device:
        made(device)
        committed(device, top, tmp_path, "--resize-backing")


def test_it_grows(tmp_path):
    """The L1 table moves: a cluster of 512 bytes maps 2 MiB."""
    with Loop(tmp_path / "disk", 4 * MIB) as device:
        create(device, 1 * MIB, cluster_size=512)
        support.qemu_io(device, "write -P 1 0 1M")
        top = support.create(tmp_path / "top.qcow2", 20 * MIB, backing=device, cluster_size=512)
        support.qemu_io(top, "write -P 2 512k 1M", "write -P 3 19M 300k")
        committed(device, top, tmp_path, "--resize-backing")
        assert support.virtual_size(device) == 20 * MIB


@pytest.mark.parametrize("seed", range(4))
def test_commits_one_after_the_other(tmp_path, seed):
    """Snapshots and freed clusters leave gaps, which the next commits fill."""
    rng = random.Random(seed)
    with Loop(tmp_path / "disk", 24 * MIB) as device:
        create(device, 16 * MIB, cluster_size=rng.choice([512, 4096]), refcount_bits=rng.choice([16, 64]))
        for number in range(5):
            top = support.create(tmp_path / "top.qcow2", backing=device, cluster_size=rng.choice([512, 65536]))
            writes = [
                f"write {rng.choice([f'-P {number + 1}', '-z'])} {rng.randrange(0, 14 * MIB, 512)} {rng.randrange(512, MIB, 512)}"
                for _ in range(12)
            ]
            support.qemu_io(top, *writes)
            committed(device, top, tmp_path)
            if number == 1:
                support.qemu_img("snapshot", "-c", "one", device)
            if number == 3:
                support.qemu_img("snapshot", "-d", "one", device)
            os.unlink(top)


def test_a_vmdk_does_not_fit_on_a_device(tmp_path):
    """It has no place to grow on; the refusal comes before the first change."""
    with Loop(tmp_path / "disk", 4 * MIB) as device:
        support.create(tmp_path / "base.vmdk", 16 * MIB, fmt="vmdk")
        with open(device, "r+b") as file:
            file.write((tmp_path / "base.vmdk").read_bytes())
        top = support.create(tmp_path / "top.qcow2", backing=device, backing_fmt="vmdk")
        support.qemu_io(top, "write -P 2 1M 1M")
        with support.untouched(top, tmp_path / "disk"):
            result = support.run_instar("commit", "-b", device, "--output", "json", top)
        error = result.error
        assert result.rc == 1 and error["name"] != "ERROR_INTERNAL_OVERFLOW" and "please report" not in error["message"], str(result)


def test_a_damaged_image_on_a_device(tmp_path):
    with Loop(tmp_path / "disk", 8 * MIB) as device:
        create(device, 16 * MIB)
        support.qemu_io(device, "write -P 1 0 1M")
        with open(device, "r+b") as file:
            head = file.read(MIB)
            table = int.from_bytes(head[48:56], "big")
            block = int.from_bytes(head[table : table + 8], "big")
            # The last clusters of the data are said to be free.
            file.seek(block + 2 * 18)
            file.write(bytes(4))
        top = support.create(tmp_path / "top.qcow2", backing=device)
        support.qemu_io(top, "write -P 2 8M 1M")
        refuse("ERROR_BACKING_CORRUPT", top, "-b", device, files=[tmp_path / "disk"], mentions=["refcount 0", device])


@pytest.mark.parametrize("offset", [0, 64 * KIB])
def test_a_loop_device_on_the_overlay_itself(tmp_path, offset):
    """It is another name for the same bytes: what is committed would overwrite what it comes from."""
    top = tmp_path / "top"
    support.create(top, 4 * MIB)
    support.qemu_io(top, "write -P 1 0 4M")
    done = subprocess.run(["losetup", "--show", "-f", "-o", str(offset), top], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine has no loop devices: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        support.qemu_img("rebase", "-u", "-b", device, "-F", "raw", top)
        for options in (["--allow-backing-dir", "/dev"], ["-b", device, "-F", "raw"]):
            refuse("ERROR_CHAIN_LOOP", top, *options, mentions=[device, "loop device on another file"])
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_a_raw_device_that_is_too_small(tmp_path):
    """`--resize-backing` cannot help, so that it is not advised."""
    with Loop(tmp_path / "disk", 4 * MIB) as device:
        top = support.create(tmp_path / "top", 8 * MIB)
        support.qemu_img("rebase", "-u", "-b", device, "-F", "raw", top)
        measured = support.run_instar("measure", "--commit", "-b", device, "--output", "json", top)
        assert measured.rc == 0 and (measured.json["required"], measured.json["growth"]) == (8 * MIB, 4 * MIB), str(measured)
        refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, "-b", device, mentions=["enlarge the device"])
        refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", device, "--resize-backing", mentions=[device, "enlarge the device"])


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_with_a_mounted_loop_device(tmp_path, read_only):
    """Nobody holds a lock on it: it is in use all the same, by whatever name."""
    raw, point, top = tmp_path / "disk", tmp_path / "point", tmp_path / "top"
    raw.write_bytes(bytes(8 * MIB))
    subprocess.run(["mkfs.ext4", "-q", raw], check=True)
    support.qemu_img("create", "-f", "qcow2", "-b", "disk", "-F", "raw", top, cwd=tmp_path)
    support.qemu_io(top, "write -P 1 4M 64k")
    source = support.create(tmp_path / "source", 8 * MIB)
    link = tmp_path / "other-name"
    os.link(raw, link)
    point.mkdir()
    done = subprocess.run(["mount", "-o", "ro" if read_only else "loop", raw, point], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        for args in (
            ["commit", top],
            ["commit", "-b", link, top],
            ["resize", "-f", "raw", link, "16M"],
            ["convert", "-O", "raw", source, raw],
            ["convert", "-n", "-O", "raw", source, raw],
            ["create", "-f", "raw", raw, "8M"],
            ["create", "-f", "qcow2", link, "8M"],
        ):
            with support.untouched(raw, top):
                support.assert_refused(support.run_instar(*args), "ERROR_IMAGE_IN_USE")
        refused = support.run_instar("commit", top)
        support.assert_refused(refused, "ERROR_IMAGE_IN_USE", raw, "by way of /dev/loop", "unmount it")
        # Reading: only what nobody changes, or with -U.
        for args in (["convert", "-f", "raw", "-O", "qcow2", link, tmp_path / "new"], ["map", top], ["check", top]):
            result = support.run_instar(*args)
            if read_only or args[0] == "check":
                assert result.rc == 0, str(result)
            else:
                support.assert_refused(result, "ERROR_IMAGE_IN_USE", "by way of /dev/loop")
                assert support.run_instar(args[0], "-U", *args[1:]).rc == 0
    finally:
        subprocess.run(["umount", point], check=True)
    # A loop device that nobody uses is no reason.
    device = subprocess.run(["losetup", "--show", "-f", raw], capture_output=True, text=True, check=True).stdout.strip()
    try:
        assert support.run_instar("commit", top).rc == 0
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
