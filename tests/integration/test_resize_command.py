"""`instar resize`: what images read as afterwards, by `qemu-img` and `qemu-io`, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import subprocess

import pytest
import support
from support import GIB, KIB, MIB

GROWING = ["raw", "qcow2", "qcow", "vdi", "vpc", "vhdx", "parallels", "vmdk"]
SHRINKING = ["raw", "qcow2"]


def content(image, fmt="qcow2", snapshot=None):
    """All bytes of a disk, as qemu-img reads them."""
    raw = image.with_name(f"{image.name}.as-raw")
    options = ["-l", snapshot] if snapshot else []
    support.qemu_img("convert", "-f", fmt, *options, "-O", "raw", image, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def resize(image, *size, fmt="qcow2"):
    return support.run_instar("resize", "-f", fmt, image, *size)


def resized(image, size, *options, fmt="qcow2"):
    """Resize; the disk then reads as before up to the lesser size, and zeroes from there on."""
    before = content(image, fmt)
    done = resize(image, *options, str(size), fmt=fmt)
    assert (done.rc, done.stderr) == (0, ""), done
    after = content(image, fmt)
    assert len(after) == size
    assert after == before[:size].ljust(size, b"\0")
    if fmt in ("qcow2", "vdi", "vhdx", "parallels", "vmdk"):
        support.assert_clean(image, fmt)
    return done


def scribble(rng, image, size, fmt="qcow2", count=12):
    writes = []
    for number in range(count):
        at = rng.randrange(size // 512) * 512
        writes.append(f"write -P {number + 1} {at} {min(rng.choice([512, 4096, 70000 // 512 * 512, 300 * 1024]), size - at)}")
    support.qemu_io(image, *writes, fmt=fmt)


def refused(image, *options, words=(), status=None, fmt="qcow2", also=()):
    with support.untouched(image, *also):
        done = resize(image, *options, fmt=fmt)
    assert done.rc in ((1, 2) if status is None else (status,)), done
    assert done.stdout == "" and done.stderr.count("\n") == 1, done
    for word in words:
        assert word in done.stderr, done
    return done


@pytest.mark.parametrize("fmt", GROWING)
def test_every_format_grows(tmp_path, fmt):
    rng = random.Random(fmt)
    image = tmp_path / "disk"
    support.create(image, 3 * MIB, fmt=fmt)
    size = support.virtual_size(image, fmt)
    scribble(rng, image, size, fmt)
    support.qemu_io(image, f"write -P 99 {size - 512} 512", fmt=fmt)
    for more in (512, 5 * MIB + 1024, 37 * 512):
        size += more
        assert resized(image, size, fmt=fmt).stdout == "Image resized.\n"
    with support.untouched(image):
        assert resize(image, str(size), fmt=fmt).stdout.startswith(f"The image has {size} bytes (")


@pytest.mark.parametrize(("fmt", "mode"), [("raw", "falloc"), ("raw", "full"), *itertools.product(
    ["qcow2", "vmdk", "vdi"], ["metadata", "falloc", "full"])])
def test_what_is_new_has_its_place_at_once(tmp_path, fmt, mode):
    """As with `qemu-img`: so much space, and a write into it takes no new clusters."""
    image, other = tmp_path / "disk", tmp_path / "other"
    for path in (image, other):
        support.create(path, MIB, fmt=fmt)
        support.qemu_io(path, "write -P 5 0 1M", fmt=fmt)
    space = image.stat().st_blocks * 512
    resized(image, 17 * MIB, f"--preallocation={mode}", fmt=fmt)
    took, length = image.stat().st_blocks * 512 - space, image.stat().st_size
    assert (took >= 16 * MIB) == (mode != "metadata"), took
    if fmt in ("raw", "qcow2"):
        support.qemu_img("resize", "-q", "-f", fmt, f"--preallocation={mode}", other, "17M")
        theirs = other.stat().st_blocks * 512 - space
        assert abs(theirs - took) <= MIB, (theirs, took)
    support.qemu_io(image, "write -P 6 3M 1M", fmt=fmt)
    assert image.stat().st_size == length, "a write into what is preallocated took new clusters"
    assert content(image, fmt) == (b"\5" * MIB + bytes(2 * MIB) + b"\6" * MIB).ljust(17 * MIB, b"\0")


def test_a_size_that_is_rounded_up_is_the_same_a_second_time(tmp_path):
    image = tmp_path / "disk"
    made = support.run_instar("create", "-f", "vhdx", "-o", "logical_sector_size=4096", image, "5M")
    assert made.rc == 0, made
    size = 6 * MIB + 512
    done = support.run_instar("resize", "--output", "json", image, str(size))
    assert done.json["virtual-size"] == 6 * MIB + 4096, done
    with support.untouched(image):
        again = support.run_instar("resize", image, str(size))
        assert (again.rc, again.stdout) == (0, f"The image has {6 * MIB + 4096} bytes (6 MiB) already.\n"), again
        less = support.run_instar("resize", image, str(6 * MIB))
        assert less.rc == 1 and "cannot shrink" in less.stderr, less


def test_how_far_it_is(tmp_path):
    image = tmp_path / "disk"
    support.create(image, MIB)
    done = resize(image, "--progress=json", "--preallocation=full", "200M")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.rc == 0 and {line["type"] for line in lines} == {"resize"}, done
    stages = [line["stage"] for line in lines if "stage" in line]
    assert stages[0] == "checking" and stages[-1] == "writing" and lines[-1]["current-progress"] == 199 * MIB, lines
    assert "100 % (209715200 of 209715200 bytes" in resize(image, "-p", "--preallocation=full", "400M").stderr


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_every_kind_of_vmdk_grows(tmp_path, subformat):
    rng = random.Random(subformat)
    image = tmp_path / "disk.vmdk"
    size = 3 * MIB + 512
    support.create(image, size, fmt="vmdk", subformat=subformat)
    scribble(rng, image, size, "vmdk")
    # Within the last grain, within the last table, and more tables.
    for more in (512, 5 * MIB + 1024, 200 * MIB):
        size += more
        resized(image, size, fmt="vmdk")
        support.qemu_io(image, f"write -P 88 {size - 70 * KIB} {70 * KIB}", fmt="vmdk")
    # The header or the descriptor says it, and so does the line that VMware reads.
    text = image.read_bytes()[:20 * 512]
    assert f"RW {size // 512} ".encode() in text and f'cylinders = "{size // 512 // 1008}"'.encode() in text, text
    with support.untouched(*tmp_path.iterdir()):
        assert resize(image, str(size), fmt="vmdk").stdout.startswith(f"The image has {size} bytes (")
    if subformat.startswith("twoGb"):
        also = [path for path in tmp_path.iterdir() if path != image]
        refused(image, "3G", words=["2 GiB at most", "more than 2147483648 bytes"], status=1, fmt="vmdk", also=also)
        resized(image, 2 * GIB, fmt="vmdk")


def test_a_vmdk_in_several_files_has_the_lesser_of_two_sizes(tmp_path):
    """A power loss between descriptor and header leaves that: QEMU and instar read the old disk, and a second run finishes."""
    image = tmp_path / "disk.vmdk"
    support.create(image, 4 * MIB, fmt="vmdk", subformat="twoGbMaxExtentSparse")
    scribble(random.Random(1), image, 4 * MIB, "vmdk")
    before = content(image, "vmdk")
    text = image.read_bytes()
    image.write_bytes(text.replace(b"RW 8192 SPARSE", b"RW 14336 SPARSE"))
    assert support.virtual_size(image, "vmdk") == 4 * MIB and content(image, "vmdk") == before
    assert support.run_instar("check", image).rc == 0
    resized(image, 7 * MIB, fmt="vmdk")
    # An extent that is larger than the descriptor says is still one of another disk.
    image.write_bytes(text)
    assert "the descriptor says" in support.run_instar("check", image).stderr


def test_a_directory_of_a_vmdk_moves_when_it_is_full(tmp_path):
    """128 entries, each of 32 MiB, are a sector."""
    image = tmp_path / "disk.vmdk"
    support.create(image, 4 * GIB - MIB, fmt="vmdk")
    support.qemu_io(image, "write -P 1 0 1M", f"write -P 2 {4 * GIB - 2 * MIB} 1M", fmt="vmdk")
    for size in (4 * GIB, 5 * GIB, 40 * GIB):
        done = resize(image, str(size), fmt="vmdk")
        assert (done.rc, done.stderr) == (0, ""), done
        support.assert_clean(image, "vmdk")
        support.qemu_io(image, f"read -P 2 {4 * GIB - 2 * MIB} 1M", f"read -P 0 {size - MIB} 1M", "read -P 1 0 1M",
                        f"write -P 3 {size - MIB} 1M", f"read -P 3 {size - MIB} 1M", fmt="vmdk")
        support.qemu_io(image, f"write -P 0 {size - MIB} 1M", fmt="vmdk")


@pytest.mark.parametrize("zeroed", ["on", "off"])
def test_a_vmdk_over_a_longer_one_reads_zeroes_past_its_old_end(tmp_path, zeroed):
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    support.create(base, 8 * MIB, fmt="vmdk")
    support.qemu_io(base, f"write -P 7 0 {8 * MIB}", fmt="vmdk")
    support.create(top, 3 * MIB + 512, fmt="vmdk", backing=base, backing_fmt="vmdk", zeroed_grain=zeroed)
    support.qemu_io(top, "write -P 8 1M 1M", fmt="vmdk")
    before = content(top, "vmdk")
    for size in (6 * MIB, 40 * MIB):
        done = resize(top, str(size), fmt="vmdk")
        assert done.rc == 0 and "VMware opens a disk with a parent only if both have one size" in done.stderr, done
        assert content(top, "vmdk") == before.ljust(size, b"\0")
        support.assert_clean(top, "vmdk")


@pytest.mark.parametrize("fmt", SHRINKING)
@pytest.mark.parametrize("seed", range(4))
def test_what_was_cut_off_never_comes_back(tmp_path, fmt, seed):
    rng = random.Random(f"{fmt}{seed}")
    image = tmp_path / "disk"
    options = {"cluster_size": rng.choice([512, 4096, 65536]), "compat": rng.choice(["0.10", "1.1"])} if fmt == "qcow2" else {}
    size = 4 * MIB
    support.create(image, size, fmt=fmt, **options)
    for _ in range(5):
        scribble(rng, image, size, fmt)
        size = rng.randrange(1, 6 * MIB // 512) * 512
        resized(image, size, "--shrink", fmt=fmt)
        more = size + rng.randrange(1, 2 * MIB // 512) * 512
        resized(image, more, fmt=fmt)
        size = more


def test_qemu_img_that_grows_it_afterwards_reads_zeroes(tmp_path):
    """The rest of the last cluster is wiped, which `qemu-img resize` does not do itself."""
    image = tmp_path / "disk"
    support.create(image, 4 * MIB)
    support.qemu_io(image, f"write -P 7 0 {4 * MIB}")
    resized(image, MIB + 512, "--shrink")
    support.qemu_img("resize", "-f", "qcow2", image, str(4 * MIB))
    assert content(image) == (b"\7" * (MIB + 512)).ljust(4 * MIB, b"\0")


@pytest.mark.parametrize("extended", ["off", "on"])
def test_snapshots_keep_their_size_and_their_data(tmp_path, extended):
    rng = random.Random(extended)
    image = tmp_path / "disk"
    support.create(image, 5 * MIB, extended_l2=extended)
    kept = {}
    for name, size in [("a", 5 * MIB), ("b", 3 * MIB + 512), ("c", 9 * MIB - 1024)]:
        resized(image, size, "--shrink")
        scribble(rng, image, size)
        support.qemu_img("snapshot", "-c", name, image)
        kept[name] = content(image)
    for size in (MIB, 7 * MIB, 2 * MIB + 3 * 512):
        resized(image, size, "--shrink")
        for name, was in kept.items():
            # The disk of a snapshot is as large as the snapshot says; qemu-img shows so much of it as the image has.
            shown = content(image, snapshot=name)
            shared = min(len(shown), len(was))
            assert shown[:shared] == was[:shared], name
    # A snapshot that is gone back to has its own size, and all of its data.
    for name, was in kept.items():
        support.qemu_img("snapshot", "-a", name, image)
        assert content(image) == was, name
        support.assert_clean(image)


@pytest.mark.parametrize("below", [MIB, 3 * MIB + 512, 9 * MIB])
def test_an_overlay_over_a_longer_and_a_shorter_backing(tmp_path, below):
    rng = random.Random(below)
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    support.create(base, below)
    support.qemu_io(base, f"write -P 66 0 {below}")
    support.create(top, 2 * MIB + 1024, backing=base.name)
    scribble(rng, top, 2 * MIB + 1024, count=4)
    with support.untouched(base):
        resized(top, 5 * MIB)
        resized(top, MIB - 512, "--shrink")
        resized(top, 4 * MIB + 512)


def test_bytes_are_written_where_they_are_preallocated(tmp_path):
    for fmt in ("raw", "qcow2"):
        image = tmp_path / fmt
        support.create(image, MIB, fmt=fmt)
        support.qemu_io(image, f"write -P 5 0 {MIB}", fmt=fmt)
        resized(image, 6 * MIB + 512, "--preallocation=full", fmt=fmt)
        assert image.stat().st_blocks * 512 >= 6 * MIB
    # "resize --preallocation makes freed clusters readable": the clusters of what was cut off are used again.
    image = tmp_path / "again"
    support.create(image, 4 * MIB)
    support.qemu_io(image, f"write -P 7 0 {4 * MIB}")
    resized(image, MIB + 512, "--shrink")
    resized(image, 4 * MIB, "--preallocation=full")


def test_a_second_run_says_that_it_preallocates_nothing(tmp_path):
    """An interrupted one leaves an image of the new size without all of its space."""
    image = tmp_path / "disk"
    support.create(image, MIB)
    assert resize(image, "2M").stderr == ""
    taken = image.stat().st_blocks
    again = resize(image, "--preallocation=full", "2M")
    assert again.rc == 0 and "has the size already, and gets no space" in again.stderr, str(again)
    assert image.stat().st_blocks == taken and resize(image, "2M").stderr == ""


def test_sizes_as_they_are_named(tmp_path):
    image = tmp_path / "disk"
    support.create(image, MIB)
    for size, bytes_ in [("2M", 2 * MIB), ("+1.5k", 2 * MIB + 1536), ("+1M", 3 * MIB + 1536)]:
        assert resize(image, size).rc == 0
        assert support.virtual_size(image) == bytes_
    assert resize(image, "--shrink", "-1536").rc == 0
    assert support.virtual_size(image) == 3 * MIB
    refused(image, "1000001", words=["multiple of 512", "1000448"], status=2)
    refused(image, "--shrink", "0", words=["must be positive"], status=2)
    refused(image, "--shrink", "-1T", words=["must be positive"], status=2)


def test_a_dry_run_changes_nothing(tmp_path):
    image = tmp_path / "disk"
    support.create(image, MIB)
    with support.untouched(image):
        done = resize(image, "--dry-run", "+1M", "--output", "json")
        assert done.json == {"format": "qcow2", "old-virtual-size": MIB, "virtual-size": 2 * MIB, "dry-run": True,
                             "sandbox": done.json["sandbox"], "warnings": []}
        assert "would be resized" in resize(image, "--dry-run", "--shrink", "512k").stdout


def test_what_is_refused_leaves_every_file_as_it_is(tmp_path):
    image = tmp_path / "disk"
    support.create(image, MIB)
    refused(image, "512k", words=["--shrink"], status=2)
    refused(image, "--shrink", "--preallocation=full", "512k", words=["leave --preallocation out"], status=2)
    raw = tmp_path / "raw"
    support.create(raw, MIB, fmt="raw")
    refused(raw, "--preallocation=metadata", "2M", words=["no metadata", "take falloc"], status=2, fmt="raw")
    refused(image, "--image-opts", "2M", words=["--image-opts"], status=2)
    refused(image, "--object", "secret,id=a", "2M", words=["--object"], status=2)
    for fmt in ("vdi", "vpc", "vhdx", "qcow", "parallels", "vmdk"):
        other = tmp_path / f"disk.{fmt}"
        support.create(other, 4 * MIB, fmt=fmt)
        refused(other, "--shrink", "1M", words=["cannot shrink", "nothing was changed"], status=1, fmt=fmt)
        # No option helps, so none is advised.
        alone = refused(other, "1M", words=["cannot shrink", "nothing was changed"], status=1, fmt=fmt)
        assert "--shrink" not in alone.stderr, alone
    stream = tmp_path / "stream.vmdk"
    support.create(stream, 4 * MIB, fmt="vmdk", subformat="streamOptimized")
    refused(stream, "8M", words=["a streamOptimized vmdk does not grow", "nothing was changed"], status=1, fmt="vmdk")
    # What the refusal says is tried.
    support.qemu_io(stream, "write -P 1 0 64k", fmt="vmdk")
    sparse, again = tmp_path / "sparse.vmdk", tmp_path / "again.vmdk"
    for words in (["convert", "-O", "vmdk", stream, sparse], ["resize", sparse, "8M"],
                  ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", sparse, again]):
        done = support.run_instar(*words)
        assert done.rc == 0, str(done)
    assert support.virtual_size(again, "vmdk") == 8 * MIB
    # QEMU compares what is longer with zeroes.
    support.qemu_img("compare", "-f", "vmdk", "-F", "vmdk", stream, again)
    support.qemu_img("bitmap", "--add", image, "b")
    refused(image, "--shrink", "512k", words=["persistent bitmaps", "qemu-img bitmap --remove"], status=1)
    # The advice works.
    support.qemu_img("bitmap", "--remove", image, "b")
    resized(image, 512 * 1024, "--shrink")
    # A snapshot of version 2 has the size of the image.
    old = tmp_path / "old"
    support.create(old, MIB, compat="0.10")
    support.qemu_img("snapshot", "-c", "a", old)
    for options in (["2M"], ["--shrink", "512k"]):
        refused(old, *options, words=["internal snapshots"], status=1)


def test_bitmaps_of_an_image_that_grows_can_be_used(tmp_path):
    image = tmp_path / "disk"
    support.create(image, MIB)
    support.qemu_img("bitmap", "--add", "-g", "512", image, "b")
    support.qemu_io(image, "write -P 3 4096 512")
    resized(image, 2000 * MIB)
    bitmaps = support.info(image)["format-specific"]["data"]["bitmaps"]
    assert [bitmap["flags"] for bitmap in bitmaps] == [["auto"]]


def test_images_with_marks(tmp_path):
    image = tmp_path / "disk"
    for mark, status in ((1, 0), (2, 1)):
        image.unlink(missing_ok=True)
        support.create(image, 4 * MIB)
        scribble(random.Random(mark), image, 4 * MIB)
        before = content(image)
        with open(image, "r+b") as file:
            file.seek(79)
            file.write(bytes([mark]))
        if status:
            refused(image, "8M", words=["marked corrupt", "instar check -r all"], status=1)
            refused(image, "--shrink", "1M", words=["marked corrupt"], status=1)
        else:
            # One that was not closed cleanly is repaired first.
            assert resize(image, "--shrink", str(MIB + 512)).rc == 0
            support.assert_clean(image)
            assert content(image) == before[:MIB + 512]


def test_an_image_in_use_is_refused(tmp_path):
    image = tmp_path / "disk"
    support.create(image, MIB)
    with subprocess.Popen(["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        user.stdin.write(b"read 0 512\n")
        user.stdin.flush()
        user.stdout.readline()
        refused(image, "2M", words=["in use"], status=1)
        user.communicate(b"quit\n")
    resized(image, 2 * MIB)


def test_a_base_does_not_shrink_below_an_overlay_that_reads_there(tmp_path):
    base, top, small = tmp_path / "base", tmp_path / "top", tmp_path / "small"
    support.create(base, 4 * MIB)
    support.qemu_io(base, f"write -P 9 0 {4 * MIB}")
    support.create(small, MIB, backing=base.name)
    before = content(small)
    resized(base, 3 * MIB, "--shrink")
    assert content(small) == before, "one that ends before the new end reads as before"
    support.create(top, 8 * MIB, backing=base.name)
    seen = content(top)
    refused(base, "--shrink", "2M", words=["is the backing of 1 other image", "top"], status=1, also=[top])
    # The advice works: a copy in a directory of its own has no overlays.
    alone = tmp_path / "alone"
    alone.mkdir()
    resized(support.copy(base, alone / "base"), 2 * MIB, "--shrink")
    # A base that grows reads zeroes where its overlays did.
    resized(base, 6 * MIB)
    assert (content(top), content(small)) == (seen, before)
    done = resize(base, "--shrink", "--ignore-overlays", "2M")
    assert done.rc == 0 and "its new size damages" in done.stderr


@pytest.mark.parametrize("fmt", ["vpc", "vhdx"])
def test_a_base_of_any_format_grows_only_if_its_overlay_can_still_be_read(tmp_path, fmt):
    base, top, expected = tmp_path / f"base.{fmt}", tmp_path / f"top.{fmt}", tmp_path / "expected"
    support.create(base, 4 * MIB, fmt=fmt)
    size = support.virtual_size(base, fmt)
    support.qemu_io(base, f"write -P 9 0 {size}", fmt=fmt)
    made = support.run_instar("create", "-f", fmt, "-b", base.name, "-F", fmt, top.name, cwd=tmp_path)
    assert made.rc == 0, made
    expected.write_bytes(content(base, fmt))
    # These demand that both have one size.
    refused(top, str(size + MIB), status=1, fmt=fmt, also=[base])
    before = base.read_bytes()
    done = resize(base, str(size + MIB), fmt=fmt)
    if done.rc == 0:
        assert support.virtual_size(base, fmt) == size + MIB
    else:
        assert "is the backing of 1 other image" in done.stderr and base.read_bytes() == before, done
    same = support.run_instar("compare", "-F", "raw", top, expected)
    assert same.rc == 0, same
