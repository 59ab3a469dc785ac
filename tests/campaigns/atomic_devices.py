#!/usr/bin/env python3
"""Kills and power losses of `instar commit --atomic --undo-dir` into a block device.

The overlay and the directory of the undo log lie on a file system in a file, the target on a loop device. A commit is killed before
one of its system calls. Twice it is looked at: at things as they are, and at both disks as a power loss at that instant leaves
them: what was only in a page cache is gone. Each time the target, after `instar recover` if there is a log, has to be byte for byte
what it was, or what it should be; the overlay has to read as before; a second commit has to finish.

With --unflushed, flushes of files without a name are skipped (the log), and said to be done: there must be violations, or nothing
is tested. Needs root, in a mount namespace of its own: unshare --mount tests/campaigns/atomic_devices.py
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import atomic  # noqa: E402
import faults  # noqa: E402
import power_loss  # noqa: E402
import support  # noqa: E402
from support import MIB  # noqa: E402

VOLUME = 32 * MIB
FORMATS = ["qcow2", "raw"]


class Violation(AssertionError):
    """Something does not hold."""


class Lab:
    """An outer file system that copies files at an instant, and on it the two disks."""

    def __init__(self, place: Path, fmt: str):
        self.place, self.fmt = place, fmt
        self.outer, self.disk = place / "outer", place / "disk"
        #: What the overlay records: it leads to whichever loop device there is.
        self.base = place / "volume"
        self.top, self.undo = self.disk / "top", self.disk / "undo"

    def copy(self, source, target):
        # The file stays the same one, and so the device on it stays the same device.
        power_loss.call("cp", "--reflink=always", self.outer / source, self.outer / target)

    @contextmanager
    def disks(self, image):
        """The file system of this image, mounted, and the device."""
        loop = subprocess.run(["losetup", "-f", "--show", self.outer / "volume"], capture_output=True, text=True, check=True).stdout.strip()
        self.base.unlink(missing_ok=True)
        self.base.symlink_to(loop)
        self.loop = loop
        try:
            with power_loss.Disk(self.outer / image, self.disk, []):
                yield
        finally:
            power_loss.call("losetup", "-d", loop)

    def template(self):
        for name, size in (("template", 200 * MIB), ("volume", VOLUME)):
            with open(self.outer / name, "wb") as file:
                file.truncate(size)
        power_loss.call(*power_loss.FILE_SYSTEMS["ext4"][0], self.outer / "template")
        with self.disks("template"):
            self.undo.mkdir()
            if self.fmt == "raw":
                with open(self.loop, "r+b") as device:
                    device.write(b"\x33" * VOLUME)
                size = VOLUME
            else:
                size = 24 * MIB
                support.qemu_img("create", "-f", self.fmt, self.base, str(size))
                support.qemu_io(self.base, "write -P 77 1M 2M", "write -P 78 9M 1M", fmt=self.fmt)
                support.qemu_img("snapshot", "-c", "one", self.base)
            support.qemu_img("create", "-f", "qcow2", "-b", self.base, "-F", self.fmt, self.top, str(size))
            support.qemu_io(self.top, "write -P 1 0 3M", "write -P 2 7M 300k", "write -P 3 9M 700k", "write -z 14M 1M", "write -P 4 20M 64k")
            os.sync()
            self.before, self.expected = support.digest(self.loop), support.content_hash(self.top)
        self.copy("volume", "volume.template")

    def command(self):
        raw = ["-F", "raw"] if self.fmt == "raw" else []
        return ["commit", "--atomic", "--undo-dir", self.undo, "-b", self.base, *raw, self.top]

    def commit(self, fault="COUNT", nth=0, call="none"):
        traced = [self.disk, self.loop]
        return support.run(faults.injector(), fault, str(nth), call, *traced, "--", support.instar_binary(), *self.command())

    def begin(self):
        self.copy("template", "running")
        self.copy("volume.template", "volume")

    def calls(self):
        """All places where a commit can be killed."""
        self.begin()
        with self.disks("running"):
            result = self.commit()
            assert result.rc == 0, str(result)
            self.check_end(result)
        found = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", result.stderr)}
        return [(name, nth) for name in sorted(atomic.PLACES & found.keys()) for nth in range(1, found[name] + 1)]

    def hold(self, condition, what, result):
        if not condition:
            raise Violation(f"{self.fmt}: {what}\n{result}")

    def check_end(self, what):
        self.hold(support.content_hash(self.base, self.fmt) == self.expected, "the target is not what it should be", what)
        self.hold(support.content_hash(self.top) == self.expected, "the overlay reads something else", what)
        self.hold(not list(self.undo.iterdir()), "a log is left", what)

    def check(self, what):
        """What every crash may leave, and that it can be finished. Returns whether the target was the old one."""
        if list(self.undo.iterdir()):
            refused = support.run_instar(*self.command())
            noticed = refused.rc == 1 and "ERROR_RECOVERY_NEEDED" in refused.stderr
            self.hold(noticed, "an undo log is not noticed", f"{what}\n{refused}")
            recovered = support.run_instar("recover", "--undo-dir", self.undo, self.base)
            self.hold(recovered.rc == 0 and not list(self.undo.iterdir()), "recovery fails", f"{what}\n{recovered}")
        old = support.digest(self.loop) == self.before
        if not old:
            content = support.content_hash(self.base, self.fmt)
            self.hold(content == self.expected, "the target is neither the old one nor the new one", what)
        self.hold(support.content_hash(self.top) == self.expected, "the overlay reads something else", what)
        again = support.run_instar(*self.command())
        self.hold(again.rc == 0, "a second commit fails", f"{what}\n{again}")
        self.check_end(f"{what}\n{again}")
        return old

    def kill(self, call, nth, fault):
        """Returns whether the target was the old one after the kill, and after the power loss."""
        self.begin()
        with self.disks("running"):
            killed = self.commit(fault, nth, call)
            self.copy("volume", "volume.crashed")
            self.copy("running", "crashed")
            # Threads that copy side by side share the work out anew each time: this one took fewer calls, and came to its end.
            ended = killed.rc == 0 and call in ("copy_file_range", "pwrite64")
            self.hold(killed.rc == 137 or ended, f"it was not killed before {call} {nth}", killed)
            after_kill = self.check(f"killed before {call} {nth}\n{killed}") if fault == "KILL" else None
        self.copy("volume.crashed", "volume")
        with self.disks("crashed"):
            return after_kill, self.check(f"power lost before {call} {nth}\n{killed}")


def run(fmt, sample, seed, fault):
    tried = violations = 0
    states = set()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        with open(place / "outer.img", "wb") as file:
            file.truncate(2048 * MIB)
        power_loss.call(*power_loss.FILE_SYSTEMS["xfs"][0], place / "outer.img")
        with power_loss.Disk(place / "outer.img", place / "outer", []):
            lab = Lab(place, fmt)
            lab.template()
            places = lab.calls()
            if sample is not None:
                # The end, where the order counts, is always there.
                named = [one for one in places if one[0] in ("linkat", "unlinkat", "fsync", "ftruncate")]
                others = [one for one in places if one not in named]
                places = named + random.Random(seed).sample(others, min(sample, len(others)))
            for call, nth in places:
                tried += 1
                try:
                    states.add(lab.kill(call, nth, fault))
                except AssertionError as violation:
                    violations += 1
                    print(f"VIOLATION {violation}", file=sys.stderr)
    return tried, violations, states


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this one; may be repeated")
    parser.add_argument("--sample", type=int, help="this many kills besides those at the end, and not all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unflushed", action="store_true", help="flushes of files without a name are skipped")
    options = parser.parse_args()
    fault = "KILL-UNNAMED" if options.unflushed else "KILL"
    bad = 0
    for fmt in options.format or FORMATS:
        tried, violations, states = run(fmt, options.sample, options.seed, fault)
        crashes = {crash for _, crash in states}
        print(f"device, {fmt}: {tried} kills, {violations} violations, old and new seen: {crashes == {True, False}}")
        bad += violations + (tried == 0)
    return 1 if bad else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
