"""200 random pairs: the backing reads as after `qemu-img commit` on copies, and nothing else is wrong."""

from __future__ import annotations

import random
import shlex
import shutil

import pytest
import support
from support import KIB, MIB

SEEDS = 80
CHUNK = 10


class Plan:
    """Commands that make one pair; printed when it fails."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.commands = []

    def create(self, name, size, backing=None, cluster_size=None):
        rng = self.random
        version = rng.choice(["0.10", "1.1", "1.1"])
        options = [f"compat={version}", f"cluster_size={cluster_size}"]
        if version == "1.1":
            options.append(f"refcount_bits={rng.choice([1, 2, 4, 8, 16, 16, 32, 64])}")
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options)]
        if backing:
            command += ["-b", backing, "-F", "qcow2"]
        self.commands.append([*command, name, str(size)])

    def write(self, name, size, requests, budget=2 * MIB):
        """Scattered requests of all kinds, of at most 2 MiB in all."""
        rng = self.random
        command = ["qemu-io", "-f", "qcow2"]
        for _ in range(requests):
            longest = min(size, rng.choice([512, 4 * KIB, 64 * KIB, 400 * KIB]), max(budget, 512))
            length = rng.randrange(1, longest // 512 + 1) * 512
            # Many requests at one place make clusters that are written, zeroed and written again.
            last = size - length
            offset = rng.choice([rng.randint(0, last // 512) * 512, min(last, rng.randrange(8) * 64 * KIB), last])
            kind = rng.choices(
                [f"write -P {rng.randrange(256)}", "write -z", "write -z -u", "discard"], [6, 1, 1, 1]
            )[0]
            budget -= length
            command += ["-c", f"{kind} {offset} {length}"]
        self.commands.append([*command, name])

    def reproducer(self):
        return "\n".join(shlex.join(map(str, command)) for command in self.commands)


def plan(seed) -> Plan:
    """The pair of a seed: base.qcow2 and top.qcow2, sometimes with root.qcow2 below."""
    result = Plan(seed)
    rng = result.random
    sizes = [512 << n for n in range(13)]
    top_cluster = rng.choice(sizes)
    base_cluster = rng.choice(sizes) if rng.random() < 0.5 else top_cluster
    size = rng.choice([rng.randint(1, 64), rng.randint(64, 16384), rng.randint(1, 64) * 256, 8192]) * 512
    top_size = rng.randint(1, size // 512) * 512 if rng.random() < 0.25 else size
    backing = None
    if rng.random() < 0.3:
        backing = "root.qcow2"
        root_size = rng.choice([size, size, rng.randint(1, size // 512) * 512])
        result.create(backing, root_size, cluster_size=rng.choice(sizes))
        result.write(backing, root_size, rng.randint(1, 12))
    result.create("base.qcow2", size, backing, base_cluster)
    if rng.random() < 0.85:
        result.write("base.qcow2", size, rng.randint(1, 25))
    result.create("top.qcow2", top_size, "base.qcow2", top_cluster)
    if rng.random() < 0.97:
        result.write("top.qcow2", top_size, rng.randint(1, 40))
    return result


def check(seed, directory):
    """Makes the pair, commits it both ways, compares."""
    images, copies = directory / "images", directory / "copies"
    images.mkdir(parents=True)
    for command in plan(seed).commands:
        made = support.run(*command, cwd=images)
        assert made.rc == 0, str(made)
    before = support.flatten(images / "top.qcow2", directory / "before.qcow2")
    shutil.copytree(images, copies)
    support.qemu_img("commit", "-q", "top.qcow2", cwd=copies)

    support.commit(images / "top.qcow2", "-q")

    support.assert_same_content(images / "base.qcow2", copies / "base.qcow2")
    support.assert_same_content(images / "top.qcow2", before)
    support.assert_clean(images / "base.qcow2")
    support.assert_clean(images / "top.qcow2")
    assert support.holds_no_clusters(images / "top.qcow2"), "the overlay still holds clusters"
    root = images / "root.qcow2"
    if root.exists():
        assert support.digest(root) == support.digest(copies / "root.qcow2"), "the layer below changed"


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK), ids=lambda first: f"seeds-{first}-{first + CHUNK - 1}")
def test_random_pairs(tmp_path, first):
    wrong = []
    for seed in range(first, first + CHUNK):
        directory = tmp_path / str(seed)
        try:
            check(seed, directory)
        except AssertionError as error:
            wrong.append(f"seed {seed}: {error}\n{plan(seed).reproducer()}\ninstar commit top.qcow2")
        shutil.rmtree(directory, ignore_errors=True)
    assert not wrong, "\n\n".join(wrong)
