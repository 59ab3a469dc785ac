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


def test_decoding_what_was_written_out_of_order(compressed, disk, tmp_path):
    """`qemu-img convert -W` puts clusters where it is done with them: their streams do not follow each other in the file."""
    kind, _ = compressed
    image, asked = tmp_path / "scattered.qcow2", set()
    options = ["-o", f"compression_type={kind}"]
    support.qemu_img("convert", "-c", "-W", "-m", "16", "-f", "raw", "-O", "qcow2", *options, disk, image)
    for count in CHOICES:
        target = tmp_path / f"{count}.raw"
        result = on(count, "convert", "-v", "-O", "raw", image, target)
        assert result.rc == 0, str(result)
        assert target.read_bytes() == disk.read_bytes()
        asked.add(guest(result)[0])
        target.unlink()
    assert len(asked) == 1, asked


@pytest.mark.parametrize("fmt, options", [("qcow", []), ("vmdk", ["-o", "subformat=streamOptimized"])], ids=["qcow", "vmdk"])
def test_decoding_other_formats(fmt, options, disk, tmp_path):
    image, asked = tmp_path / "image", set()
    compress = ["-c"] if fmt == "qcow" else []
    # It fails at the end of a compressed qcow, without a word and when all of it is written.
    support.qemu_img("convert", *compress, "-f", "raw", "-O", fmt, *options, disk, image, rc=None)
    compared = support.run("qemu-img", "compare", "-f", "raw", "-F", fmt, disk, image)
    assert compared.rc == 0 and image.stat().st_blocks * 512 >= LARGE, str(compared)
    for count in CHOICES:
        target = tmp_path / f"{count}.raw"
        result = on(count, "convert", "-v", "-f", fmt, "-O", "raw", image, target)
        assert result.rc == 0, str(result)
        assert target.read_bytes() == disk.read_bytes()
        requests, used = guest(result)
        assert used == min(count, len(processors())), str(result)
        asked.add(requests)
        target.unlink()
    assert len(asked) == 1, asked
    # A stream of qcow has no checksum: most damage decodes.
    if fmt == "vmdk":
        damage_is_told_and_salvaged(image, fmt, tmp_path)


def damage_is_told_and_salvaged(image, fmt, folder):
    """Damage here and there is refused, and salvaged, alike by any number of processors."""
    rng, content = random.Random(3), bytearray(image.read_bytes())
    for at in range(8 * MIB, len(content) - 4 * MIB, 3 * MIB):
        begin = at + rng.randrange(MIB)
        content[begin : begin + 64] = rng.randbytes(64)
    image.write_bytes(content)
    told, salvaged = set(), set()
    for count in CHOICES * 2:
        target = folder / "target"
        result = on(count, "convert", "-f", fmt, "-O", "raw", image, target)
        assert result.rc == 1 and "ERROR_PARSE_FAILED" in result.stderr and not target.exists(), str(result)
        result = on(count, "convert", "--salvage", "-f", fmt, "-O", "raw", image, target)
        assert result.rc == 0, str(result)
        told.add(result.stderr)
        salvaged.add(target.read_bytes())
        target.unlink()
    assert len(told) == len(salvaged) == 1, told


def test_committing_what_is_compressed(compressed, disk, tmp_path):
    """While the host writes into the backing, and flushes it, other processors decode."""
    _, original = compressed
    overlay, base, images, asked = tmp_path / "overlay.qcow2", tmp_path / "base.qcow2", set(), set()
    for count in CHOICES:
        base.unlink(missing_ok=True)
        support.create(base, 80 * MIB)
        overlay.write_bytes(original.read_bytes())
        support.qemu_img("rebase", "-u", "-b", base.name, "-F", "qcow2", overlay)
        result = on(count, "commit", "-v", overlay)
        assert result.rc == 0, str(result)
        images.add(support.digest(base))
        requests, used = guest(result)
        assert used == min(count, len(processors())), str(result)
        asked.add(requests)
    assert len(images) == 1 and len(asked) == 1, asked
    support.assert_clean(base)
    compared = support.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, base)
    assert compared.rc == 0, str(compared)


def test_a_small_overlay_over_much(compressed, disk, tmp_path):
    """The overlay says nothing of what is below it; a large file beside it may be that."""
    _, original = compressed
    base, overlay, target = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2", tmp_path / "target"
    os.link(original, base)
    support.create(overlay, backing=base.name, backing_fmt="qcow2")
    result = support.run_instar("convert", "-v", "-O", "raw", overlay, target)
    assert result.rc == 0 and guest(result)[1] == min(2, len(processors())), str(result)
    assert target.read_bytes() == disk.read_bytes()


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
    """Streams are damaged, and others before and behind them are not: the error is about the one that comes first on the disk,
    whoever decodes another one first."""
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
