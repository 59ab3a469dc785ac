"""File systems to measure on, in files that are gone afterwards."""

import contextlib
import os
import pathlib
import sys

from workloads import GIB, call

# Sparse: only what is written takes space.
SIZE = 24 * GIB
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q", "-f"]}


@contextlib.contextmanager
def mounted(kind, directory):
    """A directory on a file system of this kind; `directory` itself if it is empty, `None` if it cannot be mounted."""
    if not kind:
        yield directory
        return
    if os.geteuid() != 0:
        yield None
        return
    place, image = pathlib.Path(f"{directory}.{kind}"), pathlib.Path(f"{directory}.{kind}.img")
    place.mkdir()
    try:
        if kind == "tmpfs":
            call(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)])
        else:
            with open(image, "wb") as file:
                file.truncate(SIZE)
            call([*MAKE[kind], str(image)])
            call(["mount", "-o", "loop", str(image), str(place)])
        try:
            inside = place / "images"
            inside.mkdir()
            yield inside
        finally:
            call(["umount", str(place)])
    finally:
        image.unlink(missing_ok=True)
        place.rmdir()


def measure_each(chosen, directory, measure):
    """What `measure` makes of each of these on its file system; what cannot be measured here is said."""
    results = []
    for one in chosen:
        print(f"{one.title} …", file=sys.stderr, flush=True)
        with mounted(one.file_system, directory) as place:
            if place is None:
                print(f"  not measured: {one.file_system} has to be mounted, which takes root", file=sys.stderr)
                continue
            results.append(measure(one, pathlib.Path(place)))
    return results
