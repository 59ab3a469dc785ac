"""`commit --digest`: one SHA-256 of the disk before the commit, as the overlay's guest sees it, and afterwards, as the target shows
it. What is expected is hashed by other programs: qemu-img and hashlib.
"""

from __future__ import annotations

import hashlib
import json

import faults
import pytest
import support
from support import GIB, KIB, MIB, TIB, create, qemu_img, qemu_io, run, run_instar
from test_verify import PAIRS, error_of, pair, place_of

SANDBOXES = ["kvm", "process"]


def sha256_of(path, fmt, length=None):
    """The SHA-256 of a disk as qemu-img reads it."""
    raw = path.parent / (path.name + ".flat")
    qemu_img("convert", "-f", fmt, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return hashlib.sha256(data if length is None else data[:length].ljust(length, b"\0")).hexdigest()


@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("base_fmt, top_fmt", PAIRS)
def test_it_is_that_of_the_raw_disk(tmp_path, base_fmt, top_fmt, sandbox):
    pair(tmp_path, base_fmt, top_fmt, base_options={"force_size": "on"} if base_fmt == "vpc" else None)
    expected = sha256_of(tmp_path / "top", top_fmt)
    dry = support.commit(tmp_path / "top", "--sandbox", sandbox, "--digest", "--dry-run", "--output", "json").json
    assert dry["digest"] == {"algorithm": "sha256", "length": 8 * MIB, "before": expected, "after": None}
    done = support.commit(tmp_path / "top", "--sandbox", sandbox, "--digest", "--output", "json").json
    assert done["digest"] == {"algorithm": "sha256", "length": 8 * MIB, "before": expected, "after": expected}
    assert sha256_of(tmp_path / "base", base_fmt) == expected


@pytest.mark.parametrize("options", [["-t", "none"], ["-t", "directsync"], ["-r", "100M"], ["-d"], ["--wipe"], ["--delete-overlay"],
                                     ["--verify"], ["--atomic"], ["--atomic", "--verify"], ["--detect-zeroes"]], ids=" ".join)
def test_with_other_options(tmp_path, options):
    pair(tmp_path, "qcow2")
    expected = sha256_of(tmp_path / "top", "qcow2")
    done = support.commit(tmp_path / "top", "--digest", "--output", "json", *options).json
    assert done["digest"]["before"] == done["digest"]["after"] == expected == sha256_of(tmp_path / "base", "qcow2")


def test_layers_of_all_kinds_over_a_base_that_grows(tmp_path):
    create(tmp_path / "bottom", MIB, fmt="raw")
    qemu_io(tmp_path / "bottom", "write -P 88 0 1M", fmt="raw")
    create(tmp_path / "base", 4 * MIB, backing="bottom", backing_fmt="raw", cwd=tmp_path, cluster_size="4k")
    qemu_io(tmp_path / "base", "write -c -P 1 0 512k", "write -P 2 2M 300k")
    create(tmp_path / "mid", 9 * MIB, backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "mid", "write -c -P 3 64k 64k", "write -z 2M 128k", "write -P 4 6M 1M")
    create(tmp_path / "top", 9 * MIB + 512, backing="mid", cwd=tmp_path, cluster_size="16k")
    qemu_io(tmp_path / "top", "write -c -P 5 6208k 16k", "write -P 6 8M 40k")
    expected = sha256_of(tmp_path / "top", "qcow2")
    done = support.commit(tmp_path / "top", "-b", "base", "--resize-backing", "--digest", "--output", "json").json
    assert (done["digest"]["length"], done["digest"]["before"]) == (9 * MIB + 512, expected)
    assert done["digest"]["after"] == expected == sha256_of(tmp_path / "base", "qcow2")


@pytest.mark.parametrize("top_size, base_size", [(5 * MIB, 8 * MIB), (8 * MIB, 5 * MIB)])
def test_the_length_is_that_of_the_overlay(tmp_path, top_size, base_size):
    """A longer target has more behind it; a shorter one grows."""
    create(tmp_path / "base", base_size)
    qemu_io(tmp_path / "base", f"write -P 1 0 {base_size}")
    create(tmp_path / "top", top_size, backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "top", "write -P 2 1M 100k")
    expected = sha256_of(tmp_path / "top", "qcow2")
    done = support.commit(tmp_path / "top", "--digest", "--resize-backing", "--output", "json").json["digest"]
    assert (done["length"], done["before"], done["after"]) == (top_size, expected, expected)
    assert sha256_of(tmp_path / "base", "qcow2", top_size) == expected


def test_what_people_see(tmp_path):
    pair(tmp_path)
    expected = sha256_of(tmp_path / "top", "qcow2")
    dry = support.commit(tmp_path / "top", "--digest", "--dry-run").stdout
    assert f"SHA-256 of the disk, {8 * MIB} bytes (8 MiB): {expected}\n" in dry
    done = support.commit(tmp_path / "top", "--digest", "-p")
    assert f"SHA-256 of the disk, {8 * MIB} bytes (8 MiB), before and after: {expected}\n" in done.stdout
    assert done.stderr.count("instar: hashing the disk\n") == 2, done.stderr


def test_an_empty_overlay(tmp_path):
    create(tmp_path / "base", 8 * MIB)
    qemu_io(tmp_path / "base", "write -P 1 0 1M")
    create(tmp_path / "top", backing="base", cwd=tmp_path)
    done = support.commit(tmp_path / "top", "--digest", "--output", "json").json
    assert done["bytes_committed"] == 0
    assert done["digest"]["before"] == done["digest"]["after"] == sha256_of(tmp_path / "base", "qcow2")


@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("at", [512 * KIB, 200 * KIB, 5 * MIB - 1])
def test_a_byte_that_changes_on_the_disk_is_found(tmp_path, at, sandbox):
    """Also one of what was not committed: all of the disk is read again."""
    pair(tmp_path)
    top, base = tmp_path / "top", tmp_path / "base"
    before, expected = support.digest(top), sha256_of(top, "qcow2")
    command = [support.instar_binary(), "commit", "--sandbox", sandbox, "--digest", "--output", "json", top]
    result = run(faults.injector(), f"FLIP@{at}", "1", "fadvise64", top, base, "--", *command)
    assert "inject: done" in result.stderr and result.rc == 1 and result.stdout == "", str(result)
    error = error_of(result)
    assert (error["name"], error["role"], error["step"], error["file"]) == ("ERROR_BACKING_IO", "backing", "verify", str(base))
    assert expected in error["message"] and sha256_of(base, "raw") in error["message"]
    assert "the overlay still holds everything" in error["message"] and support.digest(top) == before


@pytest.mark.parametrize("option", ["--digest", "--verify"])
def test_an_atomic_target_is_given_back(tmp_path, option):
    """A difference is found before the target counts: it is what it was, and no log is left beside it."""
    pair(tmp_path)
    top, base = tmp_path / "top", tmp_path / "base"
    before = support.digest(top), support.digest(base)
    command = [support.instar_binary(), "commit", "--atomic", option, "--output", "json", top]
    dry = support.commit(top, "--atomic", "--dry-run", "--output", "json").json
    if dry["atomic"] == "clone":
        pytest.fail("the tests' directory is on a file system that shares extents: set TMPDIR to another")
    result = run(faults.injector(), f"FLIP@{512 * KIB}", "1", "fadvise64", top, base, "--", *command)
    assert "inject: done" in result.stderr and result.rc == 1, str(result)
    error = error_of(result)
    assert "the target is as it was, and the overlay reads as before" in error["message"], str(result)
    assert (support.digest(top), support.digest(base)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "top"]


def test_nothing_is_hashed_for_hours(tmp_path):
    """Some kilobytes that claim 64 TiB."""
    create(tmp_path / "base", 63 * TIB, cluster_size="2M")
    create(tmp_path / "top", backing="base", cwd=tmp_path, cluster_size="2M")
    before = [support.digest(path) for path in (tmp_path / "base", tmp_path / "top")]
    result = run_instar("commit", "--digest", "--output", "json", tmp_path / "top")
    error = support.error_of(result.stderr)
    assert result.rc == 1 and error["name"] == "ERROR_UNSUPPORTED_FORMAT" and "leave out --digest" in error["message"], str(result)
    assert [support.digest(path) for path in (tmp_path / "base", tmp_path / "top")] == before
    # Without it, nothing is in the way.
    assert run_instar("commit", "-q", tmp_path / "top").rc == 0


def test_zeroes_are_not_read(tmp_path):
    create(tmp_path / "base", 4 * GIB, fmt="raw")
    create(tmp_path / "top", backing="base", backing_fmt="raw", cwd=tmp_path)
    qemu_io(tmp_path / "top", "write -P 5 2G 64k")
    counted = run(faults.injector(), "COUNT", "0", "pread64", tmp_path / "base", "--", support.instar_binary(), "commit", "--digest",
                  "--dry-run", "--output", "json", tmp_path / "top")
    assert counted.rc == 0, str(counted)
    reads = int(counted.stderr.rsplit(" of pread64", 1)[0].rsplit("(", 1)[-1].rsplit(", ", 1)[-1])
    assert reads < 100, counted.stderr
    hashed = hashlib.sha256()
    for index in range(4096):
        hashed.update(b"\5" * 65536 + bytes(MIB - 65536) if index == 2048 else bytes(MIB))
    [line] = [line for line in counted.stdout.splitlines() if '"before"' in line]
    assert json.loads("{" + line.rstrip(",") + "}")["before"] == hashed.hexdigest()


def test_unsafe_is_refused(tmp_path):
    pair(tmp_path)
    result = run_instar("commit", "--digest", "-t", "unsafe", tmp_path / "top")
    assert result.rc == 2 and "leave out" not in result.stdout and "-t unsafe flushes nothing" in result.stderr, str(result)
