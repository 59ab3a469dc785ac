"""Guests with several processors: images, errors and requests are the same however many there are."""

from __future__ import annotations

import os
import random
import re

import pytest
import support
from support import MIB

#: So much has to be in a file for more processors to be used: `engine/src/operation/images.rs`.
LARGE = 32 * MIB
CLUSTER = 64 * 1024
#: How many processors a run may use: the first so many of those that this machine lends us.
CHOICES = [1, 2, 4]


def processors():
    return sorted(os.sched_getaffinity(0))


def on(count, *args):
    """Run instar on so many processors. Returns the result, and what it says of the guest."""
    chosen = ",".join(map(str, processors()[:count]))
    return support.run("taskset", "-c", chosen, support.instar_binary(), *args)


def guest(result):
    """What the guest asked for, and on how many processors."""
    asked = re.search(r"guest: sandbox .*", result.stderr).group()
    return asked, int(re.search(r"guest: (\d+) processors?", result.stderr).group(1))


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk whose clusters shrink to half, some of them to nothing, and some of which do not shrink."""
    rng = random.Random(7)
    path = tmp_path_factory.mktemp("workers") / "disk.raw"
    with open(path, "wb") as file:
        for index in range(80 * MIB // CLUSTER):
            noise = {3: CLUSTER, 5: 0}.get(index % 16, CLUSTER // 2)
            file.write(rng.randbytes(noise) + bytes([index % 255 + 1]) * (CLUSTER - noise))
    return path


@pytest.fixture(scope="module", params=["zlib", "zstd"])
def compressed(request, disk, tmp_path_factory):
    path = tmp_path_factory.mktemp("compressed") / f"{request.param}.qcow2"
    options = ["-o", f"compression_type={request.param}"]
    assert support.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *options, disk, path).rc == 0
    assert path.stat().st_blocks * 512 >= LARGE, "no more processors are used for less"
    return request.param, path


def test_decoding(compressed, disk, tmp_path):
    _, image = compressed
    asked = set()
    for count in CHOICES:
        target = tmp_path / f"{count}.raw"
        result = on(count, "convert", "-v", "-O", "raw", image, target)
        assert result.rc == 0, str(result)
        assert target.read_bytes() == disk.read_bytes()
        requests, used = guest(result)
        assert used == min(count, len(processors())), str(result)
        asked.add(requests)
        target.unlink()
    assert len(asked) == 1, "what is asked for does not depend on the machine"


def test_encoding(compressed, disk, tmp_path):
    kind, _ = compressed
    images, asked = set(), set()
    for count in CHOICES:
        target = tmp_path / "target.qcow2"
        options = ["-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}"]
        result = on(count, "convert", "-v", "-c", *options, disk, target)
        assert result.rc == 0, str(result)
        images.add(target.read_bytes())
        asked.add(guest(result)[0])
        assert guest(result)[1] == min(count, len(processors())), str(result)
    assert len(images) == 1, "the same file, byte for byte"
    assert len(asked) == 1
    compared = support.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, target)
    assert compared.rc == 0, str(compared)
    support.assert_clean(target)


def test_fewer_by_choice(compressed, tmp_path):
    _, image = compressed
    result = support.run_instar("convert", "-v", "-m", "1", "-O", "raw", image, tmp_path / "target")
    assert result.rc == 0 and guest(result)[1] == 1, str(result)


def test_small_images_are_for_one(tmp_path):
    image = tmp_path / "small.qcow2"
    support.create(image, 4 * MIB)
    result = support.run_instar("convert", "-v", "-O", "raw", image, tmp_path / "target")
    assert result.rc == 0 and guest(result)[1] == 1, str(result)


def test_the_first_damage_is_told(compressed, tmp_path):
    """Two streams are damaged: the error is about the one that comes first on the disk, whoever decodes the other first."""
    _, original = compressed
    mapped = support.run("qemu-img", "map", "--output", "json", original)
    assert mapped.rc == 0
    image = tmp_path / "damaged.qcow2"
    content = bytearray(original.read_bytes())
    # The streams stand in the order of the disk: two of them are overwritten, next to each other and behind.
    for at in (len(content) // 2, len(content) // 2 + 3 * CLUSTER):
        content[at : at + CLUSTER] = bytes([0xFF]) * CLUSTER
    image.write_bytes(content)
    told = set()
    for count in CHOICES:
        result = on(count, "convert", "-O", "raw", image, tmp_path / "target")
        assert result.rc == 1 and "compressed cluster" in result.stderr, str(result)
        assert not (tmp_path / "target").exists()
        told.add(result.stderr)
    assert len(told) == 1, told
