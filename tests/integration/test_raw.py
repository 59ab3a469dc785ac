"""Raw backings: files, sparse ones, and block devices. `qemu-img commit` on copies is the oracle."""

from __future__ import annotations

import os
import random
import subprocess

import pytest
import support
from support import GIB, KIB, MIB, assert_clean, qemu_img, qemu_io, refuse


@pytest.fixture
def raw(pair):
    pair.base = pair.dir / "base.raw"
    return pair


def make(pair, size=4 * MIB, **options):
    return pair.make(size, base_fmt="raw", **options)


def commit(pair, *options, **more):
    return pair.check_commit(*options, backing_fmt="raw", **more)


def allocated(path):
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_as_qemu_img(raw, cluster_size, compat):
    make(raw, 20 * MIB + 512, base=["write -P 1 0 6M", "write -P 2 19M 1M"],
         top_options={"cluster_size": cluster_size, "compat": compat},
         top=["write -P 9 1M 300k", "write -z 3M 1M", "write -P 7 512 1k", "discard 5M 64k", f"write -P 5 {20 * MIB} 512",
              "write -P 0 10M 64k"])
    commit(raw)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters(raw, compression):
    make(raw, base=["write -P 1 0 2M"], top_options={"compression_type": compression},
         top=["write -c -P 9 64k 64k", "write -c -P 8 1M 128k", "write -P 7 512 1k", "write -c -P 6 3M 64k"])
    commit(raw)


def test_subclusters(raw):
    make(raw, base=["write -P 1 0 4M"], top_options={"extended_l2": "on"},
         top=["write -P 9 2k 2k", "write -z 64k 2k", "write -P 8 130k 6k", "write -z 128k 2k", "discard 1M 64k"])
    commit(raw)


def test_a_file_that_ends_within_a_sector(raw):
    """The disk is rounded up to whole sectors; what is committed there makes the file longer, nothing else does."""
    content = random.Random(1).randbytes(1_000_001)
    for top in (["write -P 9 0 512"], ["write -P 9 999936 512"]):
        raw.base.write_bytes(content)
        support.create(raw.top, backing=raw.base.name, backing_fmt="raw")
        qemu_io(raw.top, *top)
        before = support.flatten(raw.top, raw.dir.parent / "was")
        # Which file is a disk by its name alone, the operator says.
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", raw.top, files=[raw.base], mentions=["512", "-b"])
        support.commit(raw.top, "-b", raw.base.name)
        support.assert_same_content(raw.top, before)
        after = raw.base.read_bytes()
        if top[0].split()[3] == "0":
            assert after == b"\x09" * 512 + content[512:]
        else:
            assert after == content[:999_936] + b"\x09" * 512
        assert support.holds_no_clusters(raw.top)


@pytest.mark.parametrize("top_size", [MIB + 512, 64 * KIB - 512])
def test_a_smaller_overlay_leaves_the_rest(raw, top_size):
    make(raw, 4 * MIB, top_size=top_size, base=["write -P 1 0 4M"], top=[f"write -P 9 0 {top_size}"])
    commit(raw)
    assert raw.base.read_bytes() == b"\x09" * top_size + b"\x01" * (4 * MIB - top_size)


def test_sparse_files_stay_sparse(raw):
    """Zeroes punch holes; what the overlay does not hold is not touched."""
    make(raw, 256 * MIB, base=["write -P 1 0 16M", "write -P 1 128M 16M"],
         top=["write -P 9 64M 1M", "write -z 0 8M", "write -z 128M 16M", "write -z 192M 32M"])
    commit(raw)
    theirs = allocated(raw.copies / raw.base.name)
    assert allocated(raw.base) <= max(theirs, 9 * MIB + 64 * KIB)


def test_holes_of_the_overlay_stay_holes(raw):
    make(raw, 256 * MIB, top_options={"preallocation": "metadata", "extended_l2": "on"})
    commit(raw)
    assert allocated(raw.base) <= MIB


@pytest.mark.parametrize(("small", "large"), [(4 * MIB, 9 * MIB), (1024, GIB), (512, MIB + 512)])
def test_growing(raw, small, large):
    make(raw, small, top_size=large, base=[f"write -P 1 0 {small}"],
         top=["write -P 9 512 512" if large > 1024 else "write -P 9 0 512", f"write -P 8 {large - 512} 512"])
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", raw.top, files=[raw.base], mentions=["--resize-backing"])
    commit(raw, "--resize-backing")
    assert raw.base.stat().st_size == large


def test_growing_a_file_that_ends_within_a_sector(raw):
    raw.base.write_bytes(b"\x01" * 1000)
    support.create(raw.top, 2 * MIB, backing=raw.base.name, backing_fmt="raw")
    qemu_io(raw.top, "write -P 9 1M 512")
    support.commit(raw.top, "--resize-backing", "-b", raw.base.name)
    assert raw.base.read_bytes() == (b"\x01" * 1000).ljust(MIB, b"\0") + b"\x09" * 512 + bytes(MIB - 512)


