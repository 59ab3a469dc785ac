"""Every fault of `commit --atomic`, and of `recover`: system calls that fail, are interrupted, move less than asked, or are where
the program is killed, where the target is cloned (XFS, btrfs) and where an undo log is kept (ext4).

After each, the target is byte for byte what it was, or it is what it should be, at once or after `recover`; what depends on it
reads as before; a second run finishes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import faults
import support
from support import MIB

MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
# A clone that cannot be made, or cannot look like the target, is none: then a log is kept.
CLONES = {"ioctl", "fchown", "fchmod", "flistxattr", "fgetxattr", "fsetxattr", "fremovexattr"}
# What was removed, and comes back after a crash, is empty, or undoes nothing: that it is gone need not be durable.
REMOVALS = {"fsync"}
BACKUP, SECOND = "base.before", "base.second"


@contextlib.contextmanager
def mounted(kind, place: Path):
    """A directory on a file system of this kind; nothing else knows of it if this process has a mount namespace of its own."""
    image, directory = place / f"{kind}.img", place / kind
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
    directory.mkdir()
    subprocess.run(["mount", "-o", "loop", image, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
        image.unlink()
        directory.rmdir()


class Atomic(faults.Case):
    """A commit whose target changes whole or not at all."""

    def __post_init__(self):
        super().__post_init__()
        self.log = self.path(f".{self.base}.instar-undo")
        self.before = support.digest(self.path(self.base))

    def command(self):
        return ["commit", "--atomic", *self.args, self.path(self.top)]

    def reset(self):
        for path in self.directory.iterdir():
            if path not in self.files():
                path.unlink()
        super().reset()

    def traced(self):
        # The clone, its names, and the log are in it, too.
        return [self.directory]

    def run(self, *arguments):
        self.last = super().run(*arguments)
        return self.last

    def again(self):
        """The same command. Once it was done the name of the backup is taken, where the overlay keeps something to be committed."""
        again = super().again()
        if "--keep-backup" not in self.args or again.rc == 0 or "exists" not in again.stderr:
            return again
        changed = self.path(self.top).read_bytes() != (self.pristine / self.top).read_bytes()
        if self.last.rc == 0 or changed:
            return support.run_instar(*[SECOND if word == BACKUP else word for word in self.command()])
        return again

    def left(self):
        """Files that nobody asked for."""
        wanted = {*self.files(), self.path(BACKUP), self.path(SECOND)}
        return sorted(path.name for path in self.directory.iterdir() if path not in wanted)

    def check_status(self, fault, call, result, done):
        if done and fault not in ("KILL", "EINTR", "SHORT") and result.rc == 0 and call in CLONES | REMOVALS:
            return
        if fault in faults.ERRNO and result.rc == 1 and f"{self.log.name}'" in result.stderr:
            # It only grows: where in it the write failed helps nobody.
            lines = [line for line in result.stderr.splitlines() if not line.startswith("inject: ")]
            self.hold(len(lines) == 1 and faults.ERRNO[fault] in lines[0], f"{fault} of {call} is not named", result)
            return
        super().check_status(fault, call, result, done)

    def check_images(self, result, finished):
        """What holds after each run, whatever happened to it."""
        base = self.path(self.base)
        if self.log.exists():
            refused = support.run_instar("info", "-f", self.base_fmt, base)
            self.hold("ERROR_RECOVERY_NEEDED" in refused.stderr, "an undo log is not noticed", f"{result}\n{refused}")
            told = getattr(result, "rc", 0) != 1 or "instar recover" in result.stderr
            self.hold(not finished and told, "an undo log is left", result)
            recovered = support.run_instar("recover", base)
            self.hold(recovered.rc == 0 and not self.log.exists(), "recovery fails", f"{result}\n{recovered}")
        if support.digest(base) != self.before:
            content = support.content_hash(base, self.base_fmt)
            self.hold(content == self.expected, "the target is neither the old one nor the new one", result)
        if self.path(BACKUP).exists():
            self.hold(support.digest(self.path(BACKUP)) == self.before, "the backup is not what the target was", result)
        if finished:
            self.hold("--keep-backup" not in self.args or self.path(BACKUP).exists(), "there is no backup", result)
        if getattr(result, "rc", 0) != 137 and not isinstance(result, str):
            self.hold(not self.left(), f"{self.left()} is left", result)
        super().check_images(result, finished)


class Recovery(faults.Case):
    """`recover` of a target that a commit was changing in place when it was killed. It is always written into the same file, of
    which alone the log is."""

    def __post_init__(self):
        super().__post_init__()
        self.log = self.path(f".{self.base}.instar-undo")
        self.before = support.digest(self.path(self.base))
        commit = [support.instar_binary(), "commit", "--atomic", *self.args, self.path(self.top)]
        killed = support.run(faults.injector(), "KILL", "3", "fdatasync", self.directory, "--", *commit)
        assert killed.rc == 137 and self.log.exists(), str(killed)
        self.torn = {path: path.read_bytes() for path in (self.path(self.base), self.log)}
        self.times = {path: path.stat() for path in self.torn}
        assert support.digest(self.path(self.base)) != self.before

    def reset(self):
        for path, data in self.torn.items():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
            # A base that was written long after the commit was restored by somebody, and is refused.
            os.utime(path, ns=(self.times[path].st_atime_ns, self.times[path].st_mtime_ns))

    def command(self):
        return ["recover", self.path(self.base)]

    def traced(self):
        return [self.directory]

    def check_status(self, fault, call, result, done):
        # Its own lines name the log or the image, and the errno.
        if fault in ("KILL", "EINTR", "SHORT") or not done or result.rc == 0:
            super().check_status(fault, call, result, done)
            return
        lines = [line for line in result.stderr.splitlines() if not line.startswith("inject: ")]
        one = result.rc == 1 and len(lines) == 1 and self.base in lines[0]
        self.hold(one and faults.ERRNO[fault] in lines[0], f"{fault} of {call} is not one line with its errno", result)

    def check_images(self, result, finished):
        base = self.path(self.base)
        old = support.digest(base) == self.before
        self.hold(old or self.log.exists(), "the log is gone, and the target is not what it was", result)
        if finished:
            self.hold(old and not self.log.exists(), "it did not get back what it was", result)


def atomic_into_qcow2(directory, make=Atomic):
    """A base with a snapshot: the overlay is emptied at the end."""
    return make(**own(faults.qcow2_with_snapshot(directory), "atomic, qcow2 with a snapshot"))


def atomic_into_raw(directory, make=Atomic):
    """The overlay's file is removed at the end."""
    case = own(faults.into_raw(directory), "atomic, into raw, and removed")
    return make(**{**case, "args": ["--delete-overlay"], "emptied": False, "deleted": True})


