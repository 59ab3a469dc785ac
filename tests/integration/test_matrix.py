"""Random pairs: raw backings, and everything that qcow2 has: compressed clusters, snapshots, bitmaps, versions, widths,
sizes, layers. 60 pairs by default; 500 with INSTAR_DEEP=1 (`make test-deep`).

The oracle is `qemu-img commit` on copies, and what every internal snapshot of both files reads as.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil

import pytest
import qcow2_bytes
import support
from dirty_bitmaps import dirty, held, merge, names, rounded, within
from support import KIB, MIB
from test_snapshots import snapshot_hashes

CHUNK = 10
SEEDS = 500 if os.environ.get("INSTAR_DEEP") else 30


class Image:
    """Commands that make one image with a random life of writes and snapshots."""

    def __init__(self, rng, name, size, backing=None):
        self.rng, self.name, self.size = rng, name, size
        self.version = rng.choice(["0.10", "1.1", "1.1", "1.1"])
        self.cluster = 512 << rng.randrange(13)
        options = [f"compat={self.version}", f"cluster_size={self.cluster}"]
        self.width = 16
        if self.version == "1.1":
            self.width = rng.choice([1, 2, 4, 8, 16, 16, 32, 64])
            options += [f"refcount_bits={self.width}", f"compression_type={rng.choice(['zlib', 'zstd'])}",
                        f"lazy_refcounts={rng.choice(['on', 'off', 'off'])}"]
            if self.cluster >= 16 * KIB and rng.random() < 0.5:
                options.append("extended_l2=on")
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options)]
        if backing:
            command += ["-b", backing, "-F", "raw" if backing.endswith(".raw") else "qcow2"]
        self.commands = [[*command, name, str(size)]]

    def live(self, rounds, snapshots, bitmaps=False):
        """Rounds of writes, with a snapshot after some of them: as many as the refcount width can count."""
        room = (1 << min(self.width, 8)) - 1
        for number in range(rounds):
            if number:
                self.writes(self.rng.randrange(1, 6), compressed=False)
            else:
                self.writes(self.rng.randrange(1, 20), compressed=True)
            # A host cluster may hold several compressed clusters, each of which counts.
            if snapshots and self.width >= 8 and room > 8 and self.rng.random() < 0.6:
                self.commands.append(["qemu-img", "snapshot", "-c", f"s{number}", self.name])
                room -= 1
            if bitmaps and self.version == "1.1" and self.rng.random() < 0.4:
                granularity = 512 << self.rng.randrange(16)
                self.commands.append(["qemu-img", "bitmap", "--add", "-g", str(granularity),
                                      *self.rng.choice([[], [], ["--disable"]]), self.name, f"b{number}"])
        if self.rng.random() < 0.5:
            self.writes(self.rng.randrange(1, 6), compressed=False)
        return self

    def writes(self, count, compressed):
        rng, budget = self.rng, 2 * MIB
        command = ["qemu-io", "-f", "qcow2"]
        used = set()
        if compressed and self.cluster <= 64 * KIB and rng.random() < 0.5:
            # qemu refuses to compress a cluster that is there: these come first, each once.
            for _ in range(rng.randrange(1, 12)):
                cluster = rng.randrange(max(1, self.size // self.cluster))
                if cluster not in used and (cluster + 1) * self.cluster <= self.size:
                    used.add(cluster)
                    command += ["-c", f"write -c -P {rng.randrange(1, 256)} {cluster * self.cluster} {self.cluster}"]
        for _ in range(count):
            longest = min(self.size, rng.choice([512, 4 * KIB, 64 * KIB, 300 * KIB]), max(budget, 512))
            length = rng.randrange(1, longest // 512 + 1) * 512
            offset = rng.randrange(0, self.size - length + 1, 512)
            kind = rng.choices(
                [f"write -P {rng.randrange(256)}", "write -z", "write -z -u", "discard"], [6, 1, 1, 1]
            )[0]
            budget -= length
            command += ["-c", f"{kind} {offset} {length}"]
        self.commands.append([*command, self.name])


def plan(seed):
    """The commands for a seed: base.qcow2, top.qcow2, and sometimes a layer below."""
    rng = random.Random(770_000 + seed)
    size = rng.choice([rng.randint(1, 64), rng.randint(64, 12_000), 8192]) * 512
    top_size = rng.randint(1, size // 512) * 512 if rng.random() < 0.25 else size
    commands, below = [], None
    kind = rng.choice([None, None, "raw", "qcow2"])
    if kind:
        below = f"root.{kind}"
        root_size = rng.choice([size, rng.randint(1, size // 512) * 512])
        if kind == "raw":
            commands.append(["qemu-img", "create", "-q", "-f", "raw", below, str(root_size)])
            commands.append(["qemu-io", "-f", "raw", "-c", f"write -P 201 0 {root_size}", below])
        else:
            commands += Image(rng, below, root_size).live(1, snapshots=False).commands
    base = Image(rng, "base.qcow2", size, below)
    # Version 2 cannot always grow.
    larger = base.version != "0.10" and rng.random() < 0.2
    if larger:
        top_size = size + rng.randint(1, 4096) * 512
    base.live(rng.randrange(1, 4), rng.random() < 0.5, bitmaps=True)
    if base_name(seed) == "base.raw":
        commands = [["qemu-img", "create", "-q", "-f", "raw", "base.raw", str(size)]]
        writes = [argument for command in base.commands for argument in command if argument.startswith(("write -P", "write -z"))]
        commands += [["qemu-io", "-f", "raw", "-c", write, "base.raw"] for write in writes]
    else:
        commands += base.commands
    top = Image(rng, "top.qcow2", top_size, base_name(seed))
    return commands + top.live(rng.randrange(1, 3), rng.random() < 0.3).commands


def base_name(seed):
    """One backing in six is raw."""
    return "base.raw" if random.Random(990_000 + seed).random() < 1 / 6 else "base.qcow2"


def changed(before, after):
    """Byte ranges, sector by sector, in which two raw files differ; what the first one lacks is zero."""
    new = after.read_bytes()
    old = before.read_bytes().ljust(len(new), b"\0")
    return merge((at, at + 512) for at in range(0, len(old), 512) if old[at : at + 512] != new[at : at + 512])


def check_bitmaps(base, before, came, differs):
    """`before`: what each bitmap called dirty; `came`: what the overlay held; `differs`: where content is another."""
    found, size = names(base), support.virtual_size(base)
    assert found.keys() == before.keys(), "a bitmap is gone"
    for name, bitmap in found.items():
        after, granularity = dirty(base, name), bitmap["granularity"]
        # The last granule of a disk that has grown goes on.
        was = rounded(before[name], granularity, size)
        if bitmap["flags"] != ["auto"]:
            assert after == was, f"bitmap {name} is disabled and changed"
            continue
        assert within([*was, *differs], after), f"bitmap {name} says too little"
        assert within(after, [*was, *rounded(came, granularity, size)]), f"bitmap {name} says too much"


def check(seed, directory):
    images, copies = directory / "images", directory / "copies"
    images.mkdir(parents=True)
    for command in plan(seed):
        made = support.run(*command, cwd=images)
        # What qemu itself cannot do to an image (count higher, compress over data) is no part of the pair.
        assert made.rc == 0, str(made)
    top, base = images / "top.qcow2", images / base_name(seed)
    fmt = base.suffix[1:]
    before = support.flatten(top, directory / "before.qcow2")
    small = support.virtual_size(base, fmt)
    kept = snapshot_hashes(base) if fmt == "qcow2" else {}
    bitmaps = {name: dirty(base, name) for name in names(base)} if fmt == "qcow2" else {}
    came = held(top)
    support.qemu_img("convert", "-f", fmt, "-O", "raw", base, directory / "base-before.raw")
    # Some were not closed cleanly.
    rng = random.Random(880_000 + seed)
    spoiled = []
    for path in (base, top) if fmt == "qcow2" else (top,):
        image = qcow2_bytes.Image(path)
        if image.get("version") > 2 and rng.random() < 0.3:
            image.spoil_refcounts(rng)
            spoiled.append(path)
    length = top.stat().st_size
    shutil.copytree(images, copies)
    for path in spoiled:
        support.repair(copies / path.name)
    support.qemu_img("commit", "-q", "top.qcow2", cwd=copies)

    grows = support.virtual_size(top) > small
    support.commit(top, "-q", *(["--resize-backing"] if grows else []))

    support.assert_same_content(base, copies / base.name, fmt, fmt)
    support.assert_same_content(top, before)
    support.assert_clean(top)
    assert support.holds_no_clusters(top), "the overlay still holds clusters"
    assert not qcow2_bytes.Image(top).dirty, "the overlay is dirty"
    assert top.stat().st_size <= length, "the overlay became longer"
    assert snapshot_hashes(top) == snapshot_hashes(copies / "top.qcow2"), "a snapshot of the overlay differs"
    if fmt == "raw":
        return
    support.assert_clean(base)
    assert not qcow2_bytes.Image(base).dirty, "the backing is dirty"
    support.qemu_img("convert", "-O", "raw", base, directory / "base-after.raw")
    check_bitmaps(base, bitmaps, came, changed(directory / "base-before.raw", directory / "base-after.raw"))
    # (qemu-img loses the snapshots of a backing that has bitmaps and grows: its copy cannot tell.)
    assert snapshot_hashes(base, small) == kept, "a snapshot of the backing changed"


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK), ids=lambda first: f"seeds-{first}-{first + CHUNK - 1}")
def test_random_pairs_of_everything(tmp_path, first):
    wrong = []
    for seed in range(first, first + CHUNK):
        directory = tmp_path / str(seed)
        try:
            check(seed, directory)
        except AssertionError as error:
            commands = "\n".join(shlex.join(map(str, command)) for command in plan(seed))
            wrong.append(f"seed {seed}: {error}\n{commands}\n(and spoiled: see check)\ninstar commit top.qcow2")
        shutil.rmtree(directory, ignore_errors=True)
    assert not wrong, "\n\n".join(wrong)