def test_options(raw):
    make(raw, top=["write -P 9 1M 300k"])
    with support.untouched(raw.top, raw.base):
        support.commit(raw.top, "--dry-run")
    result = support.run_instar("commit", "-d", "--output", "json", raw.top)
    assert result.rc == 0, str(result)
    assert result.json["backing_format"] == "raw" and result.json["overlay_clusters_cleared"] == 0
    assert result.json["bytes_committed"] == 320 * KIB
    assert not support.holds_no_clusters(raw.top)
    assert support.run_instar("commit", "-b", raw.base, raw.top).rc == 0
    assert support.holds_no_clusters(raw.top)
    qemu_io(raw.base, "read -P 9 1M 300k", "read -P 0 0 1M", fmt="raw")


def test_a_format_that_is_not_recorded(raw):
    """Any bytes are a raw image: so nothing is one by itself."""
    make(raw, top=["write -P 9 1M 300k"])
    data = bytearray(raw.top.read_bytes())
    at = data.index(b"raw", 104, 4096) - 8
    data[at : at + 4] = (0x12345678).to_bytes(4, "big")
    raw.top.write_bytes(data)
    assert "backing-filename-format" not in support.info(raw.top)
    for options in ([], ["-b", str(raw.base)]):
        refuse("ERROR_UNSUPPORTED_FORMAT", raw.top, *options, files=[raw.base], mentions=[raw.base, "-F raw"])


def test_a_file_without_room(raw):
    """The errors of the host are told with file and offset; the overlay is as it was."""
    make(raw, 68 * MIB, top=["write -P 9 64M 4M"])
    before = support.flatten(raw.top, raw.dir.parent / "was")
    os.truncate(raw.base, 64 * MIB)
    limit = ["prlimit", f"--fsize={support.FILE_LIMIT}", str(support.instar_binary())]
    result = support.run(*limit, "commit", "--resize-backing", raw.top)
    assert result.rc == 1 and str(raw.base) in result.stderr, str(result)
    support.commit(raw.top, "--resize-backing")
    support.assert_same_content(raw.top, before)
    assert raw.base.read_bytes() == bytes(64 * MIB) + b"\x09" * 4 * MIB


class Loop:
    """A block device over a file."""

    def __init__(self, path):
        done = subprocess.run(["losetup", "--show", "-f", path], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"this machine has no loop devices: {done.stderr.strip()}")
        self.device = done.stdout.strip()

    def __enter__(self):
        return self.device

    def __exit__(self, *_):
        subprocess.run(["losetup", "-d", self.device], check=True)


def test_a_block_device(raw):
    raw.base.write_bytes(b"\x01" * (8 * MIB))
    with Loop(raw.base) as device:
        support.create(raw.top, backing=device, backing_fmt="raw")
        qemu_io(raw.top, "write -P 9 1M 300k", "write -z 3M 1M", "write -P 7 512 1k", f"write -P 5 {8 * MIB - 512} 512")
        before = support.flatten(raw.top, raw.dir.parent / "was")
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", raw.top, files=[raw.base], mentions=["-b"])
        support.commit(raw.top, "-b", device)
        support.assert_same_content(raw.top, before)
        assert support.holds_no_clusters(raw.top)
        # Its length is fixed.
        support.create(raw.top, 9 * MIB, backing=device, backing_fmt="raw")
        qemu_io(raw.top, "write -P 9 0 512")
        result = support.run_instar("commit", "-b", device, "--resize-backing", "--output", "json", raw.top)
        assert result.error["name"] == "ERROR_UNSUPPORTED_FORMAT", str(result)
        assert "cannot grow" in result.stderr and device in result.stderr
    expected = bytearray(b"\x01" * (8 * MIB))
    expected[MIB : MIB + 300 * KIB] = b"\x09" * (300 * KIB)
    expected[3 * MIB : 4 * MIB] = bytes(MIB)
    expected[512:1536] = b"\x07" * KIB
    expected[-512:] = b"\x05" * 512
    assert raw.base.read_bytes() == expected


def test_create(tmp_path):
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    assert support.run_instar("create", "-q", "-f", "raw", ours, "10M").rc == 0
    support.create(theirs, "10M", fmt="raw")
    assert ours.read_bytes() == theirs.read_bytes()
    assert allocated(ours) == 0
    seen = support.run_instar("info", "-f", "raw", "--output", "json", ours).json
    wanted = support.info(theirs, "-f", "raw")
    for key in ("format", "virtual-size", "dirty-flag"):
        assert seen[key] == wanted[key], key
    for options, word in ((["-o", "preallocation=metadata"], "preallocation"), (["-o", "cluster_size=4k"], "cluster_size")):
        result = support.run_instar("create", "-f", "raw", *options, tmp_path / "none", "10M")
        assert result.rc == 1 and word in result.stderr and not (tmp_path / "none").exists()
    result = support.run_instar("create", "-f", "raw", "-b", ours, "-F", "raw", tmp_path / "none", "10M")
    assert result.rc == 1 and "backing" in result.stderr and not (tmp_path / "none").exists()
    overlay = tmp_path / "over.qcow2"
    assert support.run_instar("create", "-q", "-f", "qcow2", "-b", ours.name, "-F", "raw", overlay).rc == 0
    qemu_io(overlay, "write -P 3 1M 1M")
    support.commit(overlay)
    qemu_io(ours, "read -P 3 1M 1M", "read -P 0 0 1M", fmt="raw")
    assert_clean(overlay)
