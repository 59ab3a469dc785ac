#!/usr/bin/env python3
"""Writes flame graphs of a workload of the benchmark: where the processor is while `instar commit` runs, in either sandbox.

`make profile WORKLOAD=clusters-4k` writes target/profile/clusters-4k-kvm.svg and clusters-4k-process.svg. perf samples the program and, of the process
sandbox, its guest; what a virtual machine does shows as the time that the kernel spends in it. The program keeps its symbols, and
its stacks are unwound by its tables.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from workloads import built, workloads  # noqa: E402

OUTPUT = Path(__file__).resolve().parents[2] / "target/profile"
SANDBOXES = ("kvm", "process")
#: Samples a second: a prime, so that nothing that recurs is always hit or never.
FREQUENCY = 1999
#: Bytes of each stack that are kept to be unwound.
STACK = 16384


def piped(command: list[str], given: bytes) -> bytes:
    """What a program makes of this."""
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"profile: {command[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def sampled(instar: Path, workload, sandbox: str, runs: int, directory: Path) -> bytes:
    """The samples of so many commits, each of images of its own, as perf prints them."""
    printed = b""
    for run in range(runs):
        with built(workload, directory, ["instar"]) as made:
            place = made["instar"]
            data = directory / f"perf-{sandbox}-{run}.data"
            command = [str(instar), "commit", "-q", "--sandbox", sandbox, *workload.options, workload.overlay]
            record = ["perf", "record", "-q", "-F", str(FREQUENCY), "--call-graph", f"dwarf,{STACK}", "-o", str(data)]
            done = subprocess.run([*record, "--", *command], cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"profile: {' '.join(record)} {' '.join(command)}: {done.stderr.strip()}")
            printed += piped(["perf", "script", "--no-inline", "-i", str(data)], b"")
            data.unlink()
    return printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", default="", help="a workload of the benchmark; without one, they are listed")
    parser.add_argument("--instar", required=True, type=Path, help="the program")
    parser.add_argument("--tools", required=True, type=Path, help="the directory of inferno's programs")
    parser.add_argument("--sandbox", choices=SANDBOXES, action="append", help="only this one")
    parser.add_argument("--runs", type=int, default=3, help="commits that are sampled (3)")
    parser.add_argument("--full", action="store_true", help="images as large as those of `make bench`, and not of `bench-quick`")
    parser.add_argument("--dir", type=Path, help="where the images are made")
    options = parser.parse_args()
    known = {workload.name: workload for workload in workloads(quick=not options.full)}
    if options.workload not in known:
        print(f"profile: WORKLOAD is one of {', '.join(known)}", file=sys.stderr)
        return 2
    if shutil.which("perf") is None:
        print("profile: perf is needed: apt-get install linux-perf", file=sys.stderr)
        return 1
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for sandbox in options.sandbox or SANDBOXES:
        with tempfile.TemporaryDirectory(dir=options.dir) as directory:
            printed = sampled(options.instar.resolve(), known[options.workload], sandbox, options.runs, Path(directory))
        folded = piped([str(options.tools / "inferno-collapse-perf")], printed)
        if not folded.strip():
            raise SystemExit("profile: perf has taken no sample: take a larger workload, or more --runs")
        title = f"instar commit, {options.workload}, sandbox {sandbox}"
        graph = piped([str(options.tools / "inferno-flamegraph"), "--title", title], folded)
        path = OUTPUT / f"{options.workload}-{sandbox}.svg"
        path.write_bytes(graph)
        print(f"{path}: {len(folded.splitlines())} different stacks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
