"""Commits into a deeper ancestor: all layers above it are merged. `qemu-img commit -b` on copies is the oracle."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import support
from support import KIB, MIB, Holder, qemu_img, qemu_io, refuse


class Chain:
    """Images layer-0 … layer-N in a directory of their own, each backed by the one before."""

    def __init__(self, directory):
        self.dir = directory / "images"
        self.dir.mkdir()
        self.copies = directory / "copies"
        self.formats = {}

    def __getitem__(self, number):
        return self.dir / f"layer-{number}"

    def add(self, number, size, *commands, fmt="qcow2", **options):
        backing = {"backing": self[number - 1].name, "backing_fmt": self.formats[number - 1]} if number else {}
        support.create(self[number], size, fmt=fmt, **backing, **options)
        self.formats[number] = fmt
        if commands:
            qemu_io(self[number], *commands, fmt=fmt)

    def check(self, top, base, *options):
        """Commits `top` into `base`; all else stays as it was."""
        shutil.copytree(self.dir, self.copies)
        seen = support.flatten(self[top], self.dir.parent / "seen")
        qemu_img("commit", "-q", "-b", self[base].name, self.copies / self[top].name, cwd=self.copies)
        with support.untouched(*(self[number] for number in range(len(self.formats)) if number != base)):
            result = support.commit(self[top], "-b", self[base].name, *options)
        fmt = self.formats[base]
        support.assert_same_content(self[base], self.copies / self[base].name, fmt, fmt)
        support.assert_same_content(self[top], seen)
        if fmt == "qcow2":
            support.assert_clean(self[base])
        stale = [str(self[number]) for number in range(top - 1, base, -1)]
        if "json" in options:
            assert result.stderr == "" and result.json.get("stale", []) == stale
            warnings = result.json.get("warnings", [])
        else:
            warnings = [line for line in result.stderr.splitlines() if line.startswith("instar: warning: ")]
        # One line, however long the chain is: the first, and how many more.
        assert len(warnings) == bool(stale)
        if stale:
            more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
            assert f"'{stale[0]}'{more}" in warnings[0] and "stale" in warnings[0], warnings
        shutil.rmtree(self.copies)
        return result


@pytest.fixture
def chain(tmp_path):
    return Chain(tmp_path)


def test_the_top_most_wins(chain):
    chain.add(0, 4 * MIB, "write -P 1 0 4M")
    chain.add(1, None, "write -P 2 1M 1M", "write -P 2 3M 64k")
    chain.add(2, None, "write -P 3 1536k 1M", "write -z 3M 32k", "write -c -P 4 192k 64k")
    chain.add(3, None, "write -P 5 1600k 512", "write -z 2M 64k")
    result = chain.check(3, 0, "--output", "json")
    found = result.json
    assert (found["overlay_clusters_cleared"], found["backing"]) == (0, str(chain[0]))
    assert found["bytes_committed"] == found["clusters_committed"] * 64 * KIB == (1536 + 64 + 64) * KIB
    qemu_io(chain[0], "read -P 5 1600k 512", "read -P 3 1536k 64k", "read -P 2 1M 512k", "read -P 0 2M 64k",
            "read -P 4 192k 64k", "read -P 0 3M 32k", "read -P 2 3104k 32k", "read -P 1 3136k 960k")


@pytest.mark.parametrize("base", range(7))
def test_every_target_of_a_deep_chain(chain, base):
    rng = random.Random(base)
    for number in range(8):
        writes = [f"write -P {number + 1} {rng.randrange(60) * 64}k {rng.randrange(1, 300) * 512}" for _ in range(6)]
        chain.add(number, 4 * MIB, *writes, cluster_size=512 << rng.randrange(10), compat=rng.choice(["0.10", "1.1"]))
    chain.check(7, base, *(["-d"] if base == 6 else []))


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 1, 3), (4, 3, 1), (2, 4, 1), (4, 1, 2, 3), (4, 2, 1, 4), (4, 3, 2, 1)])
@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_layers_of_other_sizes(chain, sizes, fmt):
    """A layer hides with zeroes what lies below its own end."""
    for number, size in enumerate(sizes):
        chain.add(number, size * MIB, f"write -P {number + 1} {number * 100}k 150k", f"write -P 9 {size * 1024 - 64}k 64k",
                  fmt=fmt if number == 0 else "qcow2")
    qemu_io(chain[0], "write -P 7 700k 1M", fmt=fmt)
    chain.check(len(sizes) - 1, 0)


def test_growing(chain):
    for number, size in enumerate([2, 1, 6]):
        chain.add(number, size * MIB, f"write -P {number + 1} {number * 100}k 150k")
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", chain[2], "-b", chain[0].name, files=[chain[0], chain[1]])
    chain.check(2, 0, "--resize-backing")
    assert support.virtual_size(chain[0]) == 6 * MIB


def test_partial_clusters_read_the_ancestors_of_the_target(chain):
    chain.add(0, 4 * MIB, "write -P 1 0 4M", fmt="raw")
    chain.add(1, None, "write -P 2 1M 1k", cluster_size=2 * MIB)
    chain.add(2, None, "write -P 3 2M 1k", "write -P 3 513k 1k", cluster_size=512)
    chain.add(3, None, "write -P 4 2050k 1k", "write -c -P 5 128k 64k")
    chain.check(3, 1)


def test_a_dry_run_and_a_read_only_layer(chain):
    for number in range(3):
        chain.add(number, MIB, f"write -P {number + 1} {number * 100}k 150k")
    os.chmod(chain[1], 0o444)
    with support.untouched(*(chain[number] for number in range(3))):
        result = support.commit(chain[2], "--dry-run", "-b", chain[0].name)
        answer = support.commit(chain[2], "--dry-run", "-b", chain[0].name, "--output", "json")
    assert f"'{chain[1]}': would become stale" in result.stderr
    assert answer.stderr == "" and answer.json["stale"] == [str(chain[1])] and "stale" in answer.json["warnings"][0]
    chain.check(2, 0)


def test_what_becomes_stale_is_said_before_the_change(chain):
    """Also where the commit then fails."""
    chain.add(0, 80 * MIB, f"write -P 1 0 {support.FILE_LIMIT // MIB}M")
    for number in (1, 2):
        chain.add(number, 80 * MIB, f"write -P {number + 1} {66 + number}M 8M")
    command = f"ulimit -f {support.FILE_LIMIT // KIB}; exec {support.instar_binary()} commit -b {chain[0].name} {chain[2]}"
    result = support.run("bash", "-c", command)
    lines = result.stderr.splitlines()
    assert result.rc == 1 and len(lines) == 2 and f"'{chain[1]}': becomes stale" in lines[0], str(result)
    quiet = support.commit(chain[2], "-q", "-b", chain[0].name)
    assert quiet.stderr == ""


def test_what_is_not_in_the_chain(chain):
    for number in range(4):
        chain.add(number, MIB, f"write -P {number + 1} {number * 100}k 150k")
    other = support.create(chain.dir / "other", MIB)
    files = [chain[number] for number in range(3)]
    refuse("ERROR_NOT_IN_CHAIN", chain[3], "-b", "other", files=[*files, other], mentions=["immediate parent is layer-2"])
    # A loop below.
    qemu_img("rebase", "-u", "-b", "layer-2", "-F", "qcow2", chain[1])
    refuse("ERROR_CHAIN_LOOP", chain[3], "-b", "other", files=[*files, other], mentions=["leads back to itself"])
    refuse("ERROR_CHAIN_LOOP", chain[3], "-b", "layer-1", files=files)
    # A layer in the middle is missing.
    chain[1].unlink()
    refuse("ERROR_NOT_IN_CHAIN", chain[3], "-b", "layer-0", files=[chain[0], chain[2]], mentions=["layer-1", "does not exist"])


def test_a_layer_in_use(chain):
    for number in range(3):
        chain.add(number, MIB, f"write -P {number + 1} {number * 100}k 150k")
    with Holder(chain[1]):
        refuse("ERROR_IMAGE_IN_USE", chain[2], "-b", "layer-0", files=[chain[0], chain[1]], mentions=["another process"])
