#!/usr/bin/env python3
"""Power losses of the real program on real file systems.

A commit runs on a file system in a file, and is killed before one of its system calls. A copy of that file, made at once and
at one instant, is the disk after a power loss: what was only in the page cache is gone. It is mounted, which replays the
journal, and the images in it have to be what every crash may leave: the overlay reads as before, both are consistent
(leaks at most), a second commit finishes. Here reflinks, direct writes, preallocated blocks and what a file system
makes of the order of writes and flushes are the real ones.

`make crash` runs many of them; tests/integration/test_power_loss.py a sample. Needs root, in a mount namespace of its own:
unshare --mount tests/campaigns/power_loss.py
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import faults  # noqa: E402
import support  # noqa: E402
from support import MIB  # noqa: E402

FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"], []),
    "xfs": (["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], ["nouuid"]),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], []),
}
# Calls before which the order of things on the disk matters.
CHANGES = {"pwritev", "pwrite64", "copy_file_range", "ioctl", "fallocate", "ftruncate", "fdatasync", "unlinkat", "fsync"}
# Those that a file system with reflinks shares extents by.
SHARES = {"xfs", "btrfs"}


def call(*command):
    result = support.run(*command)
    if result.rc != 0:
        raise SystemExit(f"power_loss: {result}")
    return result


class Disk:
    """A file with a file system; mounted while it is used."""

    def __init__(self, image: Path, place: Path, options):
        self.image, self.place, self.options = image, place, options

    def __enter__(self) -> Path:
        self.place.mkdir(exist_ok=True)
        call("mount", "-o", ",".join(["loop", *self.options]), self.image, self.place)
        return self.place

    def __exit__(self, *_):
        call("umount", self.place)


def much_data(directory) -> faults.Case:
    """Aligned and unaligned data over a snapshot: shared, written directly, and through the page cache."""
    support.create(directory / "base", 24 * MIB)
    support.qemu_io(directory / "base", "write -P 77 1M 2M")
    support.qemu_img("snapshot", "-c", "one", directory / "base")
    support.create(directory / "top", backing="base", cwd=directory)
    support.qemu_io(directory / "top", "write -P 1 0 5M", "write -P 2 7M 300k", "write -P 3 9M 2M", "write -z 14M 1M",
                    "write -P 4 20M 64k")
    return faults.Case("much data over a snapshot", directory, "top", "base")


CASES = [much_data, faults.qcow2_with_snapshot, faults.into_raw, faults.vmdk, faults.delta, faults.into_vpc,
         faults.into_vhdx, faults.into_parallels, faults.removed, faults.wiped_and_removed]


class Lab:
    """An outer file system that copies files at an instant (XFS), and on it the disks that lose power."""

    def __init__(self, place: Path, name: str):
        self.place, self.name = place, name
        self.make, self.options = FILE_SYSTEMS[name]

    def disk(self, image) -> Disk:
        return Disk(self.place / "outer" / image, self.place / "disk", self.options)

    def copy(self, source, target):
        outer = self.place / "outer"
        call("cp", "--reflink=always", outer / source, outer / target)

    def template(self, make_case) -> faults.Case:
        """A fresh file system with the images of a case on it."""
        image = self.place / "outer" / "template"
        image.unlink(missing_ok=True)
        with open(image, "wb") as file:
            file.truncate(400 * MIB)
        call(*self.make, image)
        with self.disk("template") as place:
            directory = place / "images"
            directory.mkdir()
            case = make_case(directory)
            os.sync()
        return case

    def lose_power(self, case: faults.Case, call_name: str, nth: int, fault="KILL"):
        """Commit, cut the power before a call, and look."""
        self.copy("template", "running")
        with self.disk("running"):
            killed = case.commit(fault, nth, call_name)
            self.copy("running", "crashed")
        case.hold(killed.rc == 137, f"it was not killed before {call_name} {nth}", killed)
        with self.disk("crashed"):
            what = f"power lost before {call_name} {nth}"
            case.check_images(f"{what}\n{killed}", finished=False)
            if case.is_removed():
                return
            again = support.run_instar("commit", *case.args, case.path(case.top))
            case.hold(again.rc == 0, "a second commit fails", f"{what}\n{again}")
            case.check_images(f"{what}\n{again}", finished=True)

    def calls(self, case: faults.Case):
        """All places in a commit where the power can be cut, and whether extents were shared in it."""
        self.copy("template", "running")
        with self.disk("running"):
            case.args.append("-v")
            result = case.commit()
            case.args.pop()
            assert result.rc == 0, str(result)
        found = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", result.stderr)}
        places = [(name, nth) for name in sorted(CHANGES & found.keys()) for nth in range(1, found[name] + 1)]
        return places, int(re.search(r"(\d+) shared", result.stderr)[1]) > 0


def run(name: str, sample: int | None, seed: int, fault="KILL", cases=None) -> tuple[int, int, bool]:
    """Try a file system. Returns how many power losses there were, how many violations, and whether extents were shared."""
    tried = violations = 0
    shared = False
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        outer = place / "outer.img"
        with open(outer, "wb") as file:
            file.truncate(4096 * MIB)
        call(*FILE_SYSTEMS["xfs"][0], outer)
        with Disk(outer, place / "outer", []):
            lab = Lab(place, name)
            for make_case in cases or CASES:
                case = lab.template(make_case)
                places, shares = lab.calls(case)
                shared = shared or shares
                if sample is not None:
                    places = random.Random(seed).sample(places, min(sample, len(places)))
                for call_name, nth in places:
                    tried += 1
                    try:
                        lab.lose_power(case, call_name, nth, fault)
                    except AssertionError as violation:
                        violations += 1
                        print(f"VIOLATION {name}: {violation}", file=sys.stderr)
                print(f"{name}, {case.name}: {len(places)} power losses", flush=True)
    return tried, violations, shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file-system", choices=FILE_SYSTEMS, action="append", help="only this one; may be repeated")
    parser.add_argument("--sample", type=int, help="this many power losses of each case, and not all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unflushed", action="store_true",
                        help="flushes of the base are skipped: there must be violations, or nothing is tested")
    options = parser.parse_args()
    fault = "KILL-UNFLUSHED" if options.unflushed else "KILL"
    bad = 0
    for name in options.file_system or FILE_SYSTEMS:
        tried, violations, shared = run(name, options.sample, options.seed, fault)
        how = "extents shared" if shared else "no extents shared"
        print(f"{name}: {tried} power losses, {how}, {violations} violations")
        bad += violations + (shared != (name in SHARES)) + (tried == 0)
    return 1 if bad else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
