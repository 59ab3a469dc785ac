"""The workloads of the other commands that move data: convert and rebase, against `qemu-img` with as many coroutines as it takes.

A command says what both programs are called with, so that another one is another entry here. What is read is made once and
stays in the page cache; what is written is new in each run. `qemu-img convert` flushes nothing unless it is told to, and so each
conversion is measured twice: both without a flush, and both with one.
"""

import dataclasses
import random
import shutil
import statistics
import subprocess
import time

from report import SANDBOXES, span
from workloads import KIB, MIB, call, text

MARKS = ("<!-- bench-commands:begin -->", "<!-- bench-commands:end -->")
PROGRAMS = (*SANDBOXES, "qemu-img")


@dataclasses.dataclass
class Conversion:
    """A whole disk of random data, from one format into another."""

    size: int
    source: str
    target: str
    durable: bool
    file_system: str

    @property
    def name(self):
        """What `--only` takes."""
        flushed = "" if self.durable else "-unsafe"
        return f"convert-{self.source}-{self.target}-{text(self.size).replace(' ', '').lower()}{flushed}-{self.file_system}"

    @property
    def title(self):
        """What the table says."""
        flushed = "flushed" if self.durable else "without a flush"
        return f"convert {text(self.size)}, {self.source} to {self.target}, {flushed}, on {self.file_system}"

    def prepare(self, place):
        """What is read."""
        raw = place / "disk.raw"
        rng = random.Random(1)
        with open(raw, "wb") as file:
            for _ in range(self.size // MIB):
                file.write(rng.randbytes(MIB))
        if self.source != "raw":
            call(["qemu-img", "convert", "-f", "raw", "-O", self.source, raw, place / f"disk.{self.source}"])
        call(["sync"])

    def fresh(self, place, run):
        """Nothing: the target is new."""

    def arguments(self, program, place, run):
        """What the program is called with."""
        formats = ["-f", self.source, "-O", self.target]
        images = [str(place / f"disk.{self.source}"), str(run / "new")]
        if program == "qemu-img":
            return ["convert", "-q", "-m", "16", "-W", "-t", "writeback" if self.durable else "unsafe", *formats, *images]
        return ["convert", "-q", *([] if self.durable else ["-t", "unsafe"]), *formats, *images]

    def result(self, run):
        """What was made, and its format."""
        return run / "new", self.target


@dataclasses.dataclass
class Rebase:
    """An overlay that holds a little gets another parent, of which some percent differ from the one that it has."""

    size: int
    percent: int
    file_system: str

    @property
    def name(self):
        """What `--only` takes."""
        return f"rebase-{self.percent}-{self.file_system}"

    @property
    def title(self):
        """What the table says."""
        return f"rebase over {text(self.size)}, of which {self.percent} % differ, on {self.file_system}"

    def prepare(self, place):
        """Two parents, and an overlay on the first of them."""
        rng = random.Random(2)
        with open(place / "old.raw", "wb") as old, open(place / "new.raw", "wb") as new:
            for index in range(self.size // (64 * KIB)):
                data = rng.randbytes(64 * KIB)
                differs = self.percent == 100 or index * self.percent // 100 != (index + 1) * self.percent // 100
                old.write(data)
                new.write(rng.randbytes(64 * KIB) if differs else data)
        for name in ("old", "new"):
            call(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", place / f"{name}.raw", place / f"{name}.qcow2"])
            (place / f"{name}.raw").unlink()
        call(["qemu-img", "create", "-q", "-f", "qcow2", "-b", place / "old.qcow2", "-F", "qcow2", place / "overlay.qcow2"])
        call(["qemu-io", "-c", "write -P 7 1M 64k", place / "overlay.qcow2"])
        call(["sync"])

    def fresh(self, place, run):
        """An overlay of its own."""
        shutil.copyfile(place / "overlay.qcow2", run / "overlay.qcow2")
        call(["sync", str(run / "overlay.qcow2")])

    def arguments(self, program, place, run):
        """What the program is called with. `qemu-img` flushes at the end as well."""
        options = ["-t", "writeback"] if program == "qemu-img" else ["--allow-backing-dir", str(place)]
        return ["rebase", "-q", *options, "-b", str(place / "new.qcow2"), "-F", "qcow2", str(run / "overlay.qcow2")]

    def result(self, run):
        """What was changed, and its format."""
        return run / "overlay.qcow2", "qcow2"


def commands(quick):
    """All of them."""
    large, small = (64 if quick else 1024) * MIB, 16 * MIB
    found = []
    for kind in ("ext4", "tmpfs"):
        for source, target in (("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2"), ("vmdk", "qcow2")):
            for size in (small, large):
                found += [Conversion(size, source, target, durable, kind) for durable in (True, False)]
        found += [Rebase(large // 2, percent, kind) for percent in (1, 100)]
    return found


def argv(command, program, instar, place, run):
    """The whole command line."""
    if program == "qemu-img":
        return ["qemu-img", *command.arguments(program, place, run)]
    name, *rest = command.arguments(program, place, run)
    return [instar, name, "--sandbox", SANDBOXES[program], *rest]


def timed(line):
    """Wall time in seconds of a command that must succeed."""
    start = time.perf_counter()
    call(line)
    return time.perf_counter() - start


def measure(command, place, instar, runs):
    """All runs of one command, in turn; the first of each program is not counted, and their results are compared."""
    command.prepare(place)
    seconds = {program: [] for program in PROGRAMS}
    for number in range(-1, -(-runs // len(PROGRAMS)) * len(PROGRAMS)):
        first = number % len(PROGRAMS)
        made = {}
        for program in [*PROGRAMS[first:], *PROGRAMS[:first]]:
            run = made[program] = place / program
            run.mkdir()
            command.fresh(place, run)
            taken = timed(argv(command, program, instar, place, run))
            if number >= 0:
                seconds[program].append(taken)
        if number < 0:
            theirs, fmt = command.result(made["qemu-img"])
            for program in SANDBOXES:
                ours = command.result(made[program])[0]
                if subprocess.run(["qemu-img", "compare", "-q", "-f", fmt, "-F", fmt, ours, theirs], check=False).returncode:
                    raise SystemExit(f"bench: {command.name}: {program} and qemu-img made different disks")
        for run in made.values():
            shutil.rmtree(run)
    numbers = {
        program: {"median": statistics.median(times), "min": min(times), "max": max(times), "seconds": times}
        for program, times in seconds.items()
    }
    theirs = numbers["qemu-img"]["median"]
    ratios = {program: numbers[program]["median"] / theirs for program in SANDBOXES}
    return {"name": command.name, "title": command.title, "goal": 1.0, "programs": numbers, "ratios": ratios}


def table(results):
    """The commands as Markdown."""
    titles = ("command", "instar", "in a process", "qemu-img", "instar / qemu-img", "process / qemu-img", "goal")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in results:
        cells = [result["title"], *(span(result["programs"][program]) for program in PROGRAMS)]
        cells += [f"{result['ratios'][program]:.2f}" for program in SANDBOXES]
        cells.append(f"≤ {result['goal']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
