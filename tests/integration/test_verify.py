"""`commit --verify`: what was written is read back, past the page cache, before the overlay changes.

The faults are real ones: a byte of the disk changes behind the program's back between the write and the look.
"""

from __future__ import annotations

import json
import os

import faults
import pytest
import qcow2_bytes
import support
from support import KIB, MIB, create, qemu_img, qemu_io, run, run_instar

SANDBOXES = ["kvm", "process"]
PAIRS = [("raw", "qcow2"), ("qcow2", "qcow2"), ("qcow", "qcow2"), ("vmdk", "qcow2"), ("vdi", "qcow2"), ("vpc", "qcow2"),
         ("vhdx", "qcow2"), ("parallels", "qcow2"), ("qcow2", "qcow"), ("vmdk", "vmdk")]


def pair(directory, base_fmt="raw", top_fmt="qcow2", size=8 * MIB, base_options=None):
    create(directory / "base", size, fmt=base_fmt, **(base_options or {}))
    qemu_io(directory / "base", "write -P 1 0 1M", "write -P 9 5M 1M", fmt=base_fmt)
    create(directory / "top", backing="base", backing_fmt=base_fmt, fmt=top_fmt, cwd=directory)
    qemu_io(directory / "top", "write -P 2 512k 1M", "write -P 3 3M 100k", "write -P 4 7M 64k", fmt=top_fmt)
    if top_fmt == "qcow2":
        qemu_io(directory / "top", "write -z 5M 200k", "write -c -P 7 4M 64k")
    return support.content_hash(directory / "top", top_fmt)


@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("base_fmt, top_fmt", PAIRS)
def test_what_is_right_is_found_right(tmp_path, base_fmt, top_fmt, sandbox):
    options = {"force_size": "on"} if base_fmt == "vpc" else None
    expected = pair(tmp_path, base_fmt, top_fmt, base_options=options)
    done = support.commit(tmp_path / "top", "--sandbox", sandbox, "--verify", "--output", "json").json
    assert done["verified_bytes"] == done["bytes_committed"] > 0 and done["overlay_clusters_cleared"] > 0
    assert support.content_hash(tmp_path / "base", base_fmt) == expected


@pytest.mark.parametrize("options", [["-t", "none"], ["-t", "directsync"], ["-t", "writethrough"], ["-r", "100M"], ["-d"],
                                     ["--wipe"], ["--delete-overlay"]], ids=" ".join)
def test_with_other_options(tmp_path, options):
    expected = pair(tmp_path)
    done = support.commit(tmp_path / "top", "--verify", "--output", "json", *options).json
    assert done["verified_bytes"] == done["bytes_committed"] > 0
    assert support.content_hash(tmp_path / "base", "raw") == expected


def test_a_base_that_grows_and_layers_of_all_kinds(tmp_path):
    """Encoded, zeroed and plain clusters of three layers, into smaller clusters, over a base that has a base itself."""
    create(tmp_path / "bottom", MIB, fmt="raw")
    qemu_io(tmp_path / "bottom", "write -P 88 0 1M", fmt="raw")
    create(tmp_path / "base", 4 * MIB, backing="bottom", backing_fmt="raw", cwd=tmp_path, cluster_size="4k")
    qemu_io(tmp_path / "base", "write -c -P 1 0 512k", "write -P 2 2M 300k")
    create(tmp_path / "mid", 9 * MIB, backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "mid", "write -c -P 3 64k 64k", "write -z 2M 128k", "write -P 4 6M 1M")
    create(tmp_path / "top", 9 * MIB, backing="mid", cwd=tmp_path, cluster_size="16k")
    qemu_io(tmp_path / "top", "write -c -P 5 6208k 16k", "write -P 6 8M 40k")
    expected = support.content_hash(tmp_path / "top")
    done = support.commit(tmp_path / "top", "-b", "base", "--resize-backing", "--verify", "--output", "json").json
    assert done["verified_bytes"] == done["bytes_committed"] > 0
    assert support.content_hash(tmp_path / "base") == expected


