"""Compressed clusters in the overlay and below the backing, as QEMU writes them."""

from __future__ import annotations

import os
import random
import re

import pytest
import qcow2_bytes
import support
from support import KIB, MIB, refuse


def mixed_bytes(size: int, seed: int) -> bytes:
    """Text-like and random stretches of 1 to 300 KiB, some of them zero."""
    rng = random.Random(seed)
    parts, length = [], 0
    while length < size:
        count = rng.randrange(1, 300) * KIB
        kind = rng.randrange(4)
        if kind == 0:
            part = rng.randbytes(count)
        elif kind == 1:
            part = bytes(count)
        else:
            words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(50)]
            part = b"".join(rng.choices(words, k=count // 2))[:count]
        parts.append(part)
        length += len(part)
    return b"".join(parts)[:size]


def convert_compressed(pair, size, seed=1, **options):
    """Makes the overlay by `qemu-img convert -c`; what is like the base stays out of it."""
    raw = pair.dir.parent / "content"
    raw.write_bytes(mixed_bytes(size, seed))
    pair.top.unlink(missing_ok=True)
    args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"]
    if options:
        args += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    support.qemu_img(*args, raw, pair.top, cwd=pair.dir)
    raw.unlink()
    image = qcow2_bytes.Image(pair.top)
    assert any(entry & qcow2_bytes.COMPRESSED for _, entry in image.mapped())
    return image


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
def test_converted_overlay(pair, compression, cluster_size):
    size = 2 * MIB + 1536 if cluster_size == 512 else 12 * MIB + 1536
    pair.make(size, base_options={"cluster_size": cluster_size}, base=["write -P 9 0 1M"])
    convert_compressed(pair, size, cluster_size=cluster_size, compression_type=compression)
    pair.check_commit()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_clusters_of_all_kinds(pair, compression):
    pair.make(8 * MIB, base=["write -P 9 0 4M"], top_options={"compression_type": compression},
              top=["write -P 1 0 1M", "write -z 2M 256k", "write -c -P 5 3M 64k", "write -c -P 6 3200k 64k",
                   "write -c -P 7 1M 64k", "write -P 8 1050k 3k", "write -c -P 3 6M 64k", "write -z 6M 4k"])
    pair.check_commit()


@pytest.mark.parametrize(("top", "base"), [(4 * KIB, 64 * KIB), (64 * KIB, 4 * KIB), (64 * KIB, 2 * MIB)])
def test_other_cluster_size(pair, top, base):
    pair.make(6 * MIB, base_options={"cluster_size": base}, base=["write -P 9 1M 1M"])
    convert_compressed(pair, 6 * MIB, cluster_size=top)
    pair.check_commit()


def test_version_2(pair):
    pair.make(6 * MIB, base_options={"compat": "0.10"}, base=["write -P 9 1M 1M"])
    convert_compressed(pair, 6 * MIB, compat="0.10")
    pair.check_commit()


def test_far_more_data_than_the_file_is_long(pair):
    """Compressed, 256 MiB are a few hundred KiB: the backing may grow by more than the overlay's length."""
    pair.make(256 * MIB)
    raw = pair.dir.parent / "content"
    raw.write_bytes(b"\x55" * (256 * MIB))
    pair.top.unlink()
    support.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", raw, pair.top,
                     cwd=pair.dir)
    raw.unlink()
    assert os.path.getsize(pair.top) < 4 * MIB
    pair.check_commit()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_ancestor_shows_through_partial_clusters(pair, compression):
    """The overlay's clusters are smaller than the backing's: the rest comes from a compressed ancestor."""
    size = 8 * MIB
    root = pair.dir / "root.qcow2"
    raw = pair.dir.parent / "content"
    raw.write_bytes(mixed_bytes(size, 7))
    support.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={compression}", raw, root)
    support.create(pair.base, backing="root.qcow2", cluster_size=256 * KIB)
    support.create(pair.top, backing="base.qcow2", cluster_size=4 * KIB)
    support.qemu_io(pair.top, *[f"write -P {i + 1} {i * 333 * KIB} 5k" for i in range(20)])
    with support.untouched(root):
        pair.check_commit()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_garbage_is_refused_untouched(pair, compression):
    pair.make(4 * MIB, base=["write -P 9 0 4M"], top_options={"compression_type": compression},
              top=["write -P 1 0 1M", "write -c -P 5 3M 64k"])
    image = qcow2_bytes.Image(pair.top)
    (entry,) = [entry for _, entry in image.mapped() if entry & qcow2_bytes.COMPRESSED]
    image.poke(entry & (1 << 54) - 1, b"\xff" * 32)
    refuse("ERROR_PARSE_FAILED", pair.top, files=[pair.base], mentions=[pair.top, "3145728", "`instar convert --salvage`"])


# A frame of 512 bytes. A bit of its Huffman streams was flipped, so that one ends beside its last bit (RFC 8878, section 4.2.2);
# the fast loop of Zstandard 1.5.7 decodes it all the same, to other bytes than 1.5.4 does.
BESIDE_ITS_END = bytes.fromhex(
    "28b52ffd60000135060016501607e0e95b2606a83a13001300130039c62a30a4d6b04b947e1edad6d5e52c69951605e733d3eaf95bd1db56"
    "730d05c2ae61d96901061555b2f8da5495e0326bb1c294859d579e9009ee343572a77c648605ef26b58bfc6851592d2030024394941ec439"
    "8591bb139a411658f84131cb2d46100eb0eb30d371474abca10d91629bc6c0856e6fbbff515e74ffb447568271bb628cfb065acb8a5ee1de"
    "fc7b810929e26aac64df7649a88b2de00ace7d420f981bde0be27cd8eb0adb94ae0b027908e055b8"
)


def test_streams_that_end_in_a_wrong_place_are_refused(pair):
    pair.make(64 * KIB, top_options={"compression_type": "zstd", "cluster_size": 512}, top=["write -c -P 5 1k 512"])
    image = qcow2_bytes.Image(pair.top)
    (entry,) = [entry for _, entry in image.mapped() if entry & qcow2_bytes.COMPRESSED]
    image.poke(entry & (1 << 61) - 1, BESIDE_ITS_END)
    refuse("ERROR_PARSE_FAILED", pair.top, files=[pair.base], mentions=[pair.top, "guest offset 1024 does not decode"])


@pytest.mark.parametrize("name, options", [
    ("qcow2", ["-O", "qcow2"]),
    ("qcow2", ["-O", "qcow2", "-o", "compression_type=zstd"]),
    ("vmdk", ["-O", "vmdk", "-o", "subformat=streamOptimized"]),
])  # fmt: skip
@pytest.mark.parametrize("size", [3 * MIB, 90 * MIB])
def test_what_is_left_of_damaged_compressed_data(tmp_path, name, options, size):
    """`convert --salvage`, with fewer clusters than are decoded before the first change, and with more."""
    raw, image, copy = tmp_path / "raw", tmp_path / "image", tmp_path / "copy.qcow2"
    content = b"".join(b"some text that can be compressed, %07d\n" % line for line in range(size // 42 + 1))[:size]
    raw.write_bytes(content)
    support.qemu_img("convert", "-c", "-f", "raw", *options, raw, image)
    file = bytearray(image.read_bytes())
    at = len(file) * 2 // 3
    if name == "qcow2":
        entries = [entry for _, entry in qcow2_bytes.Image(image).mapped() if entry & qcow2_bytes.COMPRESSED]
        at = entries[len(entries) // 2] & (1 << 54) - 1
    file[at:at + 64] = b"\xff" * 64
    image.write_bytes(file)
    with support.untouched(image):
        refused = support.run_instar("convert", "-O", "qcow2", image, copy)
        support.assert_refused(refused, "ERROR_PARSE_FAILED", "no image was made", "`instar convert --salvage`")
        for how in ([], ["-c"]):
            result = support.run_instar("convert", "--salvage", *how, "-O", "qcow2", "--output", "json", image, copy)
            assert result.rc == 0, str(result)
            (warning,) = result.json["warnings"]
            length, start = re.search(r"(\d+) bytes(?: \(\d+ KiB\))? from byte (\d+) of the disk on", warning).groups()
            lost = slice(int(start), int(start) + int(length))
            assert 0 < int(length) <= 128 * KIB, str(result)
            support.qemu_img("convert", "-O", "raw", copy, raw)
            read = raw.read_bytes()
            assert read[lost] == bytes(int(length)) != content[lost]
            assert read[:lost.start] == content[:lost.start] and read[lost.stop:] == content[lost.stop:]


def test_damage_is_told_of_the_disk_that_has_it(tmp_path):
    """Of several that are joined, each with its own name and its own bytes."""
    images = [tmp_path / name for name in ("first", "second", "third")]
    for image in images:
        support.create(image, 4 * MIB, compression_type="zstd")
        support.qemu_io(image, "write -c -P 5 0 64k", "write -c -P 6 1M 64k")
    for image, index in ((images[1], 0), (images[1], 1), (images[2], 1)):
        made = qcow2_bytes.Image(image)
        entries = sorted((at, entry) for at, entry in made.mapped() if entry & qcow2_bytes.COMPRESSED)
        made.poke(entries[index][1] & (1 << 54) - 1, b"\xff" * 32)
    result = support.run_instar("convert", "--salvage", "-O", "raw", "--output", "json", *images, tmp_path / "copy")
    assert result.rc == 0, str(result)
    told = [re.search(r"'(.*)': .* from byte (\d+) of the disk", warning).groups() for warning in result.json["warnings"]]
    assert told == [(str(images[1]), "0"), (str(images[1]), str(MIB)), (str(images[2]), str(MIB))], str(result)
    expected = b"".join(part + bytes(4 * MIB - len(part)) for part in (
        b"\5" * 64 * KIB + bytes(MIB - 64 * KIB) + b"\6" * 64 * KIB, b"", b"\5" * 64 * KIB))
    assert (tmp_path / "copy").read_bytes() == expected


def zero_refcounts(image):
    block = image.peek64(image.get("refcount_table_offset"))
    image.poke(block, bytes(image.cluster_size))


def spoil_refcount_table(image):
    image.poke64(image.get("refcount_table_offset"), 0x123456789)


def spoil_snapshots(image):
    image.poke(image.get("snapshots_offset"), b"\xff" * 200)


def move_snapshots(image):
    image.set("snapshots_offset", 1 << 40)


@pytest.mark.parametrize("damage, told", [
    (zero_refcounts, "has refcount 0"),
    (spoil_refcount_table, "refcount table entry 0 has reserved bits"),
    (spoil_snapshots, "snapshot table has an entry"),
    (move_snapshots, "snapshot table lies past the end"),
])  # fmt: skip
def test_damage_where_no_data_is_does_not_stop_a_salvage(tmp_path, damage, told):
    image, below, good, copy = (tmp_path / name for name in ("image", "below", "good", "copy"))
    support.create(below, 8 * MIB)
    support.qemu_io(below, "write -P 9 6M 1M")
    support.create(image, backing=below)
    support.qemu_io(image, "write -P 1 0 1M", "write -c -P 3 5M 64k")
    for path in (image, below):
        support.qemu_img("snapshot", "-c", "s", path)
    support.qemu_io(image, "write -P 4 512k 64k")
    support.qemu_img("convert", "-O", "raw", image, good)
    for path in (image, below):
        damage(qcow2_bytes.Image(path))
    with support.untouched(image, below):
        refused = support.run_instar("convert", "-O", "raw", image, copy)
        assert refused.rc == 1 and "no image was made" in refused.stderr, str(refused)
        result = support.run_instar("convert", "--salvage", "-O", "raw", "--output", "json", image, copy)
    assert result.rc == 0, str(result)
    assert copy.read_bytes() == good.read_bytes()
    for path, warning in zip((image, below), result.json["warnings"], strict=True):
        assert f"'{path}'" in warning and told in warning and "ignored" in warning, str(result)


def test_truncated_overlay_is_refused_untouched(pair):
    pair.make(8 * MIB, base=["write -P 9 0 4M"])
    image = convert_compressed(pair, 8 * MIB)
    os.truncate(pair.top, image.file_size - 128 * KIB)
    refuse("ERROR_OVERLAY_CORRUPT", pair.top, files=[pair.base], mentions=[pair.top])
