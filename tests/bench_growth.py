"""How the cost of a commit grows: with the data, and with the virtual size."""

import random
import shutil
import sys

from bench_workloads import GIB, KIB, MIB, Image, call, fill, text

TIB = 1 << 40


def measure(directory, instar, quick, verbose_run, timed):
    """Both series: a list of results each."""
    biggest = 64 * MIB if quick else 4 * GIB
    data = [MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB, 4 * GIB]
    mapped = [GIB, 8 * GIB] if quick else [GIB, 16 * GIB, 64 * GIB]
    sizes = [GIB, 16 * GIB, TIB, 16 * TIB]
    series = {
        "data": [(size, text(size), lambda place, size=size: with_data(place, size)) for size in data if size <= biggest],
        "mapped": [(size, text(size), lambda place, size=size: with_mapping(place, size)) for size in mapped],
        "size": [(size, text(size), lambda place, size=size: with_size(place, size)) for size in sizes],
    }
    results = {}
    for name, points in series.items():
        results[name] = []
        for size, title, build in points:
            print(f"growth: {name}, {title} …", file=sys.stderr, flush=True)
            results[name].append({"bytes": size, "title": title, **one(directory, instar, build, verbose_run, timed)})
    return results


def one(directory, instar, build, verbose_run, timed):
    """Build a pair and commit it, three times; the least time of it."""
    seconds, facts = [], {}
    for number in range(3):
        place = directory / "growth"
        place.mkdir()
        build(place)
        call(["sync"])
        if number == 0:
            facts = verbose_run([instar, "commit", "-v", "overlay.qcow2"], place)
        else:
            seconds.append(timed([instar, "commit", "-q", "overlay.qcow2"], place))
        shutil.rmtree(place)
    return {"seconds": min(seconds), "exits": facts["exits"], "peak_rss_kib": facts["peak_rss_kib"], "moved": facts["bytes"]}


def pair(place, size):
    """An empty base, and an overlay."""
    call(["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", str(size)], cwd=place)
    call(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"], cwd=place)


def with_data(place, size):
    """So much data in a disk that it fills."""
    pair(place, size)
    fill(place / "overlay.qcow2", 0, size, random.Random(5))


def with_mapping(place, size):
    """So much of the disk is mapped by the overlay's tables; the clusters are holes of its file, so that it fits anywhere."""
    pair(place, size)
    call(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "overlay.qcow2", str(size)], cwd=place)
    call(["qemu-img", "rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"], cwd=place)


def with_size(place, size):
    """64 MiB in 1,024 clusters that are scattered over a disk of this size."""
    pair(place, size)
    image = Image(str(place / "overlay.qcow2"), writable=True)
    rng = random.Random(6)
    for cluster in sorted(rng.sample(range(size // (64 * KIB)), 1024)):
        image.write(cluster * 64 * KIB, rng.randbytes(64 * KIB))
    image.file.close()
