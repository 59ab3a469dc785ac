"""Persistent bitmaps as qemu sees them: the granules of an image that a bitmap calls dirty."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from pathlib import Path

import qcow2_bytes
import support


def names(path) -> dict[str, dict]:
    """The bitmaps of an image: name -> flags and granularity."""
    return {b["name"]: b for b in support.info(path)["format-specific"]["data"].get("bitmaps", [])}


def add(path, name, *options) -> None:
    support.qemu_img("bitmap", "--add", *options, path, name)


def dirty(path, name) -> list[tuple[int, int]]:
    """(start, end) of each dirty range of a bitmap, through an NBD export of it."""
    with tempfile.TemporaryDirectory(prefix="nbd") as directory:
        socket = Path(directory) / "s"
        # It ends with its first client.
        export = support.run("qemu-nbd", "--fork", "-r", "-f", "qcow2", "-k", socket, "-B", name, "--pid-file", f"{socket}.pid", path)
        assert export.rc == 0, str(export)
        options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        found = json.loads(support.qemu_img("map", "--output=json", "--image-opts", options).stdout)
        # It holds its lock on the image until it has ended; then it has no command line, though nobody may reap it.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            process = Path("/proc") / Path(f"{socket}.pid").read_text().strip()
            while (process / "cmdline").read_bytes():
                time.sleep(0.001)
    # The export calls dirty what is "no data".
    return merge((e["start"], e["start"] + e["length"]) for e in found if not e["data"])


def merge(ranges) -> list[tuple[int, int]]:
    """Sorted ranges, adjacent and overlapping ones merged."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def rounded(ranges, granularity, size) -> list[tuple[int, int]]:
    """Ranges widened to whole granules, as far as the disk goes."""
    return merge(
        (start // granularity * granularity, min(-(-end // granularity) * granularity, size)) for start, end in ranges
    )


def within(inner, outer) -> bool:
    return merge([*inner, *outer]) == merge(outer)


def held(top):
    """Byte ranges that the overlay holds, cluster by cluster."""
    image = qcow2_bytes.Image(top)
    size, cluster = support.virtual_size(top), image.cluster_size
    return [(n * cluster, min((n + 1) * cluster, size)) for n, _ in image.mapped()]
