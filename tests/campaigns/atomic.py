#!/usr/bin/env python3
"""Kills and power losses of `instar commit --atomic` on real file systems.

A commit is killed before one of its system calls: where the target is cloned (XFS, btrfs) and where an undo log is kept (ext4).
Twice it is looked at: at the files as they are, and at the disk as a power loss at that instant leaves it. Each time the
target, after `instar recover` if there is a log, has to be byte for byte what it was, or what it should be; the overlay has
to read as before; a second commit has to finish.

With --unflushed, flushes of files without a name are skipped (the clone, the log), and said to be done: there must be
violations, or nothing is tested. Needs root, in a mount namespace of its own: unshare --mount tests/campaigns/atomic.py
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import faults  # noqa: E402
import power_loss  # noqa: E402
import support  # noqa: E402
from support import MIB  # noqa: E402

PLACES = {"pwritev", "pwrite64", "copy_file_range", "ioctl", "fallocate", "ftruncate", "fdatasync", "fsync", "linkat",
          "renameat", "renameat2", "unlinkat"}
WAYS = {"ext4": "undo-log", "xfs": "clone", "btrfs": "clone"}


CASES = [faults.qcow2_with_snapshot, faults.into_raw, faults.vmdk, faults.into_vpc, power_loss.much_data]


class Lab(power_loss.Lab):
    """Commits that are killed on a disk, which a copy is made of at once."""

    def commit(self, case, fault="COUNT", nth=0, call="none"):
        command = [support.instar_binary(), "commit", "--atomic", *case.args, case.path(case.top)]
        return support.run(faults.injector(), fault, str(nth), call, case.directory, "--", *command)

    def calls(self, case):
        """All places where a commit can be killed."""
        self.copy("template", "running")
        with self.disk("running"):
            case.before = support.digest(case.path(case.base))
            result = self.commit(case)
            assert result.rc == 0, str(result)
            self.check_end(case, result)
        found = {name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", result.stderr)}
        return [(name, nth) for name in sorted(PLACES & found.keys()) for nth in range(1, found[name] + 1)]

    def check_end(self, case, result):
        case.check_images(result, finished=True)
        left = [path.name for path in case.directory.glob(".*") if path.name.startswith(f".{case.base}.instar-undo")]
        case.hold(not left, f"{left} is left", result)

    def check(self, case, what):
        """What every crash may leave, and that it can be finished. Returns whether the target was the old one."""
        base = case.path(case.base)
        log = base.with_name(f".{case.base}.instar-undo")
        if log.exists():
            refused = support.run_instar("info", "-f", case.base_fmt, base)
            case.hold(refused.rc == 1 and "ERROR_RECOVERY_NEEDED" in refused.stderr, "an undo log is not noticed", f"{what}\n{refused}")
            recovered = support.run_instar("recover", base)
            case.hold(recovered.rc == 0 and not log.exists(), "recovery fails", f"{what}\n{recovered}")
        old = support.digest(base) == case.before
        if not old:
            content = support.content_hash(base, case.base_fmt)
            case.hold(content == case.expected, "the target is neither the old one nor the new one", what)
        case.check_images(what, finished=False)
        again = support.run_instar("commit", "--atomic", *case.args, case.path(case.top))
        case.hold(again.rc == 0, "a second commit fails", f"{what}\n{again}")
        self.check_end(case, f"{what}\n{again}")
        return old

    def kill(self, case, call, nth, fault):
        """Returns whether the target was the old one after the kill, and after the power loss."""
        self.copy("template", "running")
        killed = None
        with self.disk("running"):
            killed = self.commit(case, fault, nth, call)
            self.copy("running", "crashed")
            # Threads that copy side by side share the work out anew each time: this one took fewer calls, and came to its end.
            ended = killed.rc == 0 and call == "copy_file_range"
            case.hold(killed.rc == 137 or ended, f"it was not killed before {call} {nth}", killed)
            after_kill = self.check(case, f"killed before {call} {nth}\n{killed}") if fault == "KILL" else None
        with self.disk("crashed"):
            return after_kill, self.check(case, f"power lost before {call} {nth}\n{killed}")


def run(name, sample, seed, fault, cases):
    tried = violations = 0
    states = set()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        outer = place / "outer.img"
        with open(outer, "wb") as file:
            file.truncate(4096 * MIB)
        power_loss.call(*power_loss.FILE_SYSTEMS["xfs"][0], outer)
        with power_loss.Disk(outer, place / "outer", []):
            lab = Lab(place, name)
            for make_case in cases:
                case = lab.template(make_case)
                places = lab.calls(case)
                if sample is not None:
                    # The end, where the order counts, is always there.
                    named = [one for one in places if one[0] in ("linkat", "renameat", "renameat2", "unlinkat", "fsync", "ftruncate")]
                    others = [one for one in places if one not in named]
                    places = named + random.Random(seed).sample(others, min(sample, len(others)))
                for call, nth in places:
                    tried += 1
                    try:
                        states.add(lab.kill(case, call, nth, fault))
                    except AssertionError as violation:
                        violations += 1
                        print(f"VIOLATION {name}: {violation}", file=sys.stderr)
                print(f"{name}, {case.name}: {len(places)} kills", flush=True)
    return tried, violations, states


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file-system", choices=WAYS, action="append", help="only this one; may be repeated")
    parser.add_argument("--sample", type=int, help="this many kills of each case besides those at its end, and not all")
    parser.add_argument("--cases", type=int, help="only so many cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unflushed", action="store_true", help="flushes of files without a name are skipped")
    options = parser.parse_args()
    fault = "KILL-UNNAMED" if options.unflushed else "KILL"
    bad = 0
    for name in options.file_system or WAYS:
        tried, violations, states = run(name, options.sample, options.seed, fault, CASES[: options.cases])
        crashes = {crash for _, crash in states}
        print(f"{name}: {tried} kills, {violations} violations, old and new seen: {crashes == {True, False}}")
        bad += violations + (tried == 0)
    return 1 if bad else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
