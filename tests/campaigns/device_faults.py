"""Every fault of a commit into a block device, plain and with `--atomic --undo-dir`: system calls on the overlay, the device, and the
undo log that fail, are interrupted, move less than asked, or are where the program is killed. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import atomic_faults
import faults
import support
from support import MIB

#: Calls without whose answer a commit goes on. A request asks whether a device is read-only, which the first write shows, and which file
#: is below a loop device, which is looked for in the chain.
HINTS = faults.HINTS | {"ioctl", "fstat", "fcntl", "pread64"}
#: Longer than the images on it, which grow into the rest.
VOLUME = 8 * MIB


@contextlib.contextmanager
def attached(place: Path):
    """A loop device, none of whose bytes is zero."""
    volume = place / "volume"
    volume.write_bytes(b"\xee" * VOLUME)
    made = subprocess.run(["losetup", "-f", "--show", volume], capture_output=True, text=True, check=True)
    loop = Path(made.stdout.strip())
    try:
        yield loop
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
        volume.unlink()


@dataclass
class OnDevice(faults.Case):
    """A commit into a device. The base of the case is its path."""

    undo: Path | None = None

    def __post_init__(self):
        self.pristine = self.directory.with_name(self.directory.name + ".pristine")
        self.pristine.mkdir()
        for name, path in self.places():
            shutil.copyfile(path, self.pristine / name)
        self.expected = support.content_hash(self.path(self.top), self.top_fmt)
        self.snapshot = self.snapshot_hash()
        self.before = support.digest(self.path(self.base))

    def path(self, name):
        return Path(name) if os.path.isabs(name) else self.directory / name

    def places(self):
        return [(Path(name).name, self.path(name)) for name in (self.top, self.base)]

    def reset(self):
        for name, path in self.places():
            shutil.copyfile(self.pristine / name, path)
        if self.undo:
            shutil.rmtree(self.undo, ignore_errors=True)
            self.undo.mkdir(mode=0o700)

    def command(self):
        kept = ["--atomic", "--undo-dir", self.undo] if self.undo else []
        return ["commit", *kept, *self.args, "-b", self.base, "-F", self.base_fmt, self.path(self.top)]

    def traced(self):
        return [self.directory, self.path(self.base)]

    def check_status(self, fault, call, result, done):
        if self.undo and fault in faults.ERRNO and result.rc != 0 and f"'{self.undo}" in result.stderr:
            # The directory, or the log, which only grows: where in it the write failed helps nobody.
            self.hold(result.rc == 1 and faults.ERRNO[fault] in result.stderr, f"{fault} of {call} is not named", result)
        elif done and fault in faults.ERRNO and result.rc == 0:
            ignored = HINTS | atomic_faults.REMOVALS if self.undo else HINTS
            self.hold(call in ignored, f"{fault} of {call} is not noticed", result)
        else:
            super().check_status(fault, call, result, done)

    def check_images(self, result, finished):
        base = self.path(self.base)
        if self.undo and list(self.undo.iterdir()):
            refused = support.run_instar(*self.command())
            self.hold("ERROR_RECOVERY_NEEDED" in refused.stderr, "an undo log is not noticed", f"{result}\n{refused}")
            self.hold(not finished, "an undo log is left", result)
            recovered = support.run_instar("recover", "--undo-dir", self.undo, base)
            self.hold(recovered.rc == 0 and not list(self.undo.iterdir()), "recovery fails", f"{result}\n{recovered}")
        if self.undo and support.digest(base) != self.before:
            content = support.content_hash(base, self.base_fmt)
            self.hold(content == self.expected, "the target is neither the old one nor the new one", result)
        super().check_images(result, finished)


def qcow2_on_a_device(directory, loop, undo=None):
    """Into clusters that are there, and new ones, where stale bytes stand."""
    support.create(loop, 4 * MIB, cluster_size="16k")
    faults.scribble(loop, 1, "qcow2", 4 * MIB, count=3)
    support.qemu_img("snapshot", "-c", "one", loop)
    return made(directory, loop, "qcow2", undo)


def raw_on_a_device(directory, loop, undo=None):
    return made(directory, loop, "raw", undo)


def made(directory, loop, fmt, undo):
    size = 4 * MIB if fmt == "qcow2" else VOLUME
    support.create(directory / "top", size, backing=os.fspath(loop), backing_fmt=fmt)
    faults.scribble(directory / "top", 2, "qcow2", 4 * MIB)
    name = f"{fmt} on a device" + (", with an undo log" if undo else "")
    return OnDevice(name, directory, "top", os.fspath(loop), base_fmt=fmt, undo=undo)


def atomic_into_qcow2_on_a_device(directory, loop):
    return qcow2_on_a_device(directory, loop, directory / "undo")


def atomic_into_raw_on_a_device(directory, loop):
    return raw_on_a_device(directory, loop, directory / "undo")


CASES = [qcow2_on_a_device, raw_on_a_device, atomic_into_qcow2_on_a_device, atomic_into_raw_on_a_device]
