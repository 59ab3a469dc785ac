"""Drawn chains, and drawn sequences of commands on them, beside `qemu-img` doing the same on copies: what every image reads as,
its size, its snapshots and what the checker says are the same after each command."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter

import pytest
import support
from support import KIB, MIB, create, qemu_img, qemu_io, run, run_instar

COUNT = 500 if os.environ.get("INSTAR_DEEP") else 60
#: So many to a test, as starting one takes its time.
AT_ONCE = 10
OPTIONS = [{}, {"cluster_size": "4k"}, {"cluster_size": "2M"}, {"extended_l2": "on", "cluster_size": "16k"}, {"compat": "0.10"},
           {"lazy_refcounts": "on"}, {"refcount_bits": 1}, {"cluster_size": "512"}]


class Chain:
    """Images in a directory: `0` is the lowest; and copies of all, on which qemu-img works."""

    def __init__(self, directory, rng):
        self.ours, self.theirs, self.rng = directory / "ours", directory / "theirs", rng
        self.ours.mkdir()
        self.names, self.done, self.made, self.known = [], [], 0, {}
        for number in range(rng.randrange(2, 5)):
            self.add(number)
        shutil.copytree(self.ours, self.theirs)

    def add(self, number):
        rng, path = self.rng, self.ours / str(number)
        size = rng.choice([MIB, 2 * MIB, 2 * MIB, 2 * MIB + 512, 3 * MIB - 4 * KIB, 64 * KIB])
        fmt = "raw" if number == 0 and rng.random() < 0.3 else "qcow2"
        options = rng.choice(OPTIONS) if fmt == "qcow2" else {}
        below = {"backing": self.names[-1], "backing_fmt": self.format(self.names[-1])} if self.names else {}
        create(path, size, fmt=fmt, cwd=self.ours, **below, **options)
        self.names.append(str(number))
        self.write(str(number), size, fmt)
        if fmt == "qcow2" and "refcount_bits" not in options and rng.random() < 0.2:
            qemu_img("snapshot", "-c", "one", path)
            self.write(str(number), size, fmt)

    def write(self, name, size, fmt):
        commands = []
        for _ in range(self.rng.randrange(1, 6)):
            at = self.rng.randrange(size // 512) * 512
            length = min(self.rng.choice([512, 4 * KIB, 64 * KIB, 300 * KIB]), size - at)
            kind = self.rng.choice(["write -P 5", "write -P 6", "write -z", "write -zu"] if fmt == "qcow2" else ["write -P 5"])
            commands.append(f"{kind} {at} {length}")
        qemu_io(self.ours / name, *commands, fmt=fmt)

    def format(self, name, where=None):
        with open((where or self.ours) / name, "rb") as file:
            return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"

    # --- what is drawn ------------------------------------------------------------------------------

    def command(self):
        """A command, as arguments of instar and of qemu-img, both of which run it in their directory."""
        rng = self.rng
        kind = rng.choice(["commit", "rebase", "resize", "resize", "convert", "check"])
        name = rng.choice(self.names)
        return getattr(self, f"draw_{kind}")(name)

    def backing(self, name):
        return support.info(self.theirs / name).get("backing-filename") if self.format(name) == "qcow2" else None

    def draw_commit(self, name):
        keep = self.rng.choice([[], [], ["-d"]])
        return ["commit", "-q", *keep, "--ignore-siblings", name], ["commit", "-q", *keep, name]

    def draw_rebase(self, name):
        below = self.rng.choice(["", *(other for other in self.names if other != name)])
        args = ["rebase", "-q", "-b", below, *(["-F", self.format(below)] if below else []), name]
        return args, args

    def draw_resize(self, name):
        size = self.rng.choice([MIB, 2 * MIB + 512, 3 * MIB, 5 * MIB + 3 * 512, 100 * KIB])
        # Both refuse it for an image that shrinks, and for a raw one some of it.
        mode = self.rng.choice(["off", "off", "off", "metadata", "falloc", "full"])
        args = ["resize", "-q", "-f", self.format(name), "--shrink", f"--preallocation={mode}", name, str(size)]
        return [*args, "--ignore-overlays"], args

    def draw_convert(self, name):
        new, fmt = f"new{self.made}", self.rng.choice(["qcow2", "raw", "qcow2"])
        self.made += 1
        theirs = ["convert", "-f", self.format(name), "-O", fmt, name, new]
        options = self.rng.choice([[], [], ["-S", "4k"], *([["-c"], ["-c", "-o", "compression_type=zstd"]] if fmt == "qcow2" else [])])
        return ["convert", *options, *theirs[1:]], theirs

    def draw_check(self, name):
        args = ["check", "-q", "-r", self.rng.choice(["leaks", "all"]), name]
        return args, args

    # --- what must hold -----------------------------------------------------------------------------

    def step(self):
        """Run a drawn command with both. How it ended: done, or refused, which changes nothing."""
        ours, theirs = self.command()
        before = {path.name: support.digest(path) for path in self.ours.iterdir()}
        name = ours[-1]
        was = self.view(name, self.ours) if ours[0] == "rebase" else None
        mine = run_instar(*ours, cwd=self.ours)
        self.done.append(" ".join(ours))
        if mine.rc != 0:
            # What instar refuses for a reason of its own is not done to the copies: docs/*.md say what that is.
            assert {path.name: support.digest(path) for path in self.ours.iterdir()} == before, f"{mine}\n{self.done}"
            return f"{ours[0]} refused"
        other = run("qemu-img", *theirs, cwd=self.theirs)
        new = ours[-1] if ours[0] == "convert" else None
        if new is not None:
            self.names.append(new)
        if other.rc != 0 and ours[0] != "check":
            # What qemu-img cannot do is judged by what was there before.
            if was is not None:
                assert self.view(name, self.ours) == was, f"{mine}\n{self.done}"
            shutil.rmtree(self.theirs)
            shutil.copytree(self.ours, self.theirs)
            return f"{ours[0]} alone"
        self.compare(f"{mine}\n{other}\n{self.done}")
        return f"{ours[0]} done"

    def view(self, name, where):
        """What an image reads as, with its size; its snapshots; `None` for what qemu-img does not open."""
        fmt = self.format(name, where)
        flat = where.parent / "flat.raw"
        if run("qemu-img", "convert", "-f", fmt, "-O", "raw", where / name, flat).rc != 0:
            return None
        found = [support.digest(flat)]
        if fmt == "qcow2":
            for snapshot in support.info(where / name).get("snapshots", []):
                # As far as the disk goes, which is what qemu-img shows of it.
                qemu_img("convert", "-l", snapshot["name"], "-O", "raw", where / name, flat)
                found.append((snapshot["name"], support.digest(flat)))
        return found

    def compare(self, told):
        for name in self.names:
            mine, other = self.view(name, self.ours), self.view(name, self.theirs)
            assert mine == other, f"{name} reads {mine}, with qemu-img {other}\n{told}"
            if self.format(name) != "qcow2":
                continue
            said = [self.verdict(where / name) for where in (self.ours, self.theirs)]
            assert said[0] == (0, 0) or said[0] == said[1], f"{name} is {said}\n{told}"
            linked = [support.info(where / name).get("backing-filename") for where in (self.ours, self.theirs)]
            assert linked[0] == linked[1], f"{name} is backed by {linked}\n{told}"

    def verdict(self, path):
        """Corruptions and leaks, as qemu-img and instar count them."""
        key = support.digest(path)
        if key not in self.known:
            self.known[key] = self.counted(path)
        return self.known[key]

    @staticmethod
    def counted(path):
        found = json.loads(run("qemu-img", "check", "--output", "json", "-f", "qcow2", path).stdout)
        own = json.loads(run_instar("check", "--output", "json", path).stdout)
        counts = [(said.get("corruptions", 0), said.get("leaks", 0)) for said in (found, own)]
        assert counts[0] == counts[1], f"{path}: qemu-img finds {counts[0]}, instar {counts[1]}"
        return counts[0]


def sequence(directory, seed):
    rng = random.Random(seed)
    chain = Chain(directory, rng)
    return [chain.step() for _ in range(rng.randrange(1, 6))]


@pytest.mark.parametrize("first", range(0, COUNT, AT_ONCE))
def test_drawn_sequences(first, tmp_path):
    endings = Counter()
    for seed in range(first, min(first + AT_ONCE, COUNT)):
        directory = tmp_path / str(seed)
        directory.mkdir()
        endings.update(sequence(directory, seed))
        shutil.rmtree(directory)
    # Most are done by both.
    assert sum(count for ending, count in endings.items() if ending.endswith("done")) * 2 > endings.total(), endings


def test_a_difference_would_be_seen(tmp_path, monkeypatch):
    """With a qemu-img that does nothing, sequences of which something is left are told from those that are right."""
    monkeypatch.setattr(__import__(__name__), "run", idle(run))
    found = 0
    for seed in range(8):
        directory = tmp_path / str(seed)
        directory.mkdir()
        try:
            sequence(directory, seed)
        except AssertionError:
            found += 1
    assert found > 4


def idle(real):
    """Like `run`, without the commands of qemu-img that change an image."""
    def call(program, *args, **more):
        changes = program == "qemu-img" and args[0] in ("commit", "rebase", "resize")
        return support.Result([program], 0, "", "") if changes else real(program, *args, **more)
    return call
