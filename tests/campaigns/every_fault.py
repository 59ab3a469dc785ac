#!/usr/bin/env python3
"""`make faults`: all faults of all cases, of commits (faults.py) and of the other commands (commands.py)."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import commands  # noqa: E402
import faults  # noqa: E402
import support  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="this many faults of each case, and not all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", action="append", help="only the cases of these names; may be repeated")
    options = parser.parse_args()
    chosen = [case for case in (*faults.CASES, *commands.ALL) if options.case is None or case.__name__ in options.case]
    tried, violations = Counter(), Counter()
    with tempfile.TemporaryDirectory() as place:
        for make in chosen:
            directory = Path(place) / make.__name__
            directory.mkdir()
            case = make(directory)
            all_faults = list(case.faults())
            if options.sample is not None:
                all_faults = random.Random(options.seed).sample(all_faults, min(options.sample, len(all_faults)))
            for fault in all_faults:
                try:
                    tried[fault[0]] += case.inject(*fault)
                except faults.Violation as violation:
                    violations[fault[0]] += 1
                    print(f"VIOLATION {fault}: {violation}", file=sys.stderr)
            print(f"{case.name}: {len(all_faults)} faults", flush=True)
    for fault in faults.FAULTS:
        print(f"{fault:7} {tried[fault]:5} injected, {violations[fault]} violations")
    return 1 if sum(violations.values()) else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
