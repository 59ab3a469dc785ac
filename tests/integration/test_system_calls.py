"""What a commit asks of the kernel grows with what it moves, and not with the square of it: images as guests write them, small
and scattered, in which every question could run over the whole file. Calls are counted, never timed."""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import subprocess

import pytest
import support
from support import GIB, KIB, MIB

CLUSTER = 64 * KIB


@pytest.fixture
def count(tmp_path):
    """Commits an overlay under strace; how often each system call was made."""
    if shutil.which("strace") is None or support.run("strace", "-o", "/dev/null", "true").rc != 0:
        pytest.skip("strace is not installed, or may not trace")

    def counted(overlay, *options):
        log = tmp_path / "strace"
        result = support.run("strace", "-f", "-qq", "-o", log, support.instar_binary(), "commit", "-q", *options, overlay)
        assert result.rc == 0, str(result)
        text = log.read_text(errors="replace")
        return collections.Counter(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))

    return counted


def written(path, writes, length, cache="none"):
    """Write an image in place, in this order, as a guest does: (offset, byte) each."""
    commands = "".join(f"write -q -P {byte} {offset} {length}\n" for offset, byte in writes)
    modes = ["-t", cache] if cache else []
    try:
        subprocess.run(["qemu-io", *modes, path], input=commands, text=True, check=True, capture_output=True)
    except subprocess.CalledProcessError:
        # No direct I/O here.
        subprocess.run(["qemu-io", path], input=commands, text=True, check=True, capture_output=True)
    os.sync()


def scattered(number, unit, size, seed=1):
    rng = random.Random(seed)
    return [(place * unit, rng.randrange(1, 255)) for place in rng.sample(range(size // unit), number)]


def make(directory, base_fmt, number, length, unit=None, size=4 * GIB):
    directory.mkdir()
    base = support.create(directory / "base", size, fmt=base_fmt)
    top = support.create(directory / "top", backing="base", backing_fmt=base_fmt)
    written(top, scattered(number, unit or length, size), length)
    return base, top


@pytest.mark.parametrize("base_fmt", ["qcow2", "raw"])
def test_scattered_clusters_without_a_hole_ask_for_holes_a_few_times(tmp_path, count, base_fmt):
    """The overlay's file is all data, in another order than the disk: one answer says so, and no request asks again."""
    for number in (200, 800):
        base, top = make(tmp_path / str(number), base_fmt, number, CLUSTER)
        flat = support.flatten(top, tmp_path / "flat")
        calls = count(top)
        # Each plugin's library is looked at before it is loaded, which takes some, too.
        assert calls["lseek"] <= 30 + 5 * len(support.BUNDLED) + number // 20, calls
        moved = sum(calls[call] for call in ("pread64", "pwrite64", "copy_file_range"))
        assert moved <= 3 * number + 200, calls
        assert calls["fallocate"] + calls["sync_file_range"] + calls["fcntl"] <= 200 + number // 4, calls
        assert calls["statx"] + calls["fstat"] + calls["fdatasync"] <= 150, calls
        support.assert_same_content(flat, base, second_fmt=base_fmt)


@pytest.mark.parametrize("base_fmt", ["qcow2", "raw"])
def test_small_writes_cost_a_few_calls_each(tmp_path, count, base_fmt):
    """Clusters of which the guest wrote 4 KiB: the rest is a hole, or unwritten. It is neither asked for twice nor moved."""
    per_write = {}
    for number in (300, 1200):
        base, top = make(tmp_path / str(number), base_fmt, number, 4 * KIB, CLUSTER)
        flat = support.flatten(top, tmp_path / "flat")
        calls = count(top)
        assert calls["lseek"] <= 2 * number + 100, calls
        per_write[number] = sum(calls.values()) / number
        assert per_write[number] < 12, calls
        support.assert_same_content(flat, base, second_fmt=base_fmt)
    assert per_write[1200] <= per_write[300] + 1, per_write


def test_holes_of_clusters_stay_holes(tmp_path, count):
    """What a guest left out of a cluster takes no space in a backing that has nothing there."""
    base, top = make(tmp_path / "holes", "qcow2", 256, 4 * KIB, CLUSTER)
    before = os.stat(top).st_blocks * 512
    count(top)
    assert os.stat(base).st_blocks * 512 <= before + MIB
    assert os.stat(top).st_blocks * 512 <= MIB


def test_two_images_that_grow_side_by_side_are_merged(tmp_path, count):
    """Their extents alternate on the disk, and many writes hit what the backing has."""
    base, top = make(tmp_path / "a", "qcow2", 100, CLUSTER, size=64 * MIB)
    _, other = make(tmp_path / "b", "qcow2", 100, CLUSTER, size=64 * MIB)
    for step in range(10):
        for image in (top, other):
            written(image, scattered(60, 4 * KIB, 64 * MIB, seed=step), 4 * KIB)
    support.qemu_io(base, "write -P 77 0 32M")
    flat = support.flatten(top, tmp_path / "flat")
    calls = count(top)
    assert calls["lseek"] <= 3 * 700, calls
    support.assert_same_content(flat, base)
