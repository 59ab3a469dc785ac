"""What the promises of a commit cost: `--verify`, `--digest` and `--atomic`, against a commit without them.

A promise has a goal of its own. `--verify` may take as long as it takes to read once what was committed, on either side and past the
page cache: that read is measured, too, on the same files. `--atomic` may take some milliseconds more where the file system
shares extents, however much is committed. `--digest` reads the whole disk twice, and has none.
"""

import dataclasses
import os
import statistics
import time

from commands import timed
from report import span
from workloads import GIB, MIB, Workload, built, text

MARKS = ("<!-- bench-promises:begin -->", "<!-- bench-promises:end -->")
#: Milliseconds that `--atomic` may take besides.
ATOMIC_MS = 10
CHUNK = 1 << 20


@dataclasses.dataclass
class Promise:
    """An option, and what is committed."""

    option: str
    workload: Workload
    where: str
    file_system: str

    @property
    def name(self):
        """What `--only` takes."""
        return f"{self.option.strip('-')}-{self.workload.name}-{self.file_system}"

    @property
    def title(self):
        """What the table says."""
        return f"`{self.option}`, {self.workload.title}, on {self.where}"


def promises(quick):
    """All of them."""
    size = 64 * MIB if quick else GIB
    over = Workload("over", f"{text(size)} over existing clusters", size, sequential=size, full_base=True)
    new = Workload("new", f"{text(size)} into new clusters", size, sequential=size)
    few = Workload("few", "64 writes of 64 KiB", 8 * GIB, scattered=64)
    found = []
    for kind, where in (("ext4", "ext4"), ("xfs", "XFS"), ("btrfs", "btrfs")):
        found += [Promise("--verify", workload, where, kind) for workload in (over, new)]
        if kind != "ext4":
            found += [Promise("--atomic", workload, where, kind) for workload in (few, over, new)]
    return [*found, Promise("--digest", over, "XFS", "xfs")]


def read_once(path):
    """Seconds to read a file's data past the page cache, without its holes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, end = bytearray(CHUNK), os.fstat(descriptor).st_size

        def read():
            at = 0
            while at < end:
                try:
                    at = os.lseek(descriptor, at, os.SEEK_DATA)
                    hole = os.lseek(descriptor, at, os.SEEK_HOLE)
                except OSError:
                    return
                while at < hole:
                    count = os.preadv(descriptor, [memoryview(buffer)[: min(CHUNK, hole - at)]], at)
                    at += max(count, 1)

        return clocked(read)
    finally:
        os.close(descriptor)


def clocked(work):
    """Wall time in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(promise, place, instar, runs):
    """Commits with and without the option, in turn; the first of each is not counted. For `--verify`, also the read."""
    names = ("plain", "with")
    seconds = {"plain": [], "with": [], "read": []}
    for number in range(-1, runs + runs % 2):
        with built(promise.workload, place, names) as places:
            for name in names if number % 2 else reversed(names):
                options = [promise.option] if name == "with" else []
                images = places[name]
                taken = timed([instar, "commit", "-q", *options, "-d", str(images / promise.workload.overlay)])
                # Both sides, as the comparison reads them: the overlay is still whole.
                read = 0
                if promise.option == "--verify" and name == "with":
                    read = read_once(images / promise.workload.base) + read_once(images / promise.workload.overlay)
                if number >= 0:
                    seconds[name].append(taken)
                    if read:
                        seconds["read"].append(read)
    numbers = {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times), "seconds": times} if times else None
        for name, times in seconds.items()
    }
    more = numbers["with"]["median"] - numbers["plain"]["median"]
    limit = numbers["read"]["median"] if numbers["read"] else ATOMIC_MS / 1000 if promise.option == "--atomic" else None
    return {"name": promise.name, "title": promise.title, "numbers": numbers, "more": more, "goal": limit}


def table(results):
    """The promises as Markdown."""
    titles = ("promise", "without it", "with it", "more", "goal")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in results:
        numbers, goal = result["numbers"], result["goal"]
        if numbers["read"]:
            said = f"≤ {goal * 1e3:.0f} ms: one read of both"
        else:
            said = "–" if goal is None else f"≤ {goal * 1e3:.0f} ms"
        cells = [result["title"], span(numbers["plain"]), span(numbers["with"]), f"{result['more'] * 1e3:.1f} ms", said]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
