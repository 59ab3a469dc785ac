"""How the cost of a commit grows: with the data, with the number of its extents, and with the virtual size."""

import contextlib
import sys

from workloads import GIB, KIB, MIB, Workload, built, call, text

TIB = 1 << 40


def measure(directory, instar, quick, verbose_run, timed):
    """Both series: a list of results each."""
    biggest = 64 * MIB if quick else 4 * GIB
    data = [MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB, 4 * GIB]
    mapped = [GIB, 8 * GIB] if quick else [GIB, 16 * GIB, 64 * GIB]
    extents = [250, 1000] if quick else [1000, 4000, 16000]
    sizes = [GIB, 16 * GIB, TIB, 16 * TIB]
    series = {
        "data": [(size, text(size), lambda place, size=size: with_data(place, size)) for size in data if size <= biggest],
        "mapped": [(size, text(size), lambda place, size=size: with_mapping(place, size)) for size in mapped],
        "size": [(size, text(size), lambda place, size=size: with_size(place, size)) for size in sizes],
    }
    series["extents"] = [
        (number, f"{number:,}", lambda place, number=number: with_extents(place, number)) for number in extents
    ]
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
        with build(directory) as places:
            place = places["growth"]
            if number == 0:
                facts = verbose_run([instar, "commit", "-v", "overlay.qcow2"], place)
            else:
                seconds.append(timed([instar, "commit", "-q", "overlay.qcow2"], place))
    return {"seconds": min(seconds), "exits": facts["exits"], "peak_rss_kib": facts["peak_rss_kib"], "moved": facts["bytes"]}


def pair(directory, disk, **writes):
    """A base, and an overlay with these writes."""
    return built(Workload("growth", "", disk, **writes), directory, ["growth"])


def with_data(directory, size):
    """So much data in a disk that it fills."""
    return pair(directory, size, sequential=size)


def with_extents(directory, number):
    """So many writes of 4 KiB, scattered over 8 GiB: each is an extent of its own, on both sides."""
    return pair(directory, 8 * GIB, scattered=number, unit=4 * KIB)


@contextlib.contextmanager
def with_mapping(directory, size):
    """So much of the disk is mapped by the overlay's tables; the clusters are holes of its file, so that it fits anywhere."""
    with pair(directory, size) as places:
        place = places["growth"]
        call(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "overlay.qcow2", str(size)], cwd=place)
        call(["qemu-img", "rebase", "-u", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"], cwd=place)
        call(["sync"])
        yield places


def with_size(directory, size):
    """64 MiB in 1,024 clusters that are scattered over a disk of this size."""
    return pair(directory, size, scattered=1024)
