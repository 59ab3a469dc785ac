#!/usr/bin/env python3
"""Every state that a power loss can leave, of small images: the tests that replay what commands wrote, with all subsets of what
was not flushed, and not with a few of them.

Between two flushes, the unflushed writes are torn into sectors; where these are at most --pieces (14), all 2^14 subsets are looked
at. Where only the writes themselves are so few, all subsets of writes are, and the smallest of them are torn, too. Where there are
more, states are drawn, as in the tests. Images of more than a MiB have one piece less for each doubling. Of a part of the states,
the run that follows loses power as well.

What each state has to be is what the tests ask: what was read reads the same; no snapshot, no other image has changed; nothing is
corrupt; and a second run finishes. The commands are commits of all formats into all formats, also with bitmaps that are merged and
with children that get another parent, rebases, resizes, repairs, and conversions into images that exist. What the host alone does
(wiping and removing an overlay, undoing an interrupted conversion by `recover`) is stopped at each system call by power_loss.py.

A state is counted once, in whichever tests it turns up. `make every-state` wants a million of them, and no violation; the states
and flushes are added up from what each test writes down (INSTAR_EVERY_STATE_LOG).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("parallels", "qcow", "qcow2", "vdi", "vhd", "vhdx", "vmdk", "raw")
PACKAGES = ["-pinstar-guest-sdk", *(f"-pinstar-{name}-driver" for name in FORMATS), "-pinstar-fuzz"]
#: Bytes of what stands for a state.
SUM = 16
#: A long test of damaged images, which `make crash` runs.
SKIPPED = "of_what_covers_more_code"
#: So that the C library keeps the memory of images.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_TOP_PAD_": "67108864"}


def add_up(folder: Path) -> tuple[set[bytes], list[int]]:
    """The states of all tests, and the numbers of flushes before which all subsets of sectors, all subsets of writes, and
    drawn ones were looked at."""
    states, flushes = set(), [0, 0, 0]
    for path in folder.iterdir():
        line, _, sums = path.read_bytes().partition(b"\n")
        flushes = [known + int(number) for known, number in zip(flushes, line.split(), strict=True)]
        if len(sums) % SUM:
            raise SystemExit(f"every-state: {path} is cut")
        states.update(sums[at:at + SUM] for at in range(0, len(sums), SUM))
    return states, flushes


def tests(filters: list[str]) -> list[str]:
    """The command that runs the tests."""
    chosen = [*PACKAGES, "--features", "instar-guest-sdk/memory"]
    if subprocess.run(["cargo", "nextest", "--version"], capture_output=True, check=False).returncode == 0:
        return ["cargo", "nextest", "run", "--cargo-profile", "checked", "--no-fail-fast", *chosen,
                "-E", f"not test({SKIPPED})", *filters]
    return ["cargo", "test", "--profile", "checked", "--no-fail-fast", *chosen, "--", "--skip", SKIPPED, *filters]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=14, help="sectors or writes of which all subsets are looked at (14)")
    parser.add_argument("--least", type=int, default=1_000_000, help="fewer states than this are a failure (a million)")
    parser.add_argument("tests", nargs="*", help="only tests whose names contain one of these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **MALLOC, "INSTAR_EVERY_STATE": str(options.pieces), "INSTAR_EVERY_STATE_LOG": folder}
        start = time.monotonic()
        failed = subprocess.run(tests(options.tests), cwd=ROOT, env=environment, check=False).returncode != 0
        states, (sectors, writes, drawn) = add_up(Path(folder))
    print(f"{len(states)} different states in {time.monotonic() - start:.0f} s; before {sectors} flushes all subsets of sectors, "
          f"before {writes} all subsets of writes, before {drawn} drawn ones; {'a violation' if failed else '0 violations'}")
    if len(states) < options.least:
        print(f"every-state: these are fewer than {options.least}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
