"""`--undo-dir`: block devices that `instar commit --atomic` changes whole or not at all, and what `instar recover` refuses to undo."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import time

import faults
import pytest
import schemas
import support
import vhdx_bytes
from support import KIB, MIB

SIZE = 16 * MIB


class Disks:
    """Loop devices, an overlay, and a directory for undo logs."""

    def __init__(self, directory):
        self.dir, self.undo = directory, directory / "undo"
        self.undo.mkdir()
        self.attached = []

    def attach(self, name, size=SIZE, at=None):
        disk = self.dir / name
        if not disk.exists():
            disk.write_bytes(os.urandom(64 * KIB) * (size // (64 * KIB)))
        where = ["-f", "--show"] if at is None else [at]
        # Another process may take the free one first.
        for _ in range(10):
            done = subprocess.run(["losetup", *where, disk], capture_output=True, text=True, check=False)
            if done.returncode == 0 or "busy" not in done.stderr:
                break
            time.sleep(0.1)
        if done.returncode != 0:
            pytest.skip(f"this machine has no loop devices: {done.stderr.strip()}")
        device = at or done.stdout.strip()
        self.attached.append(device)
        return device

    def detach(self, device):
        subprocess.run(["losetup", "-d", device], check=True)
        self.attached.remove(device)
        # It goes when nobody has it open any more.
        for _ in range(100):
            if subprocess.run(["losetup", device], capture_output=True, check=False).returncode != 0:
                return
            time.sleep(0.05)

    def make(self, fmt="qcow2", overlay_on_device=False):
        self.base, self.fmt = self.attach("disk"), fmt
        if fmt == "raw":
            size = SIZE
        else:
            size = 8 * MIB
            support.qemu_img("create", "-f", fmt, self.base, str(size))
            support.qemu_io(self.base, "write -P 7 0 2M", "write -P 8 5M 512k", fmt=fmt)
        self.top = self.attach("over") if overlay_on_device else self.dir / "top"
        support.qemu_img("create", "-f", "qcow2", "-b", self.base, "-F", fmt, self.top, str(size))
        support.qemu_io(self.top, "write -P 9 1M 300k", "write -P 5 3M 1M", "write -P 6 5200k 64k")
        self.before, self.expected = support.digest(self.base), support.content_hash(self.top, "qcow2")
        self.command = ["commit", "--atomic", "--undo-dir", self.undo, "-b", self.base, *(["-F", "raw"] if fmt == "raw" else []), self.top]
        return self

    def is_old(self):
        return support.digest(self.base) == self.before

    def logs(self):
        return sorted(path for path in self.undo.iterdir())

    def kill(self, call="fdatasync", nth=3):
        return support.run(faults.injector(), "KILL", str(nth), call, self.dir, self.base, "--", support.instar_binary(), *self.command)

    def crash_within(self):
        """Leave a device that was changed, and its log."""
        for nth in range(3, 9):
            killed = self.kill("fdatasync", nth)
            assert killed.rc == 137 and self.logs(), str(killed)
            if not self.is_old():
                return self
            assert self.recover().rc == 0
        raise AssertionError("no crash leaves a device that was changed")

    def crash_at_its_end(self):
        """Leave a device that has everything, and a log that would take it out again: it is about to be cut."""
        killed = self.kill("ftruncate", 1)
        assert killed.rc == 137 and self.logs() and support.content_hash(self.base, self.fmt) == self.expected, str(killed)
        return self

    def recover(self, *options, device=None):
        return support.run_instar("recover", "--undo-dir", self.undo, *options, device or self.base)

    def config(self):
        """Settings that name the directory."""
        file = self.dir / "config.toml"
        file.write_text(support.configuration(f'undo-dir = "{self.undo}"\n'))
        file.chmod(0o644)
        return {"INSTAR_CONFIG": str(file)}


@pytest.fixture
def disks(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("loop devices take root")
    made = Disks(tmp_path)
    yield made
    for device in made.attached:
        subprocess.run(["losetup", "-d", device], check=False)


@pytest.mark.parametrize("fmt", ["qcow2", "raw", "vdi"])
@pytest.mark.parametrize("overlay_on_device", [False, True], ids=["file", "device"])
def test_a_commit(disks, fmt, overlay_on_device):
    disks.make(fmt, overlay_on_device)
    said = support.run_instar(*disks.command[:-1], "--dry-run", "--output", "json", disks.top)
    assert said.rc == 0 and said.json["atomic"] == "undo-log" and said.json["undo_log_bytes"] > MIB, str(said)
    assert said.json["undo_free_bytes"] > 0 and disks.is_old() and not disks.logs()
    done = support.run_instar(*disks.command[:-1], "--verify", disks.top)
    assert done.rc == 0 and not disks.logs(), str(done)
    assert support.content_hash(disks.base, fmt) == disks.expected
    assert support.content_hash(disks.top, "qcow2") == disks.expected
    nothing = disks.recover()
    assert nothing.rc == 0 and "nothing to recover" in nothing.stdout


def test_every_kill_leaves_the_old_or_the_new(disks):
    """At each call of the end, and a sample of those before: after `recover`, byte for byte."""
    disks.make("qcow2")
    pristine = {path: path.read_bytes() for path in (disks.dir / "disk", disks.top)}
    counted = support.run(faults.injector(), "COUNT", "0", "none", disks.dir, disks.base, "--", support.instar_binary(), *disks.command)
    assert counted.rc == 0, str(counted)
    found = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", counted.stderr)}
    seen = set()
    for call in ("pwrite64", "fdatasync", "fsync", "linkat", "unlinkat", "ftruncate", "copy_file_range"):
        count = found.get(call, 0)
        for nth in range(1, count + 1, max(1, count // 6)):
            for path, data in pristine.items():
                # Through the device, whose pages would hide what the file gets.
                with open(disks.base if path.name == "disk" else path, "r+b") as file:
                    file.write(data)
                    if path == disks.top:
                        file.truncate()
                    os.fsync(file.fileno())
            killed = disks.kill(call, nth)
            assert killed.rc == 137 or (killed.rc == 0 and call == "copy_file_range"), str(killed)
            if disks.logs():
                refused = support.run_instar(*disks.command)
                assert refused.rc == 1 and "ERROR_RECOVERY_NEEDED" in refused.stderr, str(refused)
                recovered = disks.recover()
                assert recovered.rc == 0 and not disks.logs(), f"{call} {nth}: {recovered}"
            old = disks.is_old()
            seen.add(old)
            assert old or support.content_hash(disks.base, "qcow2") == disks.expected, f"{call} {nth}"
            assert support.content_hash(disks.top, "qcow2") == disks.expected, f"{call} {nth}"
            again = support.run_instar(*disks.command)
            assert again.rc == 0 and support.content_hash(disks.base, "qcow2") == disks.expected, f"{call} {nth}: {again}"
    assert seen == {True, False}


def test_it_is_found_by_whatever_name_the_device_has(disks):
    disks.make().crash_within()
    old = disks.base
    disks.detach(old)
    # Another disk under the old name, and ours under a new one.
    disks.attach("stranger", at=old)
    stranger = support.digest(old)
    refused = disks.recover()
    assert refused.rc == 1 and "has the name of another device" in refused.stderr and "ERROR_RECOVERY_NEEDED" in refused.stderr, str(refused)
    assert str(disks.logs()[0]) in refused.stderr
    support.qemu_img("create", "-f", "qcow2", "-b", old, "-F", "raw", disks.dir / "other")
    support.qemu_io(disks.dir / "other", "write 0 64k")
    into = support.run_instar("commit", "--atomic", "--undo-dir", disks.undo, "-b", old, "-F", "raw", "--ignore-siblings", disks.dir / "other")
    assert into.rc == 1 and "has the name of another device" in into.stderr, str(into)
    assert support.digest(old) == stranger
    found = disks.attach("disk")
    assert found != old
    os.symlink(found, disks.dir / "link")
    recovered = disks.recover(device=disks.dir / "link")
    assert recovered.rc == 0 and support.digest(found) == disks.before and not disks.logs(), str(recovered)


def test_a_device_that_was_written_since_is_not_undone(disks):
    """The file below it is the same, so it is the same device; but what the commit never changed is something else."""
    disks.make().crash_within()
    with open(disks.base, "r+b") as device:
        device.write(os.urandom(SIZE))
    left = support.digest(disks.base)
    refused = disks.recover()
    assert refused.rc == 1 and "has changed nothing" in refused.stderr and f"rm '{disks.logs()[0]}'" in refused.stderr, str(refused)
    assert support.digest(disks.base) == left and disks.logs()
    assert disks.recover("--force").rc == 0 and support.digest(disks.base) != left and not disks.logs()


@pytest.mark.parametrize("program", ["instar", "qemu-img"])
@pytest.mark.parametrize("overlay_on_device", [False, True], ids=["file", "device"])
def test_what_another_commit_has_finished_is_not_undone(disks, overlay_on_device, program):
    """It was not told of the directory, and so it saw no log: it empties the overlay, and the base alone has the data."""
    disks.make("qcow2", overlay_on_device).crash_at_its_end()
    if program == "instar":
        done = support.run_instar("commit", "-b", disks.base, disks.top)
        assert done.rc == 0, str(done)
    else:
        support.qemu_img("commit", "-q", disks.top)
    assert support.content_hash(disks.base, "qcow2") == disks.expected
    left = support.digest(disks.base)
    refused = disks.recover()
    assert refused.rc == 1 and "ERROR_RECOVERY_NEEDED" in refused.stderr and str(disks.top) in refused.stderr, str(refused)
    assert "another commit" in refused.stderr and f"rm '{disks.logs()[0]}'" in refused.stderr, str(refused)
    assert ("begins with something else" if overlay_on_device else "now" if "another length" in refused.stderr else "was written to") in refused.stderr
    assert support.digest(disks.base) == left and disks.logs()
    # What it says: the log goes, and everything is well.
    [log] = disks.logs()
    kept = log.read_bytes()
    log.unlink()
    assert disks.recover().rc == 0 and support.content_hash(disks.top, "qcow2") == disks.expected
    log.write_bytes(kept)
    log.chmod(0o600)
    assert disks.recover("--force").rc == 0 and disks.is_old() and not disks.logs()


def test_an_overlay_that_is_another_device_is_refused(disks):
    disks.make("qcow2", overlay_on_device=True).crash_within()
    top, left = disks.top, support.digest(disks.base)
    disks.detach(top)
    disks.attach("stranger", at=top)
    refused = disks.recover()
    assert refused.rc == 1 and f"'{top}', which is another file or device now" in refused.stderr, str(refused)
    assert support.digest(disks.base) == left
    disks.detach(top)
    disks.attach("over", at=top)
    assert disks.recover().rc == 0 and disks.is_old() and not disks.logs()


def test_the_directory_that_was_searched_is_named(disks):
    disks.make().crash_within()
    left, wrong = support.digest(disks.base), disks.dir / "wrong"
    wrong.mkdir()
    nothing = support.run_instar("recover", "--undo-dir", wrong, disks.base)
    assert nothing.rc == 0 and f"has no undo log in '{wrong}'" in " ".join(nothing.stdout.split()), str(nothing)
    said = schemas.insist("recover", support.run_instar("recover", "--undo-dir", wrong, "--output", "json", disks.base).json)
    assert (said["log"], said["searched"]) == (False, str(wrong))
    assert support.digest(disks.base) == left and disks.logs()


def test_with_a_configuration_every_command_finds_the_log(disks):
    disks.make().crash_within()
    left, env = support.digest(disks.base), disks.config()
    for command in (["info", disks.base], ["check", disks.base], ["map", disks.base], ["compare", disks.base, disks.top],
                    ["commit", "-b", disks.base, disks.top], ["convert", "--allow-backing-dir", "/dev", "-O", "raw", disks.top, disks.dir / "new"],
                    ["create", "-f", "qcow2", disks.base, "1M"], ["resize", disks.base, "+1M"], ["info", "--backing-chain", disks.top],
                    ["measure", "--commit", "-b", disks.base, disks.top], ["rebase", "-u", "-b", "", disks.base]):
        refused = support.run_instar(*command, env=env)
        assert refused.rc != 0 and "ERROR_RECOVERY_NEEDED" in refused.stderr and "--undo-dir" in refused.stderr, f"{command}: {refused}"
    assert support.digest(disks.base) == left
    assert support.run_instar("recover", disks.base, env=env).rc == 0 and disks.is_old()
    assert support.run_instar("commit", "--atomic", "-b", disks.base, disks.top, env=env).rc == 0
    assert support.content_hash(disks.base, "qcow2") == disks.expected


def test_what_is_refused(disks):
    disks.make()
    plain = ["commit", "--atomic", "-b", disks.base, disks.top]
    refused = support.run_instar(*plain)
    assert refused.rc == 2 and "ERROR_BAD_USAGE" in refused.stderr and "is a block device" in refused.stderr and "--undo-dir" in refused.stderr, str(refused)
    refused = support.run_instar("recover", disks.base)
    assert refused.rc == 2 and "--undo-dir" in refused.stderr, str(refused)
    refused = support.run_instar("recover", "--undo-dir", disks.dir / "absent", disks.base)
    assert refused.rc == 1 and "absent" in refused.stderr, str(refused)
    refused = support.run_instar(*disks.command, "--keep-backup", "x")
    assert refused.rc == 2 and "ERROR_BAD_USAGE" in refused.stderr and "leaves no backup" in refused.stderr, str(refused)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    if memory and subprocess.run(["stat", "-f", "-c", "%T", memory], capture_output=True, text=True, check=False).stdout.strip() == "tmpfs":
        refused = support.run_instar("commit", "--atomic", "--undo-dir", memory, "-b", disks.base, disks.top)
        assert refused.rc == 2 and "lies in memory" in refused.stderr, str(refused)
    disks.undo.chmod(0o777)
    refused = support.run_instar(*disks.command)
    assert refused.rc == 1 and "chmod o-w" in refused.stderr, str(refused)
    disks.undo.chmod(0o1777)
    assert support.run_instar(*disks.command, "--dry-run").rc == 0
    assert support.run_instar("commit", "--undo-dir", disks.undo, disks.top).rc == 2
    assert disks.is_old() and not disks.logs()


def test_a_forged_log_does_not_count(disks):
    disks.make().crash_within()
    [log] = disks.logs()
    left, good = support.digest(disks.base), log.read_bytes()
    for change, mention in ((lambda: os.chown(log, 1000, 1000), "belongs neither"), (lambda: log.chmod(0o666), "written to by others"),
                            (lambda: log.write_bytes(good[:400] + b"x" + good[401:]), "no sound undo log"),
                            (lambda: (log.unlink(), log.symlink_to(disks.top)), "no regular file")):
        change()
        refused = disks.recover()
        assert refused.rc == 1 and mention in refused.stderr and support.digest(disks.base) == left, str(refused)
        log.unlink()
        log.write_bytes(good)
        log.chmod(0o600)
    assert disks.recover().rc == 0 and disks.is_old()


def test_a_full_directory_leaves_the_device_as_it_was(disks):
    disks.make()
    small = disks.dir / "small.img"
    small.write_bytes(bytes(MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", small], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", small, disks.undo], check=True)
    try:
        said = support.run_instar(*disks.command[:-1], "--dry-run", "--output", "json", disks.top).json
        schemas.insist("commit", said)
        measure = ["measure", "--commit", "--atomic", "--undo-dir", disks.undo, "-b", disks.base, disks.top]
        measured = schemas.insist("measure", support.run_instar(*measure, "--output", "json").json)
        assert (measured["lacking"], measured["undo-free"], measured["free"]) == (said["lacking_bytes"], said["undo_free_bytes"], None)
        assert f"lacking: {measured['lacking']} bytes (" in support.run_instar(*measure).stdout
        assert said["lacking_bytes"] == said["undo_log_bytes"] - said["undo_free_bytes"] > 0
        text = support.run_instar(*disks.command[:-1], "--dry-run", disks.top).stdout
        assert re.search(rf"That may be {said['lacking_bytes']} bytes( \([^)]+\))? more than there is room for", text), text
        failed = support.run_instar(*disks.command)
        assert failed.rc == 1 and "No space left" in failed.stderr and "nothing was changed" in failed.stderr, str(failed)
        assert disks.is_old() and [path.name for path in disks.logs()] == ["lost+found"]
    finally:
        subprocess.run(["umount", disks.undo], check=True)


def campaign(*options):
    if os.geteuid() != 0:
        pytest.skip("mounting file systems takes root")
    return support.run("unshare", "--mount", sys.executable, support.REPO / "tests/campaigns/atomic_devices.py", *options, timeout=900)


def test_kills_and_power_losses():
    result = campaign("--format", "qcow2", "--sample", "4")
    assert result.rc == 0, str(result)
    tried, both = re.search(r"device, qcow2: (\d+) kills, 0 violations, old and new seen: (\w+)", result.stdout).groups()
    assert int(tried) >= 10 and both == "True"


def test_a_flush_that_is_missing_would_be_seen():
    """The flush of the log before it has its name is skipped, and said to be done: what was tried above has to fail now."""
    result = campaign("--format", "qcow2", "--unflushed", "--sample", "25")
    assert result.rc == 1 and int(re.search(r"(\d+) violations", result.stdout)[1]) > 0, str(result)


# --- files that were restored ------------------------------------------------------------------------


class Left:
    """A file that an interrupted commit left changed, its log, and a backup of before."""

    def __init__(self, directory):
        self.base, self.top, self.log = directory / "base", directory / "top", directory / ".base.instar-undo"
        support.create(self.base, 8 * MIB)
        support.qemu_io(self.base, "write -P 7 0 2M", "write -P 8 5M 512k")
        self.backup = support.copy(self.base, directory / "backup.raw")
        support.create(self.top, backing="base", cwd=directory)
        support.qemu_io(self.top, "write -P 9 1M 300k", "write -P 5 3M 1M", "write -P 6 5200k 64k")
        self.before = support.digest(self.base)
        killed = support.run(faults.injector(), "KILL", "3", "fdatasync", directory, "--", support.instar_binary(), "commit", "--atomic",
                             "--ignore-siblings", self.top)
        if killed.rc != 137 or not self.log.exists():
            pytest.skip("this file system keeps no undo log")

    def age(self, seconds):
        """As if all of it had happened so many seconds before."""
        log = bytearray(self.log.read_bytes())

        def change(block, size, *times):
            for at in times:
                was = struct.unpack_from("<Q", log, block + at)[0]
                struct.pack_into("<Q", log, block + at, max(was - seconds, 0))
            struct.pack_into("<I", log, block + size - 4, vhdx_bytes.crc32c(log[block : block + size - 4]))

        # When the target was written before, and when the log was begun; both beats.
        change(0, 4096, 372, 384)
        for beat in (4096, 4608):
            if log[beat : beat + 8] == b"undo now":
                change(beat, 512, 32)
        for path, data in ((self.log, log), (self.base, None)):
            then = path.stat().st_mtime - seconds
            if data:
                path.write_bytes(data)
            os.utime(path, (then, then))

    def refused(self, mention):
        left = support.digest(self.base)
        result = support.run_instar("recover", self.base)
        assert result.rc == 1 and mention in result.stderr and "ERROR_RECOVERY_NEEDED" in result.stderr, str(result)
        assert f"rm '{self.log}'" in result.stderr and support.digest(self.base) == left and self.log.exists()


@pytest.fixture
def left(tmp_path):
    return Left(tmp_path)


def test_a_crash_of_long_ago_is_recovered(left):
    """Whoever was away for a day: file and log are as old as each other, whatever time it is."""
    left.age(86400)
    assert support.run_instar("recover", left.base).rc == 0 and support.digest(left.base) == left.before


def test_a_file_that_was_written_later_is_refused(left):
    later = time.time() + 3600
    os.utime(left.base, (later, later))
    left.refused("after the commit into it had been interrupted")
    assert support.run_instar("recover", "--force", left.base).rc == 0 and support.digest(left.base) == left.before


def test_a_file_that_has_the_time_of_its_backup_is_refused(left):
    shutil.copyfile(left.backup, left.base)
    os.utime(left.base, (1_000_000_000,) * 2)
    left.refused("before the commit into it began")


def test_another_state_that_was_copied_over_it_is_refused(left):
    """Even at once: the blocks that the commit has not changed say so."""
    support.qemu_io(left.backup, "write -P 77 0 2M", "write -P 78 5M 512k", fmt="qcow2")
    other = bytearray(left.backup.read_bytes())
    other[-512:] = b"\x55" * 512
    left.backup.write_bytes(other)
    shutil.copyfile(left.backup, left.base)
    left.refused("has changed nothing")


def test_a_backup_of_the_same_state_is_harmless(left):
    shutil.copyfile(left.backup, left.base)
    assert support.run_instar("recover", left.base).rc == 0 and support.digest(left.base) == left.before


def test_an_interrupted_recovery_goes_on_long_after(left):
    """The first recovery has written the file itself, later than the commit."""
    left.age(86400)
    killed = support.run(faults.injector(), "KILL", "2", "fdatasync", left.base.parent, "--", support.instar_binary(), "recover", left.base)
    assert killed.rc == 137 and left.log.exists(), str(killed)
    assert support.run_instar("recover", left.base).rc == 0 and support.digest(left.base) == left.before


# --- overlays that are not what they were --------------------------------------------------------------


def write_at_once(path, data, keep_time):
    """Write at the beginning, or the end."""
    was = path.stat()
    with path.open("r+b") as file:
        file.seek(0 if keep_time else was.st_size)
        file.write(data)
    if keep_time:
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


@pytest.mark.parametrize("change, mention", [
    (lambda left: os.utime(left.top), "was written to since"),
    (lambda left: write_at_once(left.top, bytes(512), keep_time=True), "begins with something else now"),
    (lambda left: write_at_once(left.top, bytes(512), keep_time=False), "has another length now"),
    (lambda left: os.replace(support.copy(left.top, left.top.with_name("copy")), left.top), "is another file or device now"),
    (lambda left: left.top.unlink(), "is gone"),
    (lambda left: (left.top.unlink(), left.top.symlink_to("missing")), "is gone"),
    (lambda left: (left.top.unlink(), os.mkfifo(left.top)), "cannot be opened"),
], ids=["touched", "written", "longer", "copied", "gone", "a dead link", "a pipe"])
def test_an_overlay_that_is_not_what_it_was_is_refused(left, change, mention):
    change(left)
    left.refused(mention)
    assert f"'{left.top}', which" in support.run_instar("recover", left.base).stderr
    assert support.run_instar("recover", "--force", left.base).rc == 0 and support.digest(left.base) == left.before


def test_what_qemu_img_has_committed_over_a_torn_target_is_not_undone(left):
    """It does not see the log beside the target: it completes that, and the overlay may be emptied, or removed."""
    expected = support.content_hash(left.top, "qcow2")
    support.qemu_img("commit", "-q", left.top)
    left.refused("another commit may have moved its data into the image")
    left.top.unlink()
    left.refused("is gone")
    left.log.unlink()
    assert support.run_instar("recover", left.base).rc == 0 and support.content_hash(left.base, "qcow2") == expected


def test_an_overlay_that_comes_back_is_what_it_was(left):
    """Its directory was renamed, or not mounted: nothing is lost by having waited for it."""
    elsewhere = left.top.with_name("elsewhere")
    left.top.rename(elsewhere)
    left.refused("is gone")
    elsewhere.rename(left.top)
    assert support.run_instar("recover", left.base).rc == 0 and support.digest(left.base) == left.before
    # Now nobody has any use for what the log said.
    assert support.run_instar("commit", "--atomic", left.top).rc == 0


def test_every_layer_that_was_merged_counts(tmp_path):
    """A layer between holds data of its own, which a commit of that layer moves."""
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    support.create(base, 8 * MIB)
    support.qemu_io(base, "write -P 7 0 2M")
    support.create(middle, backing="base", cwd=tmp_path)
    support.qemu_io(middle, "write -P 8 1M 1M")
    support.create(top, backing="middle", cwd=tmp_path)
    support.qemu_io(top, "write -P 9 1536k 1M")
    before, log = support.digest(base), tmp_path / ".base.instar-undo"
    killed = support.run(faults.injector(), "KILL", "3", "fdatasync", tmp_path, "--", support.instar_binary(), "commit", "--atomic",
                         "-b", "base", top)
    if killed.rc != 137 or not log.exists():
        pytest.skip("this file system keeps no undo log")
    pristine = {path: (path.read_bytes(), path.stat()) for path in (base, log, middle)}
    support.qemu_img("commit", "-q", middle)
    refused = support.run_instar("recover", base)
    assert refused.rc == 1 and f"'{middle}', which" in refused.stderr, str(refused)
    for path, (data, stat) in pristine.items():
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert support.run_instar("recover", base).rc == 0 and support.digest(base) == before