def test_nothing_and_several_extents(tmp_path):
    create(tmp_path / "base", 8 * MIB, fmt="vmdk", subformat="twoGbMaxExtentSparse")
    create(tmp_path / "top", backing="base", backing_fmt="vmdk", cwd=tmp_path)
    done = support.commit(tmp_path / "top", "--verify", "--output", "json").json
    assert (done["verified_bytes"], done["bytes_committed"]) == (0, 0)
    qemu_io(tmp_path / "top", "write -P 5 1M 3M")
    expected = support.content_hash(tmp_path / "top")
    done = support.commit(tmp_path / "top", "--verify", "--output", "json").json
    assert done["verified_bytes"] == 3 * MIB
    assert support.content_hash(tmp_path / "base", "vmdk") == expected


def error_of(result):
    """The error, before the injector's last line."""
    return support.error_of(result.stderr.splitlines(keepends=True)[0])


def place_of(path, guest_offset, fmt):
    """Where the bytes of a guest offset stand in a file."""
    if fmt == "raw":
        return guest_offset
    found = json.loads(qemu_img("map", "--output", "json", "-f", fmt, path).stdout)
    [run] = [run for run in found if run["start"] <= guest_offset < run["start"] + run["length"]]
    return run["offset"] + guest_offset - run["start"]


@pytest.mark.parametrize("sandbox", SANDBOXES)
@pytest.mark.parametrize("fmt, at", [
    *((fmt, at) for fmt in ("raw", "qcow2", "vmdk") for at in (512 * KIB, 4 * MIB + 5, 7 * MIB + 65535)),
    # Zeroes have bytes in a raw image only.
    ("raw", 5 * MIB + 70000)])
def test_a_byte_that_changes_on_the_disk_is_found(tmp_path, fmt, at, sandbox):
    expected = pair(tmp_path, fmt)
    top, base = tmp_path / "top", tmp_path / "base"
    # Where it will be, a commit into a copy says.
    trial = tmp_path / "trial"
    trial.mkdir()
    for image in (top, base):
        support.copy(image, trial / image.name)
    support.commit(trial / "top", "-d")
    place = place_of(trial / "base", at, fmt)
    before = support.digest(top)
    command = [support.instar_binary(), "commit", "--sandbox", sandbox, "--verify", "--ignore-siblings", "--output", "json", top]
    result = run(faults.injector(), f"FLIP@{place}", "1", "fadvise64", top, base, "--", *command)
    assert "inject: done" in result.stderr and result.rc == 1 and result.stdout == "", str(result)
    error = error_of(result)
    assert (error["name"], error["role"], error["step"], error["file"]) == ("ERROR_BACKING_IO", "backing", "verify", str(base))
    assert f"differs at guest offset {at};" in error["message"] and "the overlay still holds everything" in error["message"]
    assert support.digest(top) == before and support.content_hash(base, fmt) != expected
    # Without a fault the same command finishes it.
    again = run(*command)
    assert again.rc == 0 and support.content_hash(base, fmt) == expected, str(again)


def test_metadata_that_change_on_the_disk_are_found(tmp_path):
    """An entry of a mapping table that leads elsewhere: the target is read as whoever opens it next reads it."""
    expected = pair(tmp_path, "qcow2")
    top, base = tmp_path / "top", tmp_path / "base"
    before = support.digest(top)
    entry = qcow2_bytes.Image(base).l2_at(8)
    # The middle of the host offset in the entry of guest cluster 8, which is committed.
    command = [support.instar_binary(), "commit", "--verify", "--output", "json", top]
    result = run(faults.injector(), f"FLIP@{entry + 5}", "1", "fadvise64", top, base, "--", *command)
    assert "inject: done" in result.stderr and result.rc == 1, str(result)
    assert error_of(result)["step"] == "verify"
    assert support.digest(top) == before
    # It reads from its own clusters: the base is what is broken.
    assert support.content_hash(top) == expected


