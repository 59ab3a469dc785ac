"""Data that is all zeroes: `commit --detect-zeroes`, and `convert -S SIZE`, which look for it in the same way."""

from __future__ import annotations

import json

import pytest
import support
from support import KIB, MIB, create, qemu_img, qemu_io, run_instar
from test_verify import PAIRS


def zeroes(directory, base_fmt="qcow2", top_fmt="qcow2", **base_options):
    """A base that is full, and an overlay with data, zeroes that are data, and both in one cluster."""
    create(directory / "base", 16 * MIB, fmt=base_fmt, **base_options)
    qemu_io(directory / "base", "write -P 1 0 12M", fmt=base_fmt)
    create(directory / "top", backing="base", backing_fmt=base_fmt, fmt=top_fmt, cwd=directory)
    writes = ["write -P 2 1M 1M", "write -P 0 2M 4M", "write -P 3 6M 64k", "write -P 0 8M 32k", "write -P 4 8224k 32k",
              "write -P 0 13M 2M", "write -P 5 15M 64k"]
    qemu_io(directory / "top", *writes, fmt=top_fmt)
    return support.content_hash(directory / "top", top_fmt)


def taken(path):
    return path.stat().st_blocks * 512


def held(path):
    """Bytes of data, without the holes."""
    with path.open("rb") as file:
        return 4 * KIB * sum(1 for _ in support.data_blocks(file, path.stat().st_size))


def runs(path, fmt="qcow2"):
    return json.loads(qemu_img("map", "--output", "json", "-f", fmt, path).stdout)


@pytest.mark.parametrize("base_fmt, top_fmt", PAIRS)
def test_the_content_is_the_same(tmp_path, base_fmt, top_fmt):
    expected = zeroes(tmp_path, base_fmt, top_fmt, **({"force_size": "on"} if base_fmt == "vpc" else {}))
    done = support.commit(tmp_path / "top", "--detect-zeroes", "--verify", "--digest", "--output", "json").json
    assert done["verified_bytes"] == done["bytes_committed"] > 0 and done["overlay_clusters_cleared"] > 0
    assert support.content_hash(tmp_path / "base", base_fmt) == expected
    assert support.run_instar("check", tmp_path / "base", "-f", base_fmt).rc in (0, 63)


@pytest.mark.parametrize("mode, detects", [("--detect-zeroes", True), ("--detect-zeroes=on", True), ("--detect-zeroes=unmap", True),
                                           ("--detect-zeroes=off", False), (None, False)])
def test_zeroes_give_their_space_back(tmp_path, mode, detects):
    expected = zeroes(tmp_path)
    options = [mode] if mode else []
    bytes_committed = support.commit(tmp_path / "top", "--output", "json", *options).json["bytes_committed"]
    assert bytes_committed >= MIB + 4 * MIB + 128 * KIB + 2 * MIB + 64 * KIB
    assert support.content_hash(tmp_path / "base") == expected
    found = [run["zero"] for run in runs(tmp_path / "base") if run["start"] <= 3 * MIB < run["start"] + run["length"]]
    assert found == [detects], runs(tmp_path / "base")
    hidden = [run["data"] for run in runs(tmp_path / "base") if run["start"] <= 14 * MIB < run["start"] + run["length"]]
    assert hidden == [not detects], runs(tmp_path / "base")


def test_a_thin_raw_target_gets_holes(tmp_path):
    expected = zeroes(tmp_path, "raw")
    before, data = taken(tmp_path / "base"), held(tmp_path / "base")
    support.commit(tmp_path / "top", "--detect-zeroes")
    assert support.content_hash(tmp_path / "base", "raw") == expected
    # Four megabytes go, and what is smaller than a cluster as well; what is written besides is 64 KiB.
    less = 4 * MIB + 32 * KIB - 64 * KIB
    assert held(tmp_path / "base") <= data - less
    # A file of more than four extents takes a block of ext4 besides, for their tree.
    assert taken(tmp_path / "base") <= before - less + 4 * KIB


def test_the_dry_run_counts_what_is_written(tmp_path):
    zeroes(tmp_path)
    plain, found = (support.commit(tmp_path / "top", "--dry-run", "--output", "json", *options).json for options in ([], ["--detect-zeroes"]))
    assert plain["backing_growth_bytes"] - found["backing_growth_bytes"] >= 2 * MIB
    before = (tmp_path / "base").stat().st_size
    support.commit(tmp_path / "top", "--detect-zeroes")
    assert (tmp_path / "base").stat().st_size - before <= found["backing_growth_bytes"]


def test_compressed_zeroes_and_several_layers(tmp_path):
    create(tmp_path / "base", 8 * MIB)
    create(tmp_path / "mid", backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "mid", "write -c -P 0 0 64k", "write -c -P 6 64k 64k", "write -P 0 1M 128k", "write -P 7 1152k 64k")
    create(tmp_path / "top", backing="mid", cwd=tmp_path, cluster_size="4k")
    qemu_io(tmp_path / "top", "write -P 8 1M 4k", "write -P 0 1152k 8k")
    expected = support.content_hash(tmp_path / "top")
    support.commit(tmp_path / "top", "-b", "base", "--detect-zeroes", "--verify")
    assert support.content_hash(tmp_path / "base") == expected
    data = sum(run["length"] for run in runs(tmp_path / "base") if run["data"] and not run["zero"])
    # What was compressed, and of two clusters the part that holds something.
    assert data == (64 + 4 + 56) * KIB, runs(tmp_path / "base")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("size, least", [(None, 5 * MIB), ("4k", 0), ("64k", 0), ("16M", 5 * MIB)])
def test_convert_leaves_them_out(tmp_path, fmt, size, least):
    source, target = tmp_path / "source", tmp_path / "target"
    create(source, 16 * MIB, fmt="qcow2")
    qemu_io(source, "write -P 0 0 5M", "write -P 3 8M 64k")
    result = run_instar("convert", "-O", fmt, *(["-S", size] if size else []), source, target)
    assert result.rc == 0, str(result)
    assert support.content_hash(target, fmt) == support.content_hash(source)
    # A run of zeroes that is shorter than what is asked for stays data.
    assert least <= taken(target) - 64 * KIB and (least > 0 or taken(target) < MIB)


def test_convert_with_other_options(tmp_path):
    """A target with a backing file hides it with zeroes; in place they are written; all of it may be allocated."""
    expected = zeroes(tmp_path)
    for options in (["-B", "base", "-F", "qcow2"], ["-c"], ["--salvage"]):
        target = tmp_path / "target"
        result = run_instar("convert", "-O", "qcow2", "-S", "4k", *options, tmp_path / "top", target)
        assert result.rc == 0 and support.content_hash(target) == expected, str(result)
    create(tmp_path / "old", 16 * MIB, fmt="raw")
    qemu_io(tmp_path / "old", "write -P 9 0 16M", fmt="raw")
    assert run_instar("convert", "-n", "-S", "4k", "-O", "raw", tmp_path / "top", tmp_path / "old").rc == 0
    assert support.content_hash(tmp_path / "old", "raw") == expected
