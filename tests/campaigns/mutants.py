#!/usr/bin/env python3
"""Would the tests notice? cargo-mutants changes one operator, condition or result of the code after the other, and runs the tests of
the crate that it belongs to.

`make mutants` tries all (a day), `make mutants-sample` draws some of them with a seed, so that each run can be repeated. What is
mutated, how it is tested, and which mutants cannot be told from the code stands in .cargo/mutants.toml, each with its reason. The
exit status is 1 if a mutant survives; reports are in target/mutants.out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / ".cargo/mutants.toml"
REPORTS = ROOT / "target"
#: Options of the configuration that say how mutants are built and tested.
HOW = ("test_tool", "profile", "minimum_test_timeout", "timeout_multiplier")
#: The crate of which half of the tests are built with a feature only, which no other crate has.
SDK, SDK_FEATURE = "guest/sdk/", "--features=instar-guest-sdk/memory"
#: Mutants that cargo-mutants 27.1 lists and tries whatever --re says: they are not drawn, and come along with their files.
UNFILTERED = "delete field"


def listed(tool: Path) -> list[str]:
    """The names of all mutants, in the order of the sources."""
    done = subprocess.run([tool, "mutants", "--list", "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"mutants: {done.stderr.strip()}")
    return [mutant["name"] for mutant in json.loads(done.stdout)]


def tried_alone(names: list[str], each: bool) -> list[str]:
    """Options by which only these files are mutated, and only in these ways if `each`: the globs of the configuration would add
    all other files."""
    config = tomllib.loads(CONFIG.read_text())
    options = ["--no-config"]
    for name in HOW:
        options += [f"--{name.replace('_', '-')}", str(config[name])]
    options += [f"--exclude-re={pattern}" for pattern in config["exclude_re"]]
    options += [f"--file={file}" for file in sorted({name.split(":")[0] for name in names})]
    return options + ([f"--re=^{re.escape(name)}$" for name in names] if each else [])


def runs(chosen: list[str], is_all: bool, each: bool) -> list[list[str]]:
    """The options of each run of cargo-mutants: the SDK is built in another way than all other crates."""
    sdk = [name for name in chosen if name.startswith(SDK)]
    rest = [name for name in chosen if not name.startswith(SDK)]
    found = []
    if rest:
        found.append([f"--exclude={SDK}**"] if is_all else tried_alone(rest, each))
    if sdk:
        found.append([*tried_alone(sdk, each), SDK_FEATURE])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path, required=True, help="the directory of cargo-mutants")
    parser.add_argument("--in", dest="folders", action="append", default=[], help="only mutants of files whose paths begin so")
    parser.add_argument("--draw", type=int, help="so many mutants, and not all")
    parser.add_argument("--seed", type=int, default=1, help="which ones (1)")
    parser.add_argument("--list", action="store_true", help="print the mutants, and try none")
    options, others = parser.parse_known_args()
    tool = (options.tools / "cargo-mutants").resolve()
    names = [name for name in listed(tool) if not options.folders or name.startswith(tuple(options.folders))]
    chosen = names
    if options.draw is not None:
        drawable = [name for name in names if UNFILTERED not in name]
        chosen = sorted(random.Random(options.seed).sample(drawable, min(options.draw, len(drawable))))
    print(f"{len(chosen)} of {len(names)} mutants", flush=True)
    if options.list:
        print("\n".join(chosen))
        return 0
    if not chosen:
        return 1
    noticed = True
    for only in runs(chosen, options.draw is None and not options.folders, options.draw is not None):
        done = subprocess.run([tool, "mutants", "--output", REPORTS, *only, *others], cwd=ROOT, check=False)
        # 2: survivors; 3: a timeout, by which a mutant is noticed, too.
        noticed = noticed and done.returncode in (0, 3)
    return 0 if noticed else 1


if __name__ == "__main__":
    sys.exit(main())
