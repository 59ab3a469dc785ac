"""`instar commit --atomic` and `instar recover`: the target is what it was, or what it should be."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import atomic_faults
import faults
import pytest
import support
import vhdx_bytes
from support import KIB, MIB

CAMPAIGN = support.REPO / "tests/campaigns/atomic.py"
WAYS = {"ext4": "undo-log", "xfs": "clone", "btrfs": "clone"}
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


@pytest.fixture(scope="module")
def mounts(tmp_path_factory):
    """A directory on each file system."""
    if os.geteuid() != 0:
        pytest.skip("mounting file systems takes root")
    place = tmp_path_factory.mktemp("mounts")
    mounted = []
    try:
        for name, make in MAKE.items():
            with open(place / f"{name}.img", "wb") as file:
                file.truncate(512 * MIB)
            subprocess.run([*make, place / f"{name}.img"], check=True, capture_output=True)
            (place / name).mkdir()
            subprocess.run(["mount", "-o", "loop", place / f"{name}.img", place / name], check=True)
            mounted.append(place / name)
        yield place
    finally:
        for directory in mounted:
            subprocess.run(["umount", directory], check=False)


class Place:
    """A base and an overlay in an empty directory of a file system."""

    def __init__(self, directory, way):
        self.dir, self.way = directory, way
        self.base, self.top = directory / "base", directory / "top"
        self.log = directory / ".base.instar-undo"

    def make(self, fmt="qcow2", base_fmt="qcow2", size=8 * MIB):
        support.create(self.base, size, fmt=base_fmt, **({"force_size": "on"} if base_fmt == "vpc" else {}))
        support.qemu_io(self.base, "write -P 7 0 2M", "write -P 8 5M 512k", fmt=base_fmt)
        support.create(self.top, size, backing="base", backing_fmt=base_fmt, fmt=fmt)
        support.qemu_io(self.top, "write -P 9 1M 300k", "write -P 5 3M 1M", "write -P 6 5200k 64k", fmt=fmt)
        self.base_fmt, self.fmt = base_fmt, fmt
        self.before, self.expected = support.digest(self.base), support.content_hash(self.top, fmt)
        return self

    def commit(self, *options):
        return support.run_instar("commit", "--atomic", *options, self.top)

    def names(self):
        return sorted(path.name for path in self.dir.iterdir())

    def is_old(self):
        return support.digest(self.base) == self.before

    def check_new(self):
        assert support.content_hash(self.base, self.base_fmt) == self.expected
        assert support.content_hash(self.top, self.fmt) == self.expected
        if self.base_fmt == "qcow2":
            support.assert_clean(self.base)

    def crash(self, call="unlinkat", nth=1):
        """End a commit before one of its calls."""
        killed = support.run(faults.injector(), "KILL", str(nth), call, self.dir, "--", support.instar_binary(), "commit",
                             "--atomic", self.top)
        assert killed.rc == 137, str(killed)

    def crash_within(self):
        """Leave a target that was changed, and its log."""
        self.crash("fdatasync", 3)
        assert self.log.exists() and not self.is_old()
        return self


@pytest.fixture(params=WAYS)
def place(request, mounts):
    directory = mounts / request.param / "images"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return Place(directory, WAYS[request.param])


@pytest.fixture
def undo(mounts):
    directory = mounts / "ext4" / "images"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return Place(directory, "undo-log")


@pytest.fixture(params=["xfs", "btrfs"])
def clone(request, mounts):
    directory = mounts / request.param / "images"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return Place(directory, "clone")


@pytest.mark.parametrize("sandbox", support.SANDBOXES)
def test_a_commit(place, sandbox):
    place.make()
    dry = place.commit("--sandbox", sandbox, "--dry-run", "--output", "json")
    assert dry.rc == 0 and dry.json["atomic"] == place.way and place.is_old() and place.names() == ["base", "top"], str(dry)
    said = place.commit("--sandbox", sandbox, "--dry-run").stdout
    assert ("A clone of it would take its place" in said) == (place.way == "clone")
    assert ("An undo log beside it would keep" in said) == (place.way == "undo-log")
    result = place.commit("--sandbox", sandbox, "--output", "json")
    assert result.rc == 0 and result.json["atomic"] == place.way and "backup" not in result.json, str(result)
    place.check_new()
    assert place.names() == ["base", "top"] and support.holds_no_clusters(place.top)
    # Nothing more to commit.
    inode = place.base.stat().st_ino
    assert place.commit().rc == 0 and place.base.stat().st_ino == inode


@pytest.mark.parametrize("fmt, base_fmt", [("qcow2", "raw"), ("vmdk", "vmdk"), ("qcow2", "vpc"), ("qcow2", "vhdx"), ("qcow2", "vdi")])
def test_formats(place, fmt, base_fmt):
    place.make(fmt, base_fmt)
    result = place.commit()
    assert result.rc == 0, str(result)
    place.check_new()
    assert place.names() == ["base", "top"]


@pytest.mark.parametrize("fmt", ["vmdk", "vhdx", "vpc", "vdi"])
@pytest.mark.parametrize("call, nth", [("linkat", 1), ("renameat", 1), ("fsync", 2), ("ftruncate", 1), ("fdatasync", 5)])
def test_identities_survive_a_crash(place, fmt, call, nth):
    """A child of a format that records the identity of its parent: an interrupted commit can be run again."""
    support.create(place.base, 8 * MIB, fmt=fmt)
    support.qemu_io(place.base, "write -P 7 0 2M", fmt=fmt)
    made = support.run_instar("create", "-f", fmt, "-b", "base", "-F", fmt, place.top, cwd=place.dir)
    if made.rc != 0:
        pytest.skip(made.stderr)
    # It gets data by a commit of what is above it.
    data = place.dir / "data"
    support.create(data, 8 * MIB)
    support.qemu_io(data, "write -P 3 1M 3M")
    support.qemu_img("rebase", "-u", "-b", "top", "-F", fmt, data)
    filled = support.run_instar("commit", data)
    assert filled.rc == 0, str(filled)
    data.unlink()
    before = support.digest(place.base)
    killed = support.run(faults.injector(), "KILL", str(nth), call, place.dir, "--", support.instar_binary(), "commit",
                         "--atomic", place.top)
    if killed.rc != 137:
        # Nothing is renamed for a log, and nothing is cut for a clone.
        assert killed.rc == 0 and (call, place.way) in (("renameat", "undo-log"), ("ftruncate", "clone")), str(killed)
        return
    restores = place.log.exists() and place.log.stat().st_size > 0
    if place.log.exists():
        # The overlay has the identity that its parent was about to get: that was recorded before the log said what the overlay is.
        recovered = support.run_instar("recover", place.base)
        assert recovered.rc == 0, str(recovered)
    if place.way == "undo-log" and call == "ftruncate":
        assert restores, "the log was to be whole"
    if restores or call in ("linkat", "renameat", "fsync"):
        assert (support.digest(place.base) == before) == (call != "fsync" or place.way == "undo-log")
    again = place.commit()
    assert again.rc == 0, str(again)
    flat = place.dir / "flat"
    assert support.run_instar("convert", "-O", "raw", place.top, flat).rc == 0
    assert flat.read_bytes()[MIB:4 * MIB] == b"\x03" * (3 * MIB) and flat.read_bytes()[:MIB] == b"\x07" * MIB
    assert support.run_instar("check", "-f", fmt, place.base).rc == 0


def test_what_belongs_to_the_target_is_kept(place):
    place.make()
    os.chown(place.base, 1234, 4321)
    os.chmod(place.base, 0o640)
    os.setxattr(place.base, "user.note", b"a value\0with bytes")
    # system.posix_acl_access, as acl(5) lays it out: user::rw-, user:77:r--, group::r--, mask::r--, other::---
    entries = [(1, 6, 0xFFFFFFFF), (2, 4, 77), (4, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + perm.to_bytes(2, "little") + who.to_bytes(4, "little") for tag, perm, who in entries)
    os.setxattr(place.base, "system.posix_acl_access", acl)
    # What the directory would give to new files does not come with it.
    os.setxattr(place.dir, "system.posix_acl_default", acl)
    looks = lambda: (place.base.stat().st_uid, place.base.stat().st_gid, place.base.stat().st_mode,
                     {name: os.getxattr(place.base, name) for name in sorted(os.listxattr(place.base))})
    before, inode = looks(), place.base.stat().st_ino
    result = place.commit()
    assert result.rc == 0, str(result)
    assert looks() == before and (place.base.stat().st_ino != inode) == (place.way == "clone")
    place.check_new()


def test_no_default_of_the_directory_comes_with_a_clone(clone):
    clone.make()
    acl = bytes.fromhex("02000000" "01000600ffffffff" "020006004d000000" "04000400ffffffff" "10000600ffffffff" "20000400ffffffff")
    os.setxattr(clone.dir, "system.posix_acl_default", acl)
    mode = clone.base.stat().st_mode
    assert clone.commit().rc == 0
    assert os.listxattr(clone.base) == [] and clone.base.stat().st_mode == mode


def test_a_backup(clone):
    clone.make()
    result = clone.commit("--keep-backup", "base.before", "--output", "json")
    assert result.rc == 0 and result.json["backup"] == str(clone.dir / "base.before"), str(result)
    assert support.digest(clone.dir / "base.before") == clone.before and clone.names() == ["base", "base.before", "top"]
    clone.check_new()
    # Who did not see the end asks again: there is nothing left to commit, and the backup is that of this commit.
    again = clone.commit("--keep-backup", "base.before", "--output", "json")
    assert again.rc == 0 and again.json["bytes_committed"] == 0 and again.json["backup"] == str(clone.dir / "base.before"), str(again)
    assert support.digest(clone.dir / "base.before") == clone.before and clone.names() == ["base", "base.before", "top"]
    # Another commit of the same overlay has another backup.
    support.qemu_io(clone.top, "write -P 1 0 64k")
    for name, mention in (("base.before", "exists"), ("a/b", "without a slash"), ("..", "without a slash"), ("base", "exists"), ("", "")):
        refused = clone.commit("--keep-backup", name)
        assert refused.rc != 0 and mention in refused.stderr, str(refused)
    assert support.run_instar("commit", "--keep-backup", "x", clone.top).rc == 2


def test_a_backup_that_an_interrupted_run_left(clone):
    clone.make()
    command = [support.instar_binary(), "commit", "--atomic", "--keep-backup", "old", clone.top]
    killed = support.run(faults.injector(), "KILL", "2", "linkat", clone.dir, "--", *command)
    assert killed.rc == 137 and clone.is_old() and (clone.dir / "old").samefile(clone.base), str(killed)
    refused = clone.commit()
    assert refused.rc == 1 and "has 2 names" in refused.stderr, str(refused)
    again = support.run(*command)
    assert again.rc == 0 and support.digest(clone.dir / "old") == clone.before, str(again)
    clone.check_new()


@pytest.mark.parametrize("options", [[], ["-d"], ["--delete-overlay"]], ids=" ".join)
def test_a_backup_of_a_run_that_ended_behind_the_rename(clone, options):
    """The target is the new one, and the overlay what it was: the file of that name is what the target was before."""
    clone.make()
    old = clone.dir / "old"
    command = [support.instar_binary(), "commit", "--atomic", *options, "--keep-backup", "old", "--output", "json", clone.top]
    # The flush of the directory that follows on the rename, again and again.
    for _ in range(3):
        support.run(faults.injector(), "KILL", "1", "renameat", clone.dir, "--", *command)
        killed = support.run(faults.injector(), "KILL", "3", "fsync", clone.dir, "--", *command)
        assert killed.rc == 137 and support.digest(old) == clone.before and not clone.is_old(), str(killed)
        for path in clone.dir.glob(".base.instar-*"):
            path.unlink()
        # Another overlay asks for another name, and so does whoever asks for no name that is known.
        support.create(clone.dir / "other", backing="base", cwd=clone.dir)
        other = support.run_instar("commit", "--atomic", "--ignore-siblings", "--keep-backup", "old", clone.dir / "other")
        assert other.rc == 1 and "exists" in other.stderr, str(other)
        (clone.dir / "other").unlink()
    again = support.run(*command)
    assert again.rc == 0 and json.loads(again.stdout)["backup"] == str(old), str(again)
    assert support.digest(old) == clone.before and os.listxattr(clone.base) == []
    assert b"ended" in os.getxattr(old, "user.instar.replaced-by")
    assert support.content_hash(clone.base) == clone.expected
    if "--delete-overlay" not in options:
        once_more = support.run(*command)
        assert once_more.rc == 0 and support.digest(old) == clone.before, str(once_more)
        assert support.content_hash(clone.base) == clone.expected
        # An overlay that keeps its content would be committed once more, into a target that was written to since.
        support.qemu_io(clone.base, "write -P 99 0 64k")
        written = support.digest(clone.base)
        last = support.run(*command)
        assert last.rc == (1 if options else 0) and ("exists" in last.stderr) == bool(options), str(last)
        assert support.digest(clone.base) == written and support.digest(old) == clone.before


@pytest.mark.parametrize("options", [[], ["--wipe"], ["-d"]], ids=" ".join)
def test_a_backup_of_a_run_that_was_killed_at_its_very_end(clone, options):
    """Killed before each call that is the last but one, two …: the same command ends well, whatever was done by then."""
    clone.make()
    command = [support.instar_binary(), "commit", "--atomic", *options, "--keep-backup", "old", "--output", "json", clone.top]
    pristine = {path: path.read_bytes() for path in (clone.base, clone.top)}
    counted = support.run(faults.injector(), "COUNT", "0", "none", clone.dir, "--", *command)
    found = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", counted.stderr)}
    assert found["fsync"] >= 4, str(counted)
    for call in ("fsync", "fdatasync", "ftruncate", "fsetxattr"):
        for nth in range(max(1, found.get(call, 0) - 2), found.get(call, 0) + 1):
            for path in clone.dir.iterdir():
                path.unlink()
            for path, data in pristine.items():
                path.write_bytes(data)
            killed = support.run(faults.injector(), "KILL", str(nth), call, clone.dir, "--", *command)
            assert killed.rc == 137, str(killed)
            again = support.run(*command)
            assert again.rc == 0, f"{call} {nth}: {again}"
            assert support.digest(clone.dir / "old") == clone.before
            clone.check_new()


def test_a_backup_of_somebody_else_is_not_believed(clone):
    """A stranger can say of a file of their own what an old target says; only its owner and mode show whose it is."""
    clone.make()
    command = [support.instar_binary(), "commit", "--atomic", "--keep-backup", "old", clone.top]
    killed = support.run(faults.injector(), "KILL", "4", "fsync", clone.dir, "--", *command)
    assert killed.rc == 137 and not clone.is_old(), str(killed)
    old = clone.dir / "old"
    mark = os.getxattr(old, "user.instar.replaced-by")
    old.rename(clone.dir / "real")
    old.write_bytes(b"a stranger's")
    os.setxattr(old, "user.instar.replaced-by", mark)
    for owner, mode in ((65534, clone.base.stat().st_mode), (0, 0o666)):
        os.chown(old, owner, owner)
        old.chmod(mode & 0o7777)
        refused = support.run(*command)
        assert refused.rc == 1 and "exists" in refused.stderr, str(refused)
    old.unlink()
    (clone.dir / "real").rename(old)
    assert support.run(*command).rc == 0 and support.digest(old) == clone.before


def test_a_backup_is_not_taken_for_that_of_another_commit(clone):
    """After the crash the overlay was written to, or the target replaced: what the file says is not true of them."""
    clone.make()
    command = [support.instar_binary(), "commit", "--atomic", "--keep-backup", "old", clone.top]
    killed = support.run(faults.injector(), "KILL", "4", "fsync", clone.dir, "--", *command)
    assert killed.rc == 137 and not clone.is_old() and os.listxattr(clone.dir / "old"), str(killed)
    shutil.copyfile(clone.base, clone.dir / "copied")
    os.rename(clone.dir / "copied", clone.base)
    refused = support.run(*command)
    assert refused.rc == 1 and "exists" in refused.stderr, str(refused)


def test_no_backup_without_a_clone(undo):
    undo.make()
    refused = undo.commit("--keep-backup", "old")
    assert refused.rc == 1 and "leave out --keep-backup" in refused.stderr and undo.is_old() and undo.names() == ["base", "top"]


def test_what_is_refused(place):
    place.make()
    os.link(place.base, place.dir / "other")
    for options in ([], ["--dry-run"]):
        refused = place.commit(*options)
        assert refused.rc == 1 and "has 2 names (hard links)" in refused.stderr and "find -samefile" in refused.stderr, str(refused)
    (place.dir / "other").unlink()
    refused = place.commit("-t", "unsafe")
    assert refused.rc == 2 and "-t unsafe" in refused.stderr, str(refused)
    assert place.is_old()
    several = place.dir / "several"
    several.mkdir()
    support.create(several / "base", MIB, fmt="vmdk", subformat="twoGbMaxExtentFlat")
    support.create(several / "top", backing="base", backing_fmt="vmdk", fmt="vmdk", cwd=several)
    support.qemu_io(several / "top", "write 0 64k", fmt="vmdk")
    refused = support.run_instar("commit", "--atomic", several / "top")
    assert refused.rc == 1 and "in several files" in refused.stderr, str(refused)


@pytest.mark.parametrize("options", [["-d"], ["--wipe"], ["-t", "none"], ["-t", "directsync"], ["-t", "writethrough"], ["--bitmaps"]])
def test_other_options(place, options):
    place.make()
    result = place.commit(*options)
    assert result.rc == 0, str(result)
    place.check_new()
    assert place.names() == ["base", "top"]


def test_several_layers_a_larger_overlay_and_children(place):
    support.create(place.base, 2 * MIB)
    support.qemu_io(place.base, "write -P 1 0 1M")
    middle, child = place.dir / "middle", place.dir / "child"
    support.create(middle, 3 * MIB, backing="base")
    support.qemu_io(middle, "write -P 2 512k 1M")
    support.create(place.top, 5 * MIB, backing="middle")
    support.qemu_io(place.top, "write -P 3 1M 64k", "write -P 4 4M 512k")
    support.create(child, 5 * MIB, backing="top")
    expected = support.content_hash(place.top)
    result = place.commit("-b", "base", "--resize-backing", "--relink", child)
    assert result.rc == 0, str(result)
    for image in (place.base, place.top, child):
        assert support.content_hash(image) == expected
    assert support.info(child)["backing-filename"] == "base"


def test_a_link_is_followed_and_stays(place):
    place.make()
    elsewhere = place.dir / "elsewhere"
    elsewhere.mkdir()
    place.base.rename(elsewhere / "real")
    place.base.symlink_to("elsewhere/real")
    for options in (["-b", place.base], []):
        result = place.commit("-d", *options)
        assert result.rc == 0 and place.base.is_symlink(), str(result)
        place.check_new()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["real"]


# --- the undo log ---------------------------------------------------------------------------------


def test_no_command_takes_a_target_that_was_left(undo):
    undo.make().crash_within()
    left = support.digest(undo.base)
    for command in (["info", undo.base], ["info", "--backing-chain", undo.top], ["check", undo.base], ["check", undo.top],
                    ["rebase", "-u", "-b", "base", "-F", "qcow2", undo.top], ["resize", undo.top, "+1M"], ["check", "-r", "all", undo.base],
                    ["map", undo.top], ["compare", undo.base, undo.top], ["convert", "-O", "raw", undo.top, undo.dir / "new"],
                    ["convert", "-O", "raw", undo.top, undo.base], ["rebase", "-b", "", undo.top], ["resize", undo.base, "+1M"],
                    ["measure", "-O", "qcow2", undo.base], ["measure", "--commit", undo.top], ["commit", undo.top],
                    ["commit", "--atomic", undo.top], ["commit", "--dry-run", undo.top]):
        refused = support.run_instar(*command)
        line = refused.stderr.splitlines()[-1]
        assert refused.rc != 0 and "instar recover" in line and line.endswith("(ERROR_RECOVERY_NEEDED)"), str(refused)
    # An overlay by itself is what it was, and what is said of it says what its backing file needs.
    [note] = support.run_instar("info", "--output", "json", undo.top).json["notes"]
    assert note.startswith("its backing file has an undo log beside it") and f"`instar recover '{undo.base}'`" in note, note
    assert support.digest(undo.base) == left
    os.symlink(undo.base, undo.dir / "link")
    assert "instar recover" in support.run_instar("info", undo.dir / "link").stderr
    result = support.run_instar("recover", "--output", "json", undo.dir / "link")
    assert result.rc == 0 and result.json["restored"] and result.json["length"] == undo.before[0], str(result)
    assert undo.is_old() and not undo.log.exists()
    nothing = support.run_instar("recover", undo.base)
    assert nothing.rc == 0 and "nothing to recover" in nothing.stdout
    assert undo.commit().rc == 0
    undo.check_new()


def test_a_target_that_was_cut_and_lengthened(undo):
    undo.make("qcow2", "raw", size=6 * MIB)
    os.truncate(undo.base, 5 * MIB)
    support.qemu_img("rebase", "-u", "-b", "base", "-F", "raw", undo.top)
    undo.before = support.digest(undo.base)
    killed = support.run(faults.injector(), "KILL", "2", "ftruncate", undo.dir, "--", support.instar_binary(), "commit", "--atomic",
                         "--resize-backing", undo.top)
    assert killed.rc == 137 and undo.log.exists() and not undo.is_old(), str(killed)
    assert support.run_instar("recover", undo.base).rc == 0 and undo.is_old()


@pytest.mark.parametrize("call", ["pwrite64", "fallocate", "ftruncate", "fdatasync", "fsync", "unlinkat"])
def test_recovery_can_be_interrupted_anywhere(undo, call):
    undo.make().crash_within()
    copies = (support.copy(undo.base, undo.dir.parent / "base.left"), support.copy(undo.log, undo.dir.parent / "log.left"))
    for nth in range(1, 100):
        # In place: a copy would be another file.
        for copy, file in zip(copies, (undo.base, undo.log)):
            if not file.exists():
                file.touch(0o600)
            file.write_bytes(copy.read_bytes())
        killed = support.run(faults.injector(), "KILL", str(nth), call, undo.dir, "--", support.instar_binary(), "recover", undo.base)
        if killed.rc != 137:
            assert killed.rc == 0 and undo.is_old(), str(killed)
            break
        if undo.log.exists():
            assert support.run_instar("recover", undo.base).rc == 0
        assert undo.is_old() and not undo.log.exists(), str(killed)
    assert nth > 1 or call == "fallocate"


def test_a_full_disk_leaves_the_target_as_it_was(place):
    """What cannot be kept is not changed, and what cannot be written is undone."""
    place.make()
    counted = support.run(faults.injector(), "COUNT", "0", "none", place.dir, "--", support.instar_binary(), "commit", "--atomic",
                          "--dry-run", place.top)
    assert counted.rc == 0, str(counted)
    calls = {}
    for call in ("pwrite64", "pwritev", "copy_file_range", "fdatasync", "fsync", "linkat", "renameat", "ftruncate"):
        for errno in ("ENOSPC", "EIO"):
            for nth in range(1, 40):
                result = support.run(faults.injector(), errno, str(nth), call, place.dir, "--", support.instar_binary(), "commit",
                                     "--atomic", place.top)
                if "inject: done" not in result.stderr:
                    assert result.rc == 0, str(result)
                    break
                calls[call] = nth
                if place.log.exists():
                    assert "instar recover" in result.stderr, str(result)
                    assert support.run_instar("recover", place.base).rc == 0
                if result.rc == 0:
                    break
                content = support.content_hash(place.base)
                assert place.is_old() or content == place.expected, str(result)
                assert support.content_hash(place.top) == place.expected
                assert [name for name in place.names() if name not in ("base", "top")] == [], str(result)
            place.dir.rename(place.dir.with_name("done"))
            shutil.rmtree(place.dir.with_name("done"))
            place.dir.mkdir()
            place.make()
    assert {"fdatasync", "linkat"} <= calls.keys()


def test_an_overlay_that_cannot_be_flushed_is_not_committed(undo):
    """The log says what the overlay is, and a power loss must not leave an older one."""
    undo.make()
    failed = support.run(faults.injector(), "EIO", "1", "fsync", undo.dir, "--", support.instar_binary(), "commit", "--atomic", undo.top)
    assert failed.rc == 1 and f"'{undo.top}': cannot be flushed" in failed.stderr and "ERROR_OVERLAY_IO" in failed.stderr, str(failed)
    assert undo.is_old() and undo.names() == ["base", "top"]
    assert undo.commit().rc == 0
    undo.check_new()


def test_a_signal_leaves_the_target_as_it_was(place):
    place.make("qcow2", "raw", size=64 * MIB)
    support.qemu_io(place.top, "write -P 4 0 60M")
    process = subprocess.Popen([support.instar_binary(), "commit", "--atomic", "-r", "8M", place.top], stderr=subprocess.PIPE, text=True)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "the target is as it was" in said, said
    assert place.is_old() and place.names() == ["base", "top"]


def forge(place, change):
    """A log as an interrupted commit leaves it, changed; and what the target was left as."""
    place.make().crash_within()
    left = support.digest(place.base)
    change(place.log)
    result = support.run_instar("recover", place.base)
    assert result.rc == 1 and support.digest(place.base) == left, str(result)
    # Whatever it is, the target is not taken.
    assert "ERROR_RECOVERY_NEEDED" in support.run_instar("info", place.base).stderr
    return result.stderr


def replace(log, make):
    log.rename(log.with_name("kept"))
    make(log)


def as_if_by_another(log):
    os.chown(log, 1000, 1000)


@pytest.mark.parametrize("change, mention", [
    (as_if_by_another, "belongs neither to"),
    (lambda log: log.chmod(0o622), "can be written to by others"),
    (lambda log: os.link(log, log.with_name("second")), "several names"),
    (lambda log: replace(log, lambda path: path.symlink_to("kept")), "no regular file"),
    (lambda log: replace(log, os.mkfifo), "no regular file"),
    (lambda log: replace(log, os.mkdir), "no regular file"),
    (lambda log: log.write_bytes(b"x"), "too short"),
    (lambda log: log.write_bytes(bytes(8192)), "does not begin as"),
])
def test_logs_that_do_not_count(undo, change, mention):
    assert mention in forge(undo, change)


def test_a_log_that_is_damaged(undo):
    """One bit of any part that was made durable before others: refused, and the target untouched."""
    undo.make().crash_within()
    good, left = undo.log.read_bytes(), support.digest(undo.base)
    batches = [at for at in range(4096, len(good), 512) if good[at:at + 8] == b"undo rec"]
    last = int.from_bytes(good[batches[-1] + 32:batches[-1] + 40], "little")
    durable = [at for at in batches if int.from_bytes(good[at + 24:at + 32], "little") < last] or batches[:1]
    for at in (100, 4090, *(at + more for at in durable[:8] for more in (0, 41, 300, 520))):
        if at >= len(good):
            continue
        undo.log.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:])
        result = support.run_instar("recover", undo.base)
        assert result.rc == 1 and "no sound undo log" in result.stderr, f"{at}: {result}"
        assert support.digest(undo.base) == left
    # Nothing was changed under a tail that is torn: here it was, and so the target keeps that.
    undo.log.write_bytes(good + b"undo rec" + bytes(100))
    assert support.run_instar("recover", undo.base).rc == 0 and undo.is_old()


def test_a_log_of_another_file(undo):
    """A copy, a file that took the place of the target, and another name."""
    undo.make().crash_within()
    other = support.copy(undo.base, undo.dir / "other")
    shutil.copyfile(undo.log, undo.dir / ".other.instar-undo")
    os.chmod(undo.dir / ".other.instar-undo", 0o600)
    left = support.digest(other)
    refused = support.run_instar("recover", other)
    assert refused.rc == 1 and "of another file" in refused.stderr and support.digest(other) == left, str(refused)
    os.rename(other, undo.base)
    refused = support.run_instar("recover", undo.base)
    assert refused.rc == 1 and "of another file" in refused.stderr and support.digest(undo.base) == left, str(refused)


def forged_length(log, length):
    """The log, with another length of the target, and the right sum."""
    data = bytearray(log.read_bytes())
    data[40:48] = struct.pack("<Q", length)
    data[4092:4096] = struct.pack("<I", vhdx_bytes.crc32c(data[:4092]))
    log.write_bytes(data)


@pytest.mark.parametrize("length", [1 << 43, (1 << 63) - 1, 64 * MIB])
def test_a_length_that_the_target_never_had_costs_nothing(undo, length):
    taken = []
    mention = forge(undo, lambda log: (forged_length(log, length), taken.append(undo.base.stat().st_blocks)))
    assert f"of a file of {length} bytes (" in mention
    assert undo.base.stat().st_size < 64 * MIB and undo.base.stat().st_blocks == taken[0]


def test_a_target_that_was_restored_and_is_shorter(undo):
    """Over the same file, as `cp` does it: nothing is written into it."""
    undo.make().crash_within()
    backup = undo.dir.parent / "backup"
    support.create(backup, MIB)
    shutil.copyfile(backup, undo.base)
    left = support.digest(undo.base)
    refused = support.run_instar("recover", undo.base)
    assert refused.rc == 1 and "restored or made anew" in refused.stderr and support.digest(undo.base) == left, str(refused)
    backup.unlink()


# --- how much room the log takes ------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "parallels", "qcow"])
def test_the_room_of_the_log_is_counted(undo, fmt):
    """A log file that is as full as it gets is never larger than what was said before."""
    undo.make("qcow2", fmt)
    said = undo.commit("--dry-run", "--output", "json").json
    measured = support.run_instar("measure", "--commit", "--atomic", "--output", "json", undo.top).json
    text = support.run_instar("measure", "--commit", "--atomic", undo.top).stdout
    assert said["undo_log_bytes"] == measured["undo-log"] > 0 and said["atomic"] == measured["atomic"] == "undo-log"
    assert f"undo log: {measured['undo-log']} bytes (" in text
    assert f"and take {said['undo_log_bytes']} bytes (" in undo.commit("--dry-run").stdout
    # It is whole when it is about to be cut, which is the last of these calls.
    longest = 0
    for nth in itertools.count(1):
        killed = support.run(faults.injector(), "KILL", str(nth), "ftruncate", undo.dir, "--", support.instar_binary(), "commit",
                             "--atomic", undo.top)
        if killed.rc == 0:
            break
        assert killed.rc == 137, str(killed)
        if undo.log.exists():
            longest = max(longest, undo.log.stat().st_size, undo.log.stat().st_blocks * 512)
            assert support.run_instar("recover", undo.base).rc == 0
    assert 4096 < longest <= said["undo_log_bytes"], (longest, said)
    undo.check_new()


def test_a_clone_has_no_log(clone):
    clone.make()
    measured = support.run_instar("measure", "--commit", "--atomic", "--output", "json", clone.top).json
    assert measured["atomic"] == "clone" and "undo-log" not in measured and measured["additional-space"] >= 1300 * KIB
    assert "undo_log_bytes" not in clone.commit("--dry-run", "--output", "json").json


def test_no_room_is_needed_for_nothing(undo):
    support.create(undo.base, 8 * MIB)
    support.create(undo.top, backing="base", cwd=undo.dir)
    assert support.run_instar("measure", "--commit", "--atomic", "--output", "json", undo.top).json["undo-log"] < MIB
    refused = support.run_instar("measure", "--atomic", undo.top)
    assert refused.rc == 2, str(refused)


def test_a_log_that_is_put_back_after_the_commit_undoes_nothing(undo):
    undo.make()
    stopped = subprocess.Popen([support.instar_binary(), "commit", "--atomic", "-r", "1M", undo.top], stderr=subprocess.PIPE)
    while not undo.log.exists():
        time.sleep(0.01)
        assert stopped.poll() is None
    undo.log.rename(undo.dir / "stolen")
    stopped.wait(timeout=60)
    done = support.digest(undo.base)
    assert stopped.returncode == 0 and (undo.dir / "stolen").stat().st_size == 0
    (undo.dir / "stolen").rename(undo.log)
    assert support.run_instar("recover", undo.base).rc == 0 and support.digest(undo.base) == done
    undo.check_new()


def test_a_target_in_use_is_not_recovered(undo):
    undo.make().crash_within()
    left = support.digest(undo.base)
    with subprocess.Popen(["qemu-io", "-f", "raw", undo.base], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as user:
        time.sleep(0.5)
        refused = support.run_instar("recover", undo.base)
        user.stdin.close()
        user.wait(timeout=10)
    assert refused.rc == 1 and "ERROR_IMAGE_IN_USE" in refused.stderr and support.digest(undo.base) == left, str(refused)


def test_a_target_that_is_replaced_meanwhile_is_left_alone(place):
    place.make()
    slow = subprocess.Popen([support.instar_binary(), "commit", "--atomic", "-r", "1M", place.top], stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)
    assert slow.poll() is None
    place.base.rename(place.dir / "moved")
    place.base.write_bytes(b"another")
    _, said = slow.communicate(timeout=60)
    assert slow.returncode == 1 and "meanwhile" in said, said
    assert place.base.read_bytes() == b"another" and support.digest(place.dir / "moved") == place.before
    assert not support.holds_no_clusters(place.top) and place.names() == ["base", "moved", "top"]


def test_a_new_target_is_locked_and_so_is_the_old_one(clone):
    """Nobody gets hold of either before the end."""
    clone.make()
    descriptor = os.open(clone.base, os.O_RDONLY)
    slow = subprocess.Popen([support.instar_binary(), "commit", "--atomic", "-r", "1M", clone.top])
    time.sleep(0.5)
    tried = support.qemu_img("info", "-f", "qcow2", clone.base, rc=None)
    assert slow.poll() is None and tried.rc == 1 and "lock" in tried.stderr, str(tried)
    assert slow.wait(timeout=60) == 0
    os.close(descriptor)
    clone.check_new()


def test_another_users_target(undo):
    """Whoever is neither its owner nor root cannot leave a log that counts."""
    undo.make()
    os.chown(undo.dir, 1000, 1000)
    os.chown(undo.top, 1000, 1000)
    os.chmod(undo.base, 0o666)
    os.chmod(undo.dir.parent, 0o755)
    refused = support.run("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", support.instar_binary(), "commit", "--atomic",
                          "--sandbox", "process", undo.top)
    if "ERROR_SANDBOX" in refused.stderr or "setpriv" in refused.stderr:
        pytest.skip(refused.stderr)
    assert refused.rc == 1 and undo.is_old() and undo.names() == ["base", "top"], str(refused)


# --- crashes --------------------------------------------------------------------------------------


def campaign(*options):
    if os.geteuid() != 0:
        pytest.skip("mounting file systems takes root")
    return support.run("unshare", "--mount", sys.executable, CAMPAIGN, *options, timeout=900)


@pytest.mark.parametrize("name", WAYS)
def test_kills_and_power_losses(name):
    result = campaign("--file-system", name, "--sample", "3", "--cases", "3")
    assert result.rc == 0, str(result)
    tried, both = re.search(rf"{name}: (\d+) kills, 0 violations, old and new seen: (\w+)", result.stdout).groups()
    assert int(tried) >= 20 and both == "True"


@pytest.mark.parametrize("name", WAYS)
def test_a_flush_that_is_missing_would_be_seen(name):
    """The flushes of the clone, and of the log, are skipped and said to be done: what was tried above has to fail now."""
    result = campaign("--file-system", name, "--unflushed", "--sample", "30", "--cases", "1")
    assert result.rc == 1 and int(re.search(r"(\d+) violations", result.stdout)[1]) > 0, str(result)


def test_the_overlay_is_deleted_afterwards(place):
    """Names are made and removed in two directories, each for a reason of its own."""
    place.make()
    done = place.commit("--delete-overlay", "--verify", "--output", "json")
    assert done.rc == 0 and done.json["overlay_deleted"] and done.json["atomic"] == place.way, str(done)
    assert place.names() == ["base"]
    assert support.content_hash(place.base) == place.expected


@pytest.mark.parametrize("command", [["resize", "base", "128M"], ["commit", "--ignore-siblings", "other"], ["check", "-r", "all", "base"]])
def test_what_is_replaced_while_somebody_waits_for_it_is_not_changed(clone, command):
    """The lock comes when the clone has the target's name: what was opened is the old target, which nobody has any more."""
    clone.make()
    other = clone.dir / "other"
    support.create(other, backing="base", backing_fmt="qcow2")
    support.qemu_io(other, "write -P 9 3M 64k")
    held = support.digest(other)
    slow = subprocess.Popen([support.instar_binary(), "commit", "--atomic", "--ignore-siblings", "-r", "1M", clone.top])
    try:
        time.sleep(0.3)
        waiting = support.run_instar(command[0], "--wait", "30", *command[1:], cwd=clone.dir)
    finally:
        assert slow.wait() == 0
    assert waiting.rc == 1 and "was moved or replaced by another process meanwhile" in waiting.stderr, str(waiting)
    assert support.digest(other) == held
    clone.check_new()


