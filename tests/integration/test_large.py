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
