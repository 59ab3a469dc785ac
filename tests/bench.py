#!/usr/bin/env python3
"""Measures `instar commit` against `qemu-img commit`.

Each workload is built once. Each run commits a fresh copy of it, synced to disk before the clock starts; the two
programs take turns, so that whatever else the machine does hits both. The first run of each is not counted: it warms
the caches, counts the exits of the virtual machine and the memory, and its two results are compared byte by byte.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from demo_fill import Image  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PROJECT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PROGRAMS = ("instar", "qemu-img")
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


@dataclasses.dataclass
class Workload:
    """A base and an overlay, and sometimes layers between them; sizes in bytes."""

    name: str
    title: str
    disk: int
    cluster: int = 64 * KIB
    sequential: int = 0
    scattered: int = 0
    full_base: bool = False
    base_format: str = "qcow2"
    overlay_format: str = "qcow2"
    compress: str = ""
    layers: int = 1

    @property
    def base(self):
        """Name of the image that is committed into."""
        return f"base.{self.base_format}"

    @property
    def overlay(self):
        """Name of the image that is committed."""
        return f"overlay.{self.overlay_format}"

    @property
    def options(self):
        """What both programs are given besides the overlay."""
        return ["-b", self.base, "-d"] if self.layers > 1 else []

    def build(self, directory):
        """Make the images; the same bytes every time."""
        if (self.base_format, self.overlay_format, self.compress, self.layers) == ("qcow2", "qcow2", "", 1):
            self.build_qcow2(directory)
        else:
            self.build_with_qemu_io(directory)

    def build_with_qemu_io(self, directory):
        """Other formats than one qcow2 over another: layers with one pattern of bytes to a MiB, one after the other."""
        call(["qemu-img", "create", "-q", "-f", self.base_format, self.base, str(self.disk)], cwd=directory)
        below, below_format = self.base, self.base_format
        share = self.sequential // self.layers
        for layer in range(self.layers):
            name = self.overlay if layer == self.layers - 1 else f"layer{layer}.{self.overlay_format}"
            options = ["-o", f"compression_type={self.compress}"] if self.compress else []
            call(["qemu-img", "create", "-q", "-f", self.overlay_format, *options, "-b", below, "-F", below_format, name],
                 cwd=directory)
            writes = []
            for at in range(layer * share, (layer + 1) * share, MIB):
                writes += ["-c", f"write {'-c ' if self.compress else ''}-P {1 + at // MIB % 255} {at} 1M"]
            for start in range(0, len(writes), 400):
                call(["qemu-io", "-f", self.overlay_format, *writes[start : start + 400], name], cwd=directory)
            below, below_format = name, self.overlay_format

    def build_qcow2(self, directory):
        """One qcow2 over another, with random bytes."""
        base, overlay = directory / self.base, directory / self.overlay
        options = ["-q", "-f", "qcow2", "-o", f"cluster_size={self.cluster}"]
        call(["qemu-img", "create", *options, str(base), str(self.disk)])
        call(["qemu-img", "create", *options, "-b", base.name, "-F", "qcow2", str(overlay)])
        rng = random.Random(20240229)
        if self.full_base:
            fill(base, 0, self.disk, rng)
        if self.sequential:
            fill(overlay, 0, self.sequential, rng)
        if self.scattered:
            image = Image(str(overlay), writable=True)
            for cluster in sorted(rng.sample(range(self.disk // self.cluster), self.scattered)):
                image.write(cluster * self.cluster, rng.randbytes(self.cluster))
            image.file.close()


def workloads(quick):
    """The workloads; the quick ones are smaller, not other ones."""
    large, scattered, small = (64 * MIB, 256, 1024) if quick else (GIB, 4096, 16384)
    return [
        Workload("empty", "empty overlay (start-up)", GIB),
        Workload("sequential-new", f"{text(large)} sequential, into new clusters", large, sequential=large),
        Workload("sequential-over", f"{text(large)} sequential, over existing clusters", large, sequential=large,
                 full_base=True),
        Workload("scattered-64k", f"{text(scattered * 64 * KIB)} in {scattered:,} scattered 64 KiB clusters of 64 GiB",
                 64 * GIB, scattered=scattered),
        Workload("scattered-4k", f"{text(small * 4 * KIB)} in {small:,} scattered 4 KiB clusters of 16 GiB",
                 16 * GIB, cluster=4 * KIB, scattered=small),
        Workload("zlib", f"{text(large)} of compressed clusters (zlib)", large, sequential=large, compress="zlib"),
        Workload("zstd", f"{text(large)} of compressed clusters (zstd)", large, sequential=large, compress="zstd"),
        Workload("raw", f"{text(large)} sequential, qcow2 into raw", large, sequential=large, base_format="raw"),
        Workload("vmdk", f"{text(large // 4)} sequential, vmdk into vmdk", large, sequential=large // 4,
                 base_format="vmdk", overlay_format="vmdk"),
        Workload("chain", f"8 layers of {text(large // 16)}, into the lowest", large, sequential=large // 2, layers=8),
    ]


def fill(path, offset, length, rng):
    """Write random bytes into an image, one MiB after the other."""
    image = Image(str(path), writable=True)
    for at in range(offset, offset + length, MIB):
        image.write(at, rng.randbytes(MIB))
    image.file.close()


def text(size):
    """A size for people."""
    return f"{size // GIB} GiB" if size % GIB == 0 else f"{size // MIB} MiB"


def call(command, **options):
    """Run a command that must succeed; returns what it said."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()}")
    return done


