"""Drawn chains of several formats, two to nine images, through the whole program: what lies above one of them is committed into
that one. 24 chains by default; 300 with INSTAR_DEEP=1 (`make test-deep`). `fuzz/tests/chains.rs` draws many more of them, without
what finds and opens images.

A layer is a child of an image of its own format, which the makers of the tests write, or a qcow2, which goes over any. The oracle
is what each layer was told to hold; the readers of the tests say what it holds afterwards.
"""

from __future__ import annotations

import json
import os
import random

import pytest
import support
import vdi_bytes
import vhd_bytes
import vhdx_bytes
from support import KIB, MIB

SEEDS = 300 if os.environ.get("INSTAR_DEEP") else 10
SIZE = 3 * MIB
KINDS = ("raw", "vpc", "vhdx", "vdi", "qcow2")
NULL = ("parent_linkage2", vhdx_bytes.braces(vhdx_bytes.NULL))


def identity(number):
    return bytes([number + 1]) * 16


def runs_of(rng):
    """First sectors and bytes of what a layer holds; runs do not overlap."""
    runs, at = [], 0
    while rng.random() < 0.8:
        at += rng.choice([0, 1, 8, 100, 1500])
        length = rng.choice([1, 3, 8, 128, 900])
        if at + length > SIZE // 512:
            break
        runs.append((at, rng.randbytes(length * 512)))
        at += length
    return runs


def over(below, runs):
    """What is read over these bytes."""
    disk = bytearray(below)
    for first, data in runs:
        disk[first * 512 : first * 512 + len(data)] = data
    return bytes(disk)


class Chain:
    """Images in a directory, from the lowest one up; `disks` are what they read as."""

    def __init__(self, directory, rng, depth):
        self.dir, self.kinds, self.disks, self.names = directory, [], [], []
        while len(self.kinds) <= depth:
            below = self.kinds[-1] if self.kinds else None
            kind = rng.choice(KINDS) if below is None else "qcow2" if below == "raw" or rng.random() < 0.2 else below
            disk = self.disks[-1] if self.disks else bytes(SIZE)
            runs = runs_of(rng)
            if kind == "vdi":
                # It holds whole blocks, which show what lies below them, too.
                runs = [(at // 512, over(disk, runs)[at : at + MIB // 4]) for at in range(0, SIZE, MIB // 4)
                        if over(disk, runs)[at : at + MIB // 4] != disk[at : at + MIB // 4]]
            self.kinds.append(kind)
            self.names.append(f"layer-{len(self.names)}.{kind}")
            self.disks.append(over(disk, runs))
            getattr(self, f"make_{kind}")(len(self.kinds) - 1, runs, rng)

    def path(self, number):
        return self.dir / self.names[number]

    def make_raw(self, number, runs, _):
        self.path(number).write_bytes(over(bytes(SIZE), runs))

    def make_vpc(self, number, runs, rng):
        options = {"identity": identity(number), "runs": runs, "block": rng.choice([64 * KIB, 512 * KIB, 2 * MIB])}
        if number == 0:
            vhd_bytes.Maker(rng.choice([vhd_bytes.DYNAMIC, vhd_bytes.FIXED]), SIZE, **options).write(self.path(0))
            return
        name = self.path(number - 1).name
        locators = [(b"W2ru", f".\\{name}".encode("utf-16-le"))]
        vhd_bytes.Maker(vhd_bytes.DIFFERENCING, SIZE, parent=identity(number - 1), name=name, locators=locators,
                        **options).write(self.path(number))

    def make_vhdx(self, number, runs, rng):
        options = {"data_write": identity(number), "runs": runs, "block": rng.choice([MIB, 2 * MIB]), "gap": rng.randrange(2)}
        if number == 0:
            kind = rng.choice([vhdx_bytes.DYNAMIC, vhdx_bytes.FIXED])
            vhdx_bytes.Maker(kind, SIZE, **options).write(self.path(0))
            return
        pairs = [("relative_path", f".\\{self.path(number - 1).name}"), NULL]
        vhdx_bytes.Maker(vhdx_bytes.DIFFERENCING, SIZE, parent=identity(number - 1), pairs=pairs, **options).write(self.path(number))

    def make_vdi(self, number, runs, _):
        blocks = {first * 512 // (MIB // 4): data for first, data in runs}
        vdi_bytes.make(self.path(number), SIZE, blocks, parent=self.path(number - 1) if number else None, block=MIB // 4)
        # A child finds its parent by the name that VirtualBox gives to the file of a snapshot.
        name = vdi_bytes.Image(self.path(number)).name
        self.path(number).rename(self.dir / name)
        self.names[number] = name

    def make_qcow2(self, number, runs, rng):
        path = self.path(number)
        support.create(path, SIZE, cluster_size=512 if number else rng.choice([512, 4096, 65536]))
        for first, data in runs:
            piece = self.dir / "piece"
            piece.write_bytes(data)
            support.qemu_io(path, f"write -q -s {piece} {first * 512} {len(data)}")
            piece.unlink()
        if number:
            support.qemu_img("rebase", "-u", "-b", self.path(number - 1).name, "-F", self.kinds[number - 1], path)

    def read(self, number):
        """What an image reads as now, over what was told of the layers below it."""
        below = self.disks[number - 1] if number else bytes(SIZE)
        return self.read_over(number, below)

    def read_over(self, number, below):
        path, kind = self.path(number), self.kinds[number]
        if kind == "raw":
            return path.read_bytes()
        if kind == "vpc":
            return vhd_bytes.View(path).content(below)
        if kind == "vhdx":
            return vhdx_bytes.View(path).over(below)
        if kind == "vdi":
            return vdi_bytes.Image(path).content(below)
        flat, raw = self.dir / "below.tmp", self.dir / "seen.tmp"
        flat.write_bytes(below)
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)},
                "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(flat)}}}  # fmt: skip
        support.qemu_img("convert", "-O", "raw", "json:" + json.dumps(node), raw)
        data = raw.read_bytes()
        flat.unlink()
        raw.unlink()
        return data


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_lies_above_an_image_is_committed_into_it(tmp_path, seed):
    rng = random.Random(550_000 + seed)
    top = 1 + seed % 8
    chain = Chain(tmp_path, rng, top)
    for number in range(top + 1):
        assert chain.read(number) == chain.disks[number], f"layer {number} of {chain.kinds} was made wrong"
    target = rng.randrange(top)
    what = f"{chain.kinds}, layer {top} into {target}"
    others = [chain.path(number) for number in range(top + 1) if number not in (target, target + 1, top)]
    flat = tmp_path.parent / f"{tmp_path.name}.raw"
    flat.write_bytes(chain.disks[top])
    with support.untouched(*others):
        assert support.run_instar("compare", "-F", "raw", chain.path(top), flat).rc == 0, what
        result = support.run_instar("commit", "-q", "-b", chain.path(target).name, chain.path(top), cwd=tmp_path)
    assert result.rc == 0, f"{what}: {result}"
    assert chain.read(target) == chain.disks[top], what
    # The overlay hides the same, and every image goes with what is below it.
    assert chain.read_over(top, chain.disks[top]) == chain.disks[top], what
    assert support.run_instar("compare", "-F", "raw", chain.path(top), flat).rc == 0, what
    if chain.kinds[target] != "raw":
        assert support.run_instar("check", "-q", chain.path(target)).rc in (0, 3), what
    flat.unlink()