def test_nothing_new_is_made_over_what_is_to_be_recovered(undo):
    undo.make()
    undo.crash()
    assert undo.log.exists()
    made = support.run_instar("create", "-f", "raw", undo.base, "1M")
    assert made.rc == 1 and "(ERROR_RECOVERY_NEEDED)" in made.stderr and f"rm '{undo.log}'" in made.stderr, str(made)


def test_no_backup_is_called_like_a_log(clone):
    clone.make()
    refused = clone.commit("--keep-backup", ".base.instar-undo")
    assert refused.rc == 2 and "name of an undo log" in refused.stderr, str(refused)
    assert clone.names() == ["base", "top"]


# --- all faults -----------------------------------------------------------------------------------

FAULTS = [(kind, make) for kind, makes in atomic_faults.ON.items() for make in makes]


@pytest.fixture
def case(request, mounts):
    kind, make = request.param
    directory = mounts / kind / "faults"
    for left in (directory, directory.with_name("faults.pristine")):
        shutil.rmtree(left, ignore_errors=True)
    directory.mkdir()
    made = make(directory)
    assert atomic_faults.way_of(made) == WAYS[kind]
    return made


@pytest.mark.parametrize("case", FAULTS, ids=lambda pair: f"{pair[1].__name__}-{pair[0]}", indirect=True)
def test_a_sample_of_all_faults(case):
    everything = list(case.faults())
    assert {fault for fault, _, _ in everything} == set(faults.FAULTS)
    chosen = random.Random(len(everything)).sample(everything, 10)
    assert sum(case.inject(*fault) for fault in chosen) > 5


@pytest.mark.parametrize("case", [("ext4", atomic_faults.atomic_into_raw), ("xfs", atomic_faults.atomic_into_raw)],
                         ids=lambda pair: pair[0], indirect=True)
def test_a_commit_that_is_not_atomic_would_be_seen(case, monkeypatch):
    monkeypatch.setattr(atomic_faults.Atomic, "command", faults.Case.command)
    with pytest.raises(faults.Violation, match="neither the old one nor the new one"):
        for nth in range(1, 4):
            for call in ("copy_file_range", "ioctl"):
                case.inject("KILL", nth, call)