def quietly(command):
    """The first line that a command says, or nothing."""
    try:
        output = subprocess.run(command, text=True, capture_output=True, check=False, cwd=PROJECT).stdout
    except OSError:
        return ""
    return output.splitlines()[0].strip() if output.strip() else ""


def fresh_copy(template, target):
    """A copy of the images, on disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    call(["cp", "--reflink=auto", "--sparse=always", *map(str, template.iterdir()), str(target)])
    call(["sync"])


def command_of(workload, program, instar, verbose=False):
    """The command line that commits the overlay of the working directory."""
    if program == "instar":
        return [instar, "commit", "-v" if verbose else "-q", *workload.options, workload.overlay]
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


def first_runs(workload, template, directory, instar):
    """The runs that are not counted: exits of the virtual machine, peak memory in KiB, whether both did the same."""
    memory = {}
    for program in PROGRAMS:
        fresh_copy(template, directory / program)
        command = command_of(workload, program, instar, verbose=True)
        done = call([sys.executable, "-S", "-I", "-c", PEAK_MEMORY, *command], cwd=directory / program)
        memory[program] = int(re.search(r"^peak-rss-kib (\d+)$", done.stderr, re.MULTILINE)[1])
        if program == "instar":
            found = re.search(r"(\d+) exits", done.stderr)
    bases = [str(directory / program / workload.base) for program in PROGRAMS]
    formats = ["-f", workload.base_format, "-F", workload.base_format]
    if subprocess.run(["qemu-img", "compare", "-q", *formats, *bases], check=False).returncode:
        raise SystemExit("bench: the two programs left different bytes in the base: no timing is worth anything")
    return int(found[1]) if found else None, memory


def measure(workload, directory, instar, runs):
    """All runs of one workload."""
    template = directory / "template"
    template.mkdir()
    workload.build(template)
    exits, memory = first_runs(workload, template, directory, instar)
    seconds = {program: [] for program in PROGRAMS}
    for number in range(runs):
        # Whoever goes first in one round goes last in the next.
        for program in PROGRAMS if number % 2 == 0 else reversed(PROGRAMS):
            fresh_copy(template, directory / program)
            seconds[program].append(timed(command_of(workload, program, instar), directory / program))
    for child in directory.iterdir():
        shutil.rmtree(child)
    medians = {program: statistics.median(seconds[program]) for program in PROGRAMS}
    return {
        "name": workload.name,
        "title": workload.title,
        "exits": exits,
        "ratio": medians["instar"] / medians["qemu-img"],
        "programs": {
            program: {
                "median": medians[program],
                "min": min(seconds[program]),
                "max": max(seconds[program]),
                "seconds": seconds[program],
                "peak_rss_kib": memory[program],
            }
            for program in PROGRAMS
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
        "runs": runs,
        "quick": quick,
    }


def span(numbers):
    """`median (min–max)` in milliseconds or seconds."""
    if numbers["median"] < 0.5:
        return f"{numbers['median'] * 1e3:.1f} ms ({numbers['min'] * 1e3:.1f}–{numbers['max'] * 1e3:.1f})"
    return f"{numbers['median']:.2f} s ({numbers['min']:.2f}–{numbers['max']:.2f})"


def table(report):
    """The results in Markdown."""
    where = report["machine"]
    nested = "KVM inside another virtual machine" if where["kvm_is_nested"] else "KVM on bare metal"
    lines = [
        f"{where['date'][:10]}, revision {where['revision']}; {where['qemu_img']}; {where['cpu']}, {where['cpus']} "
        f"processors, {nested}; Linux {where['kernel']}, {where['file_system']}; {where['runs']} runs of each, median "
        "(min–max) of the wall time of the whole process.",
        "",
        "| workload | instar | qemu-img | instar / qemu-img | exits | peak memory, instar / qemu-img |",
        "|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        ours, theirs = (result["programs"][program] for program in PROGRAMS)
        exits = "?" if result["exits"] is None else f"{result['exits']:,}"
        memory = " / ".join(f"{numbers['peak_rss_kib'] / 1024:.0f} MiB" for numbers in (ours, theirs))
        cells = (result["title"], span(ours), span(theirs), f"{result['ratio']:.2f}", exits, memory)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_docs(markdown):
    """Put the table between the marks in docs/performance.md."""
    page = PROJECT / "docs" / "performance.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"bench: {page} has no {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n\n{markdown}\n\n{END}{after}", encoding="utf-8")


def main():
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instar", default=str(PROJECT / "target/release/instar"), help="the program to measure")
    parser.add_argument("--runs", type=int, help="runs that count, of each program (default 7; 5 with --quick)")
    parser.add_argument("--quick", action="store_true", help="small images")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this workload; may be repeated")
    parser.add_argument("--dir", help="where the images go: the file system to measure on (default: $TMPDIR)")
    parser.add_argument("--write-docs", action="store_true", help="refresh the table in docs/performance.md")
    options = parser.parse_args()
    runs = options.runs or (5 if options.quick else 7)
    if runs < 1:
        parser.error("--runs must be at least 1")
    if options.quick and options.write_docs:
        parser.error("--write-docs wants the full sizes")
    for program in (options.instar, "qemu-img"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not there")
    chosen = workloads(options.quick)
    unknown = set(options.only or ()) - {workload.name for workload in chosen}
    if unknown:
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(w.name for w in chosen)}")
    if options.only:
        chosen = [workload for workload in chosen if workload.name in options.only]

    instar = os.path.abspath(shutil.which(options.instar))
    with tempfile.TemporaryDirectory(prefix="instar-bench.", dir=options.dir) as name:
        directory = pathlib.Path(name)
        report = {"machine": describe(instar, directory, runs, options.quick), "results": []}
        for workload in chosen:
            print(f"{workload.title} …", file=sys.stderr, flush=True)
            report["results"].append(measure(workload, directory, instar, runs))

    markdown = table(report)
    print(markdown)
    results = PROJECT / "bench-results"
    results.mkdir(exist_ok=True)
    stamp = report["machine"]["date"].replace(":", "").replace("+0000", "Z")
    path = results / f"{stamp}{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nAll numbers: {path.relative_to(PROJECT)}", file=sys.stderr)
    if options.write_docs:
        write_docs(markdown)


if __name__ == "__main__":
    main()
