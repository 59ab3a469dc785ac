"""What a commit needs follows from what the overlay holds, not from the size of the disk."""

from __future__ import annotations

import random
import sys

import pytest
import support
from support import KIB, MIB, TIB

#: Host and guest together.
LIMIT = 150 * MIB


#: The kernel counts what a process had before `exec` too, which would be the memory of the tests themselves; so a small
#: process stands between.
MEASURE = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(usage.ru_maxrss)
sys.exit(child.returncode)
"""


def peak_memory(*args, cwd) -> int:
    """Runs instar, which must succeed; the most that was resident, in bytes. The guest's memory is part of it."""
    result = support.run(sys.executable, "-c", MEASURE, support.instar_binary(), *args, cwd=cwd)
    assert result.rc == 0, result
    return int(result.stdout) * KIB


@pytest.mark.parametrize("cluster", [64 * KIB, 4 * KIB], ids=["64k", "4k"])
def test_scattered_data_on_a_huge_disk(pair, cluster):
    # 4 KiB clusters cannot map more: the L1 table would be too long.
    size = 16 * TIB if cluster == 64 * KIB else TIB
    count = 100 * MIB // cluster if cluster == 64 * KIB else 4000
    rng = random.Random(16)
    places = sorted(rng.sample(range(size // cluster), count))
    writes = [(place * cluster, rng.randrange(1, 256)) for place in places]
    pair.make(size, base_options={"cluster_size": cluster}, top_options={"cluster_size": cluster},
              base=["write -P 1 5G 1M"])
    support.qemu_io(pair.top, *(f"write -P {byte} {at} {cluster}" for at, byte in writes))

    peak = peak_memory("commit", "-q", pair.top.name, cwd=pair.dir)

    assert peak < LIMIT, f"{peak // MIB} MiB were resident"
    support.assert_clean(pair.base)
    support.assert_clean(pair.top)
    assert support.holds_no_clusters(pair.top)
    support.qemu_io(pair.base, *(f"read -P {byte} {at} {cluster}" for at, byte in writes))
    free = [place for place in rng.sample(range(size // cluster), 400) if place not in set(places)]
    support.qemu_io(pair.base, "read -P 1 5G 1M", *(f"read -P 0 {place * cluster} {cluster}" for place in free))
    print(f"{peak / MIB:.0f} MiB were resident")


#: The commands on one image: `FMT` stands for its format, `IMAGE` for its name.
COMMANDS = {
    "info": ["info", "-f", "FMT", "IMAGE"],
    "map": ["map", "-f", "FMT", "IMAGE"],
    "check": ["check", "-f", "FMT", "IMAGE"],
    "measure": ["measure", "-O", "qcow2", "-f", "FMT", "IMAGE"],
    "convert": ["convert", "-f", "FMT", "-O", "qcow2", "IMAGE", "copy"],
    "compare": ["compare", "-f", "FMT", "-F", "qcow2", "IMAGE", "copy"],
    "rebase": ["rebase", "-b", "", "top"],
    "resize": ["resize", "-f", "FMT", "IMAGE", "+512M"],
}


@pytest.mark.parametrize("fmt", ["qcow2", "vhdx", "vdi", "vmdk"])
def test_every_command_on_a_huge_disk(fmt, tmp_path):
    """As large as the format allows, with data at 200 places."""
    size = 2 * TIB - 1024 * MIB if fmt == "vmdk" else 16 * TIB
    done = support.run_instar("create", "-f", fmt, "image", str(size), cwd=tmp_path)
    assert done.rc == 0, str(done)
    rng = random.Random(17)
    places = [rng.randrange(size // MIB) * MIB for _ in range(200)]
    support.qemu_io(tmp_path / "image", *(f"write -P {number + 1} {place} 64k" for number, place in enumerate(places[:100])), fmt=fmt)
    support.create(tmp_path / "top", backing="image", backing_fmt=fmt, cwd=tmp_path)
    support.qemu_io(tmp_path / "top", *(f"write -P {number + 1} {place} 64k" for number, place in enumerate(places[100:])))
    for name, words in COMMANDS.items():
        peak = peak_memory(*({"FMT": fmt, "IMAGE": "image"}.get(word, word) for word in words), cwd=tmp_path)
        assert peak < LIMIT, f"{name}: {peak // MIB} MiB were resident"
    # What had to be small is what had to be right, too.
    written = [f"read -P {number + 1} {place} 64k" for number, place in enumerate(places[:100])]
    support.qemu_io(tmp_path / "copy", *written)
    support.qemu_io(tmp_path / "image", *written, fmt=fmt)
    support.qemu_io(tmp_path / "top", *written, *(f"read -P {number + 1} {place} 64k" for number, place in enumerate(places[100:])))