def atomic_vmdk(directory, make=Atomic):
    """The overlay is told first who its parent will be."""
    return make(**own(faults.vmdk(directory), "atomic, vmdk into vmdk"))


def atomic_with_backup(directory, make=Atomic):
    """The old target keeps a name, and what was written is read back."""
    case = own(faults.compressed_and_growing(directory), "atomic, with a backup")
    return make(**{**case, "args": [*case["args"], "--verify", "--digest", "--keep-backup", BACKUP]})


def recover_qcow2(directory):
    """What an interrupted commit left."""
    return atomic_into_qcow2(directory, Recovery)


def recover_vhdx(directory):
    """The same of another format, which has grown meanwhile."""
    return Recovery(**own(faults.into_vhdx(directory), "recover"))


def own(case, name):
    """What makes a case of another class of it: it begins where that one begins."""
    shutil.rmtree(case.pristine)
    kept = ("directory", "top", "base", "top_fmt", "base_fmt", "args", "others", "emptied", "deleted")
    return {"name": name, **{field: getattr(case, field) for field in kept}}


UNDO = [atomic_into_qcow2, atomic_into_raw, atomic_vmdk, recover_qcow2, recover_vhdx]
CLONE = [atomic_into_qcow2, atomic_into_raw, atomic_vmdk, atomic_with_backup]
ON = {"ext4": UNDO, "xfs": CLONE, "btrfs": CLONE}


def way_of(case):
    """How the target is kept, as the program says."""
    if isinstance(case, Recovery):
        return "undo-log"
    case.reset()
    told = support.run_instar("commit", "--atomic", *case.args, "--dry-run", "-v", case.path(case.top))
    return "clone" if re.search(r"a clone takes its place", told.stderr) else "undo-log"
