#!/usr/bin/env python3
"""`make faults`: all faults of all cases, of commits (faults.py), of the other commands (commands.py), of atomic commits on file
systems that share extents and on one that does not (atomic_faults.py), and of commits into block devices (device_faults.py). The last
two take root, in a mount namespace of its own:
unshare --mount tests/campaigns/every_fault.py
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import atomic_faults  # noqa: E402
import commands  # noqa: E402
import device_faults  # noqa: E402
import faults  # noqa: E402
import support  # noqa: E402


def try_all(case, options, tried, violations):
    """Inject all faults of a case, or a sample of them."""
    all_faults = list(case.faults())
    if options.sample is not None:
        all_faults = random.Random(options.seed).sample(all_faults, min(options.sample, len(all_faults)))
    for fault in all_faults:
        try:
            tried[fault[0]] += case.inject(*fault)
        except faults.Violation as violation:
            violations[fault[0]] += 1
            print(f"VIOLATION {fault}: {violation}", file=sys.stderr)
    return len(all_faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="this many faults of each case, and not all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", help="only the cases of these names; may be repeated")
    options = parser.parse_args()
    wanted = lambda case: options.case is None or case.__name__ in options.case  # noqa: E731
    tried, violations = Counter(), Counter()
    with tempfile.TemporaryDirectory() as place:
        for make in filter(wanted, (*faults.CASES, *commands.ALL)):
            directory = Path(place) / make.__name__
            directory.mkdir()
            case = make(directory)
            print(f"{case.name}: {try_all(case, options, tried, violations)} faults", flush=True)
        for kind, cases in atomic_faults.ON.items():
            chosen = list(filter(wanted, cases))
            if chosen and os.geteuid() != 0:
                print(f"{len(chosen)} cases on {kind}: not tried, because mounting takes root", flush=True)
                continue
            for make in chosen:
                with atomic_faults.mounted(kind, Path(place)) as disk:
                    directory = disk / "images"
                    directory.mkdir()
                    case = make(directory)
                    way = atomic_faults.way_of(case)
                    assert way == ("undo-log" if kind == "ext4" else "clone"), (kind, way)
                    print(f"{case.name}, on {kind}: {try_all(case, options, tried, violations)} faults", flush=True)
        for make in filter(wanted, device_faults.CASES):
            if os.geteuid() != 0:
                print(f"{make.__name__}: not tried, because loop devices take root", flush=True)
                continue
            with device_faults.attached(Path(place)) as loop:
                directory = Path(place) / f"device.{make.__name__}"
                directory.mkdir()
                case = make(directory, loop)
                print(f"{case.name}: {try_all(case, options, tried, violations)} faults", flush=True)
    for fault in faults.FAULTS:
        print(f"{fault:7} {tried[fault]:5} injected, {violations[fault]} violations")
    return 1 if sum(violations.values()) else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
