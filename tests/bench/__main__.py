#!/usr/bin/env python3
"""Measures `instar commit`, in both sandboxes, against `qemu-img commit`, and convert and rebase against theirs; and what
the promises of a commit cost.

Each run commits images of its own, written as a guest writes them and synced before the clock starts; those of all programs
are written side by side. The programs take turns, each of them every turn equally often, so that whatever else the machine and
its disk do hits all of them. The first run of each is not counted: it warms the caches, counts the exits of the sandbox, the
bytes by the way they took and the memory, and its results are compared byte by byte. Where data is copied from end to end, one
more takes its turn: what the kernel alone needs for it. `qemu-img` commits no child of a VHD or VHDX: there the kernel is what
is measured against, and the bytes are those that it leaves of the same writes in qcow2 images.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import commands as others  # noqa: E402
import growth  # noqa: E402
import kernel as alone  # noqa: E402
import promises as promised  # noqa: E402
import report as reports  # noqa: E402
from disk import measure_each  # noqa: E402
from workloads import built, call, workloads  # noqa: E402

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent
PROGRAMS = reports.PROGRAMS
# Linux counts the memory of the process that called exec, too: a small one has to do that, not this one.
PEAK_MEMORY = """
import os, sys
child = os.fork()
if child == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print("peak-rss-kib", usage.ru_maxrss, file=sys.stderr)
sys.exit(1 if status else 0)
"""


def quietly(command):
    """The first line that a command says, or nothing."""
    try:
        output = subprocess.run(command, text=True, capture_output=True, check=False, cwd=PROJECT).stdout
    except OSError:
        return ""
    return output.splitlines()[0].strip() if output.strip() else ""


def command_of(workload, program, instar, verbose=False):
    """The command line that commits the overlay of the working directory."""
    if program in reports.SANDBOXES:
        sandbox = ["--sandbox", reports.SANDBOXES[program]]
        return [instar, "commit", "-v" if verbose else "-q", *sandbox, *workload.options, workload.overlay]
    return ["qemu-img", "commit", "-q", *workload.options, workload.overlay]


def timed(command, directory):
    """Wall time in seconds of a command that must succeed."""
    with tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        status = subprocess.call(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=stderr)
        seconds = time.perf_counter() - start
        if status:
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip()
            raise SystemExit(f"bench: {' '.join(command)}: exit {status}: {said}")
    return seconds


def verbose_run(command, directory):
    """What `instar commit -v` says of itself, and the peak memory in KiB."""
    done = call([sys.executable, "-S", "-I", "-c", PEAK_MEMORY, *command], cwd=directory)
    facts = {"peak_rss_kib": int(re.search(r"^peak-rss-kib (\d+)$", done.stderr, re.MULTILINE)[1])}
    found = re.search(r"(\d+) exits", done.stderr)
    facts["exits"] = int(found[1]) if found else None
    patterns = {"guest": r"(\d+) bytes read and (\d+) written by the guest", "shared": r"(\d+) shared",
                "kernel": r"(\d+) copied in the kernel", "host": r"(\d+) through the host"}
    ways = {way: re.search(pattern, done.stderr) for way, pattern in patterns.items()}
    facts["bytes"] = {way: sum(map(int, found.groups())) for way, found in ways.items() if found}
    return facts


def programs_of(workload):
    """What commits a workload: `qemu-img` cannot commit a child of a VHD or VHDX."""
    return tuple(reports.SANDBOXES) if workload.differencing else PROGRAMS


def first_runs(workload, directory, instar):
    """The runs that are not counted: what `instar` says of itself, peak memory in KiB, whether all did the same."""
    facts = {}
    with contextlib.ExitStack() as stack:
        places = dict(stack.enter_context(built(workload, directory, programs_of(workload))))
        extents = alone.extents(workload, places["instar"])
        for program in programs_of(workload):
            facts[program] = verbose_run(command_of(workload, program, instar, verbose=True), places[program])
        other = workload
        if workload.differencing:
            # The same writes in qcow2 images.
            other = workload.twin()
            places.update(stack.enter_context(built(other, directory, ["qemu-img"])))
            call(command_of(other, "qemu-img", instar), cwd=places["qemu-img"])
        formats = ["-f", workload.base_format, "-F", other.base_format]
        for program in reports.SANDBOXES:
            bases = [str(places[program] / workload.base), str(places["qemu-img"] / other.base)]
            if subprocess.run(["qemu-img", "compare", "-q", *formats, *bases], check=False).returncode:
                raise SystemExit(f"bench: {program} and qemu-img left different bytes in the base: no timing is worth anything")
    return facts, extents


def measure(workload, directory, instar, runs):
    """All runs of one workload."""
    facts, extents = first_runs(workload, directory, instar)
    programs = programs_of(workload)
    seconds = {program: [] for program in programs}
    kernel = []
    turns = [*programs, "kernel"] if extents else programs
    # A disk may be slower for a while after the images were written, and whoever goes first pays for it: everybody goes first,
    # second and last equally often.
    for number in range(-(-runs // len(turns)) * len(turns)):
        with built(workload, directory, turns) as places:
            first = number % len(turns)
            for program in [*turns[first:], *turns[:first]]:
                if program == "kernel":
                    kernel.append(alone.run(workload, places[program], extents))
                else:
                    seconds[program].append(timed(command_of(workload, program, instar), places[program]))
    medians = {program: statistics.median(seconds[program]) for program in programs}
    theirs = medians.get("qemu-img")
    return {
        "name": workload.name,
        "title": workload.title,
        "goal": workload.goal,
        "bytes": facts["instar"]["bytes"],
        "kernel_goal": workload.kernel_goal,
        "ratio": medians["instar"] / theirs if theirs else None,
        "process_ratio": medians["process"] / theirs if theirs else None,
        "process_over_kvm": medians["process"] / medians["instar"],
        "kernel": {part: statistics.median(run[part] for run in kernel) for part in kernel[0]} if kernel else None,
        "programs": {
            program: {
                "median": medians[program],
                "min": min(seconds[program]),
                "max": max(seconds[program]),
                "seconds": seconds[program],
                "peak_rss_kib": facts[program]["peak_rss_kib"],
                "exits": facts[program]["exits"],
            }
            for program in programs
        },
    }


def describe(instar, directory, runs, quick):
    """What was measured, and where."""
    cpu = ""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
        flags = ""
        for line in info:
            key, _, value = line.partition(":")
            if key.strip() == "model name" and not cpu:
                cpu = value.strip()
            if key.strip() == "flags" and not flags:
                flags = value
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": quietly(["git", "describe", "--always", "--dirty"]),
        "instar": quietly([instar, "--version"]),
        "qemu_img": quietly(["qemu-img", "--version"]),
        "kernel": platform.release(),
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "kvm_is_nested": " hypervisor" in flags,
        "file_system": quietly(["stat", "-f", "-c", "%T", str(directory)]),
        "mount_options": quietly(["findmnt", "-n", "-o", "OPTIONS", "-T", str(directory)]),
        "runs": runs,
        "quick": quick,
    }


def arguments():
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instar", default=str(PROJECT / "target/stage/bench/bin/instar"),
                        help="the program to measure, with the plugins that it finds (default: that of `make benched`)")
    parser.add_argument("--runs", type=int, help="runs that count, of each program, at least: each has every turn equally often (default 7; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small images")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this workload; may be repeated")
    parser.add_argument("--dir", help="where the images go: the file system to measure on (default: $TMPDIR)")
    parser.add_argument("--no-growth", action="store_true", help="leave out how cost grows with data and size")
    parser.add_argument("--commands", action="store_true", help="only the commands besides commit: convert and rebase")
    parser.add_argument("--promises", action="store_true", help="only what --verify, --digest and --atomic cost")
    parser.add_argument("--write-docs", action="store_true", help="refresh the tables and the plot of docs/performance.md")
    options = parser.parse_args()
    options.runs = options.runs or (3 if options.quick else 7)
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.write_docs and (options.quick or options.only or options.no_growth):
        parser.error("--write-docs wants all of it, in full size")
    for program in (options.instar, "qemu-img"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not there")
    options.workloads = [] if options.commands or options.promises else workloads(options.quick)
    options.others = [] if options.promises else others.commands(options.quick)
    options.promised = [] if options.commands else promised.promises(options.quick)
    known = [workload.name for workload in [*options.workloads, *options.others, *options.promised]]
    unknown = set(options.only or ()) - set(known)
    if unknown:
        names = ", ".join(known)
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {names}")
    if options.only:
        options.workloads = [workload for workload in options.workloads if workload.name in options.only]
        options.others = [command for command in options.others if command.name in options.only]
        options.promised = [promise for promise in options.promised if promise.name in options.only]
    return options


def main():
    """Measure, print, keep."""
    options = arguments()
    instar = os.path.abspath(shutil.which(options.instar))
    with tempfile.TemporaryDirectory(prefix="instar-bench.", dir=options.dir) as name:
        directory = pathlib.Path(name)
        report = {"machine": describe(instar, directory, options.runs, options.quick)}
        for key, chosen, measured in (("results", options.workloads, measure), ("commands", options.others, others.measure),
                                      ("promises", options.promised, promised.measure)):
            report[key] = measure_each(chosen, directory, lambda one, place: measured(one, place, instar, options.runs))
        if not (options.only or options.no_growth or options.commands or options.promises):
            # Where giving space back costs the disk nothing: with the option `discard`, ext4 waits for it.
            with mounted("xfs", directory) as place:
                report["growth"] = growth.measure(place or directory, instar, options.quick, verbose_run, timed)

    results = PROJECT / "bench-results"
    results.mkdir(exist_ok=True)
    stamp = report["machine"]["date"].replace(":", "").replace("+0000", "Z")
    path = results / f"{stamp}{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["results"]:
        print(reports.markdown(report))
    if report["commands"]:
        print(f"\n{others.table(report['commands'])}")
    if report["promises"]:
        print(f"\n{promised.table(report['promises'])}")
    print(f"\nAll numbers: {path.relative_to(PROJECT)}", file=sys.stderr)
    if options.write_docs:
        if report["results"]:
            reports.write_docs(report, PROJECT / "docs")
        for key, part in (("commands", others), ("promises", promised)):
            if report[key]:
                body = f"{reports.heading(report['machine'])}\n\n{part.table(report[key])}"
                reports.write_part(PROJECT / "docs/performance.md", part.MARKS, body)


if __name__ == "__main__":
    main()
