"""What the kernel alone needs for a commit: `copy_file_range` of the same extents and the same flushes, without metadata."""

import json
import os
import time

import children
from workloads import GIB, call

# What is left of an emptied overlay, in bytes: of a qcow2 with clusters of 64 KiB, of a VHD, of a VHDX.
EMPTY = {"qcow2": 256 << 10, "vpc": 64 << 10, "vhdx": 4 << 20}


def data(path):
    """Where the data of a qcow2 image itself lies, in bytes: guest offset, file offset, length."""
    done = call(["qemu-img", "map", "--output", "json", "-f", "qcow2", str(path)])
    return [(part["start"], part["offset"], part["length"]) for part in json.loads(done.stdout)
            if part["depth"] == 0 and part["data"] and "offset" in part]


def extents(workload, template):
    """From where to where in the files: for one qcow2 overlay with data from end to end, over a qcow2 base, and for children."""
    if workload.differencing:
        return between_children(workload, template)
    plain = workload.sequential and not workload.scattered and not workload.zeroes and not workload.compress and workload.layers == 1
    if not plain or workload.overlay_format != "qcow2" or workload.base_format != "qcow2" or workload.sequential > GIB:
        return []
    source, target = data(template / workload.overlay), data(template / workload.base)
    if not target:
        # New clusters, at the end.
        end = (template / workload.base).stat().st_size
        start = source[0][0]
        target = [(start, end, sum(length for _, _, length in source))]
    found = []
    for guest, at, length in source:
        for low, place, size in target:
            begin, end = max(guest, low), min(guest + length, low + size)
            if begin < end:
                found.append((at + begin - guest, place + begin - low, end - begin))
    assert sum(length for _, _, length in found) == workload.sequential
    return found


def between_children(workload, template):
    """The same for a child and its parent: to where the parent has the block, or to a new one at its end."""
    kind, found = workload.base_format, []
    with children.FORMATS[kind](template / workload.base) as base:
        blocks, block = dict(base.blocks()), base.block
    # Whole MiB, as blocks of a VHDX have to lie.
    end = -(-(template / workload.base).stat().st_size // (1 << 20)) << 20
    for guest, at, length in children.data(kind, template / workload.overlay, workload.places()):
        done = 0
        while done < length:
            within = (guest + done) % block
            if guest + done - within not in blocks:
                blocks[guest + done - within], end = end, end + block
            count, place = min(length - done, block - within), blocks[guest + done - within] + within
            if found and (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]) == (at + done, place):
                found[-1] = (*found[-1][:2], found[-1][2] + count)
            else:
                found.append((at + done, place, count))
            done += count
    assert sum(length for _, _, length in found) == sum(length for _, length in workload.places())
    return found


def run(workload, directory, places):
    """Copy, flush, give the overlay's space back, flush. Seconds of both halves."""
    overlay = os.open(directory / workload.overlay, os.O_RDWR)
    base = os.open(directory / workload.base, os.O_RDWR)
    start = time.perf_counter()
    for source, target, length in places:
        done = 0
        while done < length:
            copied = os.copy_file_range(overlay, base, length - done, source + done, target + done)
            assert copied > 0
            done += copied
    os.fdatasync(base)
    copied = time.perf_counter()
    os.ftruncate(overlay, EMPTY[workload.overlay_format])
    os.fdatasync(overlay)
    emptied = time.perf_counter()
    os.close(overlay)
    os.close(base)
    return {"copy": copied - start, "empty": emptied - copied}
