#!/usr/bin/env python3
"""Counts what fixed workloads cost, and says which of them cost more than they did.

Times depend on the machine; how often the guest leaves for the host, what it asks for, and how many bytes move do not.
`guard.json` holds these counts. `make bench-guard` compares, and so does `make test`: a count that grows by more than the margin
fails. Who wants it to grow, or has made it shrink, writes the new counts with `--bless 'why'`, and the reason stays in that file.

The counts are those that `-v` prints: exits of the guest, doorbells, block requests, messages; bytes that the guest reads and
writes, that are copied by whichever way (the file system says which), made zero, and flushes that had something to flush.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))
import support  # noqa: E402
from support import MIB  # noqa: E402

FILE = HERE / "guard.json"
#: What a count may grow by: a part of it, and so many besides, as two are a large part of three.
PART, BESIDES = 0.05, 2
GUEST = re.compile(r"guest: sandbox \w+, ring 3, (\d+) exits, (\d+) doorbells, (\d+) requests, (\d+) messages")
MOVED = re.compile(r"moved: (\d+) bytes read and (\d+) written by the guest, (\d+) shared, (\d+) copied in the kernel, (\d+) "
                   r"through the host, (\d+) zeroed or given back, (\d+) flushes")
COUNTS = ("exits", "doorbells", "requests", "messages", "read", "written", "copied", "zeroed", "flushes")


def writes(count, disk, seed=1):
    """Commands of qemu-io: so many clusters of 64 KiB in random order."""
    places = random.Random(seed).sample(range(disk // 65536), count)
    return [f"write -q -P {1 + at % 255} {at * 65536} 65536" for at in places]


def pair(base=(), top=(), size=256 * MIB, fmt="qcow2", top_fmt="qcow2", **options):
    """A base and an overlay with what is written into each."""
    support.create("base", size, fmt=fmt, **options)
    if base:
        support.qemu_io("base", *base, fmt=fmt)
    support.create("top", backing="base", backing_fmt=fmt, fmt=top_fmt)
    support.qemu_io("top", *top, fmt=top_fmt)


def sequential():
    pair(top=["write -q -P 1 0 24M"])
    return "commit", "top"


def over_data():
    pair(base=["write -q -P 1 0 24M"], top=["write -q -P 2 0 24M"])
    return "commit", "top"


def scattered():
    pair(top=writes(600, 1 << 40), size=1 << 40)
    return "commit", "top"


def over_a_snapshot():
    support.create("base", 256 * MIB)
    support.qemu_io("base", "write -q -P 1 0 8M")
    support.qemu_img("snapshot", "-c", "one", "base")
    support.create("top", backing="base")
    support.qemu_io("top", "write -q -P 2 0 8M")
    return "commit", "top"


def zeroes():
    pair(base=["write -q -P 1 0 16M"], top=["write -q -z 0 16M"])
    return "commit", "top"


def compressed():
    pair(top=[f"write -q -c -P {1 + at} {at * 65536} 65536" for at in range(100)])
    return "commit", "top"


def layers():
    support.create("base", 256 * MIB)
    below = "base"
    for layer in range(3):
        support.create(f"layer{layer}", backing=below)
        support.qemu_io(f"layer{layer}", *writes(80, 256 * MIB, layer))
        below = f"layer{layer}"
    return "commit", "-b", "base", "-d", below


def into_raw():
    pair(top=["write -q -P 1 0 8M", *writes(60, 256 * MIB)], fmt="raw")
    return "commit", "-F", "raw", "top"


def vmdk():
    pair(top=["write -q -P 1 0 8M", *writes(60, 256 * MIB)], fmt="vmdk", top_fmt="vmdk")
    return "commit", "top"


def rebased():
    pair(base=writes(100, 256 * MIB), top=writes(20, 256 * MIB, 2))
    return "rebase", "-b", "", "top"


def grown():
    support.create("image", 64 * MIB)
    support.qemu_io("image", *writes(50, 64 * MIB))
    return "resize", "image", "64T"


def checked():
    support.create("image", 1 << 40)
    support.qemu_io("image", *writes(600, 1 << 40))
    return "check", "image"


def to_vmdk():
    support.create("image", 256 * MIB)
    support.qemu_io("image", "write -q -P 1 0 8M", *writes(60, 256 * MIB))
    return "convert", "-O", "vmdk", "image", "new"


def from_vhdx():
    support.create("image", 64 * MIB, fmt="vhdx")
    support.qemu_io("image", "write -q -P 1 0 8M", fmt="vhdx")
    return "convert", "-O", "qcow2", "image", "new"


def mapped():
    pair(base=writes(300, 1 << 36), top=writes(300, 1 << 36, 2), size=1 << 36)
    return "map", "top"


def compared():
    support.create("image", 256 * MIB)
    support.qemu_io("image", *writes(100, 256 * MIB))
    support.qemu_img("convert", "-O", "vmdk", "image", "other")
    return "compare", "image", "other"


WORKLOADS = {
    "commit 24 MiB from end to end": sequential,
    "commit 24 MiB over 24 MiB": over_data,
    "commit 600 clusters over 1 TiB": scattered,
    "commit 8 MiB over a snapshot": over_a_snapshot,
    "commit 16 MiB of zeroes": zeroes,
    "commit 100 compressed clusters": compressed,
    "commit 3 layers": layers,
    "commit into raw": into_raw,
    "commit vmdk": vmdk,
    "rebase 100 clusters": rebased,
    "resize from 64 MiB to 64 TiB": grown,
    "check 600 clusters of 1 TiB": checked,
    "convert qcow2 to vmdk": to_vmdk,
    "convert vhdx to qcow2": from_vhdx,
    "map two layers": mapped,
    "compare 100 clusters": compared,
}


def counted(make) -> dict[str, int]:
    """Make the images in a directory of their own, run, and add up what was counted."""
    with tempfile.TemporaryDirectory() as directory:
        here = os.getcwd()
        os.chdir(directory)
        try:
            command, *words = make()
            done = support.run_instar(command, "-v", *words)
        finally:
            os.chdir(here)
    guest, moved = GUEST.findall(done.stderr), MOVED.findall(done.stderr)
    if done.rc != 0 or not guest or len(guest) != len(moved):
        raise SystemExit(f"bench-guard: this says not what it cost:\n{done}")
    rows = []
    for (*asked,), (read, written, shared, kernel, host, zeroed, flushes) in zip(guest, moved):
        copied = int(shared) + int(kernel) + int(host)
        rows.append([*map(int, asked), int(read), int(written), copied, int(zeroed), int(flushes)])
    return dict(zip(COUNTS, map(sum, zip(*rows))))


def most(count: int) -> int:
    """What a count may grow to."""
    return count + max(int(count * PART), BESIDES)


def complaints(known: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """Counts that have grown too much, and workloads that are in one of both only."""
    found = [f"{name}: it has no counts yet" for name in now.keys() - known.keys()]
    found += [f"{name}: there is no such workload any more" for name in known.keys() - now.keys()]
    for name in now.keys() & known.keys():
        for what in COUNTS:
            was, count = known[name].get(what, 0), now[name][what]
            if count > most(was):
                found.append(f"{name}: {count} {what}, {was} before, which may become {most(was)}")
    return sorted(found)


def gains(known: dict[str, dict[str, int]], now: dict[str, dict[str, int]]) -> list[str]:
    """Counts that are less by more than the margin: until they are blessed, they may grow back unseen."""
    return [f"{name}: {now[name][what]} {what}, {known[name][what]} before" for name in sorted(now.keys() & known.keys())
            for what in COUNTS if most(now[name][what]) < known[name].get(what, 0)]


def bless(reason: str, now: dict[str, dict[str, int]]) -> None:
    """Write the counts, and why they changed."""
    reasons = json.loads(FILE.read_text())["reasons"] if FILE.exists() else []
    text = json.dumps({"reasons": [*reasons, reason], "counts": now}, indent=1)
    # One workload a line, so that a change shows what it changes.
    FILE.write_text(re.sub(r"\{\s+(\"exits\"[^}]*?)\s+\}", lambda found: "{" + re.sub(r"\s*\n\s*", " ", found[1]) + "}", text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bless", metavar="REASON", help="write the counts of now, and why they are other ones")
    options = parser.parse_args()
    if options.bless is not None and not options.bless.strip():
        parser.error("--bless wants a reason")
    now = {name: counted(make) for name, make in WORKLOADS.items()}
    if options.bless:
        bless(options.bless.strip(), now)
        print(f"{len(now)} workloads written to {FILE.name}")
        return 0
    known = json.loads(FILE.read_text())["counts"]
    for line in gains(known, now):
        print(f"less: {line} (--bless to keep it so)")
    found = complaints(known, now)
    for line in found:
        print(f"bench-guard: {line}", file=sys.stderr)
    print(f"{len(now)} workloads, {len(found)} counts have grown")
    return 1 if found else 0


if __name__ == "__main__":
    support.configure()
    sys.exit(main())