def test_a_disk_that_cannot_be_read_back(tmp_path):
    expected = pair(tmp_path)
    top, base = tmp_path / "top", tmp_path / "base"
    before = support.digest(top)
    command = [support.instar_binary(), "commit", "--verify", "--output", "json", top]
    # The reads of the base: the last of them are those of reading back.
    count = run(faults.injector(), "COUNT", "0", "pread64", base, "--", *command[:-1], "-d", top)
    assert count.rc == 0, str(count)
    nth = int(count.stderr.rsplit(" of pread64", 1)[0].rsplit("(", 1)[-1].rsplit(", ", 1)[-1])
    result = run(faults.injector(), "EIO", str(nth), "pread64", base, "--", *command)
    assert result.rc == 1, str(result)
    error = error_of(result)
    assert (error["name"], error["step"], error["errno"]) == ("ERROR_BACKING_IO", "verify", 5), str(result)
    assert "the overlay still holds everything" in error["message"]
    assert support.digest(top) == before
    assert run(*command).rc == 0 and support.content_hash(base, "raw") == expected


#: Mounts $1 and has the rest … work there.
ON_DISK = """
set -e
disk=$1 images=$2; shift 2
place=$(mktemp -d)
mount -o loop "$disk" "$place"
# In their places, if they are there: nothing moves on the disk.
for file in base top; do dd status=none conv=notrunc if="$images/$file" of="$place/$file"; done
sync
status=0
"$1" "$2" "$3" "$4" "$place/top" "$disk" "$place/base" -- "$5" commit $6 "$place/top" || status=$?
cmp "$place/top" "$images/top" && echo "overlay: as it was"
umount "$place"; rmdir "$place"
exit $status
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_the_disk_is_read_and_not_the_page_cache(tmp_path):
    """The disk below the file system changes: the page cache of the base still has what was written."""
    disk, images = tmp_path / "disk", tmp_path / "images"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    assert run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", disk).rc == 0
    images.mkdir()
    before, written = b"\x5c" * 4096, b"\x77" * 4096
    (images / "base").write_bytes(before * 256 + b"\x5d" * MIB)
    create(images / "top", backing="base", backing_fmt="raw", cwd=images)
    qemu_io(images / "top", "write -P 0x77 1M 4k")
    arguments = ["unshare", "--mount", "sh", "-c", ON_DISK, "sh", disk, images, faults.injector()]
    first = run(*arguments, "COUNT", "0", "none", support.instar_binary(), "-d")
    assert first.rc == 0, str(first)
    # Where it stands in the base.
    place = disk.read_bytes().find(before + written) + 4096
    assert place > 4096
    result = run(*arguments, f"FLIP@{place + 100}", "1", "fadvise64", support.instar_binary(), "--verify")
    assert "inject: done" in result.stderr and result.rc == 1, str(result)
    assert f"differs at guest offset {MIB + 100};" in result.stderr and "overlay: as it was" in result.stdout, str(result)


def test_what_is_told(tmp_path):
    expected = pair(tmp_path)
    top, base = tmp_path / "top", tmp_path / "base"
    with support.untouched(top, base):
        dry = run_instar("commit", "--verify", "--dry-run", top)
        told = run_instar("commit", "--verify", "--dry-run", "--output", "json", top).json
        unsafe = run_instar("commit", "--verify", "-t", "unsafe", top)
    assert "What is written would be read back. Nothing was changed." in dry.stdout
    assert (told["verified_bytes"], told["dry_run"]) == (0, True)
    assert unsafe.rc == 2 and "-t unsafe flushes nothing" in unsafe.stderr, str(unsafe)
    result = support.commit(top, "--verify", "--progress=json", "-v")
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    stages = list(dict.fromkeys(line["stage"] for line in lines if "stage" in line))
    assert stages == ["checking", "writing", "verifying", "emptying"], str(result)
    assert f" were read back from '{base}', and are right.\n" in result.stdout
    assert support.content_hash(base, "raw") == expected
