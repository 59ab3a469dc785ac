#!/usr/bin/env python3
"""Power losses of the real program on real file systems.

A command runs on a file system in a file, and is killed before one of its system calls. A copy of that file, made at once and
at one instant, is the disk after a power loss: what was only in the page cache is gone. It is mounted, which replays the
journal, and the images in it have to be what every crash may leave: an overlay reads as before, all are consistent (leaks at
most), a second run finishes, also one after a second power loss, or after another command. Here reflinks, direct writes, preallocated blocks and what a file system
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
import commands  # noqa: E402
import faults  # noqa: E402
import support  # noqa: E402
from support import MIB  # noqa: E402

FILE_SYSTEMS = {
    "ext4": (["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"], []),
    "xfs": (["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], ["nouuid"]),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], []),
}
# Calls before which the order of things on the disk matters.
CHANGES = {"pwritev", "pwrite64", "copy_file_range", "ioctl", "fallocate", "ftruncate", "fdatasync", "fsync", "linkat",
           "renameat", "unlinkat"}
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

    def lose_power(self, case: faults.Case, call_name: str, nth: int, fault="KILL", again=None, sequel=None):
        """Run, cut the power before a call, and look; then run again, and cut it `again`, before another call; then let the
        operator go on with another command, the `sequel`; then run to the end."""
        self.copy("template", "running")
        with self.disk("running"):
            killed = case.run(fault, nth, call_name)
            self.copy("running", "crashed")
        case.hold(killed.rc == 137, f"it was not killed before {call_name} {nth}", killed)
        what = f"power lost before {call_name} {nth}\n{killed}"
        if again is not None:
            with self.disk("crashed"):
                case.check_images(what, finished=False)
                if case.is_removed():
                    return
                # It may have less to do, and end before that call.
                killed = case.run(fault, again[1], again[0])
                self.copy("crashed", "again")
            case.hold(killed.rc in (0, 137), "the second run fails", f"{what}\n{killed}")
            what = f"{what}\nand again before {again[0]} {again[1]}\n{killed}"
            self.copy("again", "crashed")
        with self.disk("crashed"):
            case.check_images(what, finished=False)
            if case.is_removed():
                return
            if sequel is not None:
                done = support.run_instar(*case.of_sequel(sequel))
                what = f"{what}\n{done}"
                # A repair of something less leaves the rest.
                case.hold(done.rc == 0 or (sequel[0], done.rc) == ("check", 2), "another command fails afterwards", what)
                case.check_images(what, finished=False)
                if not case.goes_on(sequel):
                    return
            finished = case.again()
            case.hold(finished.rc == 0, "a second run fails", f"{what}\n{finished}")
            case.check_images(f"{what}\n{finished}", finished=True)

    def calls(self, case: faults.Case):
        """All places in a commit where the power can be cut, and whether extents were shared in it."""
        self.copy("template", "running")
        with self.disk("running"):
            result = case.run("COUNT", 0, "none", "-v")
            assert result.rc == 0, str(result)
        found = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", result.stderr)}
        places = [(name, nth) for name in sorted(CHANGES & found.keys()) for nth in range(1, found[name] + 1)]
        shared = re.search(r"(\d+) shared", result.stderr)
        return places, shared is not None and int(shared[1]) > 0


def turns(places, sample: int | None, rng, sequels):
    """What is tried of a case: every place, then a few with a second power loss or another command after the first."""
    if sample is not None:
        places = rng.sample(places, min(sample, len(places)))
    for place in places:
        yield place, {}
    for place in rng.sample(places, max(len(places) // 4, min(len(places), 1))):
        yield place, {"again": rng.choice(places)}
    for sequel in sequels:
        for place in rng.sample(places, max(len(places) // 8, min(len(places), 1))):
            yield place, {"sequel": sequel}


def run(name: str, sample: int | None, seed: int, fault="KILL", cases=()) -> tuple[int, int, bool]:
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
            for make_case in cases:
                case = lab.template(make_case)
                places, shares = lab.calls(case)
                shared = shared or shares
                # Skipped flushes are a matter of the first run.
                sequels = case.sequels if fault == "KILL" else []
                count = 0
                for (call_name, nth), more in turns(places, sample, random.Random(seed), sequels):
                    count += 1
                    try:
                        lab.lose_power(case, call_name, nth, fault, **more)
                    except AssertionError as violation:
                        violations += 1
                        print(f"VIOLATION {name}: {more} {violation}", file=sys.stderr)
                tried += count
                print(f"{name}, {case.name}: {count} power losses", flush=True)
    return tried, violations, shared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file-system", choices=FILE_SYSTEMS, action="append", help="only this one; may be repeated")
    parser.add_argument("--sample", type=int, help="this many power losses of each case, and not all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", help="only the cases of these names; may be repeated")
    parser.add_argument("--commits", action="store_true", help="only commits, and none of the other commands")
    parser.add_argument("--unflushed", action="store_true",
                        help="flushes of the base are skipped: there must be violations, or nothing is tested")
    options = parser.parse_args()
    fault = "KILL-UNFLUSHED" if options.unflushed else "KILL"
    bad = 0
    chosen = [case for case in (*CASES, *(() if options.commits else commands.ALL)) if options.case is None or case.__name__ in options.case]
    for name in options.file_system or FILE_SYSTEMS:
        tried, violations, shared = run(name, options.sample, options.seed, fault, chosen)
        how = "extents shared" if shared else "no extents shared"
        print(f"{name}: {tried} power losses, {how}, {violations} violations")
        # Where extents can be shared, some cases share some.
        bad += violations + (shared != (name in SHARES) and options.case is None) + (tried == 0)
    return 1 if bad else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
