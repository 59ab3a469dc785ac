"""Chains as backup programs leave them: 30, 64, 200 layers and more. `qemu-img` on copies is the oracle."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import qcow2_bytes
import support
from support import KIB, MIB, qemu_img, qemu_io, refuse

# As in guest/abi/src/config.rs: how many images a chain may have besides the one that is written.
MAX_CHAIN_DEVICES = 512
LARGE, SMALL = 16 * KIB, 4 * KIB
SIZE = 8 * MIB


def name(number: int) -> str:
    return f"layer-{number:04}"


def make(directory, count: int, *, written: int):
    """`count` images, each backed by the one before. The lowest is full of data, and the `written` highest ones hold 4 KiB
    each. Every second one has larger clusters, so that what is committed into it covers them only in part."""
    directory.mkdir()
    low = support.create(directory / name(0), SIZE, cluster_size=LARGE)
    qemu_io(low, f"write -P 255 0 {SIZE}")
    templates = [support.create(directory / f"template-{size}", backing=name(0), cluster_size=size) for size in (LARGE, SMALL)]
    for number in range(1, count):
        shutil.copy(templates[number % 2], directory / name(number))
        qcow2_bytes.Image(directory / name(number)).set_backing(name(number - 1).encode())
    for template in templates:
        template.unlink()
    for number in range(count - written, count):
        # Alone: opening all that is below it for each of them would take minutes.
        file = {"driver": "file", "filename": str(directory / name(number))}
        alone = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file})
        at = (number * 3 + number % 7) * SMALL
        subprocess.run(["qemu-io", "-c", f"write -P {number % 251 + 1} {at} 4k", alone], check=True, capture_output=True,
                       timeout=support.TIMEOUT)
    return directory


def check(directory, tmp_path, top: int, base: int, *options):
    """Commits `top` into `base`, and holds the content against that of a commit by `qemu-img`."""
    copies = tmp_path / "copies"
    shutil.copytree(directory, copies)
    qemu_img("commit", "-q", "-b", name(base), copies / name(top), cwd=copies)
    before = support.content_hash(directory / name(top))
    others = [path for path in directory.iterdir() if path.name not in (name(top), name(base))]
    with support.untouched(*others):
        result = support.commit(directory / name(top), *options, "--output", "json")
    assert result.json["clusters_committed"] > 0
    assert support.content_hash(directory / name(base)) == support.content_hash(copies / name(base))
    assert support.content_hash(directory / name(top)) == before
    support.assert_clean(directory / name(base))
    shutil.rmtree(copies)


def test_thirty_layers(tmp_path):
    directory = make(tmp_path / "images", 32, written=31)
    check(directory, tmp_path, 31, 30)
    check(directory, tmp_path, 30, 0, "-b", name(0))


@pytest.mark.parametrize("count", [200, 258])
def test_the_newest_into_its_parent(tmp_path, count):
    """The larger clusters of the parent are filled from far below."""
    check(make(tmp_path / "images", count, written=3), tmp_path, count - 1, count - 2)


@pytest.mark.parametrize("count", [200, 258])
def test_all_into_the_lowest(tmp_path, count):
    check(make(tmp_path / "images", count, written=count - 1), tmp_path, count - 1, 0, "-b", name(0))


def test_a_long_chain_is_mapped(tmp_path):
    directory = make(tmp_path / "images", 257, written=256)
    ours = support.run_instar("map", "--output", "json", directory / name(256))
    theirs = qemu_img("map", "--output", "json", directory / name(256))
    depths = [[(run["start"], run["length"], run["depth"]) for run in result.json] for result in (ours, theirs)]
    assert depths[0] == depths[1] and len(depths[0]) > 256


def test_the_limit(tmp_path):
    """All of the chain but the backing have a device."""
    directory = make(tmp_path / "images", MAX_CHAIN_DEVICES + 2, written=2)
    top, next_one = directory / name(MAX_CHAIN_DEVICES + 1), directory / name(MAX_CHAIN_DEVICES)
    refuse("ERROR_CHAIN_TOO_DEEP", top, files=[next_one], mentions=[f"{MAX_CHAIN_DEVICES} layers"])
    before = support.content_hash(directory / name(1))
    support.commit(next_one)
    assert support.holds_no_clusters(next_one)
    assert support.content_hash(directory / name(1)) == before
