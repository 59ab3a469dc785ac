"""Commits into a streamOptimized vmdk: compressed grains are added where none is, and no other commit is begun. Content is the
oracle; what `qemu-img` writes and reads says whether the bytes are a vmdk's."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
import support
import vmdk_bytes
from support import KIB, MIB, assert_clean, qemu_img, qemu_io, refuse
from test_vmdk import Lab, directory_at_the_end

GRAIN = 64 * KIB


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def stream(lab, name="base.vmdk", size=8 * MIB, writes=(), at_end=False, **options):
    """An image as `qemu-img convert` makes it, or with its directory at the end, as VMware does."""
    path = lab.make(name, size=size, writes=writes, subformat="streamOptimized", **options)
    if at_end:
        directory_at_the_end(path)
    return path


def assert_packed(path):
    """Each grain is what VMware's document says: a marker with its sector and length, a zlib stream that decodes to the grain,
    and none of them reaches into another one."""
    image = vmdk_bytes.Image(path)
    ends = 0
    for entry, grain in sorted((entry, grain) for grain, entry in image.grains().items()):
        sector, length = struct.unpack_from("<QI", image.bytes, entry * 512)
        assert sector == grain * image.grain and entry * 512 >= ends, (grain, entry)
        at, ends = entry * 512 + 12, -(-(entry * 512 + 12 + length) // 512) * 512
        bytes_ = zlib.decompress(image.bytes[at : at + length])
        assert len(bytes_) in (image.grain * 512, (image.capacity - sector) * 512), grain
    assert ends <= len(image.bytes)
    return image


#: What is written to an overlay, by its kind. QEMU writes to compressed grains and clusters only whole ones.
TOPS = {
    "qcow2": ["write -P 9 1M 300k", "write -P 7 512 1k", "write -P 5 8388096 512", "write -z 6M 192k"],
    "vmdk": ["write -P 9 1M 300k", "write -P 7 512 1k", "write -P 5 8388096 512", "write -P 6 5M 64k"],
    "compressed": ["write -P 9 1M 300k", "write -c -P 4 2M 64k", "write -c -P 3 8060928 64k", "write -P 7 512 1k"],
    "streamOptimized": ["write -P 9 1M 320k", "write -P 7 0 64k", "write -P 6 5M 64k"],
}


@pytest.mark.parametrize("kind", TOPS)
@pytest.mark.parametrize("at_end", [False, True])
def test_new_grains(lab, kind, at_end):
    """Beside the grains that are there, from overlays of which some have to be decoded. `qemu-img` is the other one that
    does it, but for a directory at the end."""
    base = stream(lab, writes=["write -P 1 3M 64k", "write -P 2 7M 64k"], at_end=at_end)
    fmt = "vmdk" if kind in ("vmdk", "streamOptimized") else "qcow2"
    options = {"subformat": kind} if kind == "streamOptimized" else {}
    top = lab.make(f"top.{fmt}", fmt, backing=base, writes=TOPS[kind], **options)
    length = base.stat().st_size
    result = lab.check_commit(top, base, oracle=not at_end)
    image = assert_packed(base)
    assert image.header == 0 and ("OVA" in result.stderr) == at_end
    # Grains of one byte take a sector each.
    assert base.stat().st_size - length <= len(image.grains()) * 1024
    # It is a backing like others: QEMU adds grains, and instar does.
    qemu_io(base, "write -P 11 4M 64k", fmt="vmdk")
    if kind == "qcow2":
        qemu_io(top, "write -P 12 4587520 5k", fmt="qcow2")
        lab.check_commit(top, base)
        assert_packed(base)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("write", ["write -P 9 3M 4k", "write -z 3M 64k", "write -c -P 9 3M 64k"])
def test_a_grain_in_use_is_refused_before_anything_changes(lab, write, at_end):
    """Whatever comes before it in the disk. `qemu-img` writes that first. The advice works."""
    base = stream(lab, writes=["write -P 1 3M 64k"], at_end=at_end)
    top = lab.make("top.qcow2", "qcow2", backing=base, writes=["write -P 9 0 64k", write])
    mentions = ["base.vmdk", "guest offset 3145728", "instar convert -O vmdk"]
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base], mentions=mentions)
    wanted = lab.raw(top)
    assert qemu_img("convert", "-O", "vmdk", top, lab.dir / "new.vmdk").rc == 0
    assert lab.raw(lab.dir / "new.vmdk") == wanted
    assert json.loads(qemu_img("info", "--output=json", lab.dir / "new.vmdk").stdout).get("backing-filename") is None


def test_a_second_run_finds_its_grains_in_use(lab):
    """As after a crash between the two images: what is there already is what arrives. Something else is not."""
    base = stream(lab, writes=["write -P 1 3M 64k"])
    top = lab.make("top.qcow2", "qcow2", backing=base,
                   writes=["write -P 9 1M 300k", "write -c -P 4 2M 64k", "write -P 1 3M 5k"])
    wanted = lab.raw(top)
    support.commit(top, "-d")
    once = base.read_bytes()
    support.commit(top, "-d")
    grains = vmdk_bytes.Image(base).grains()
    assert len(base.read_bytes()) == len(once) and len(grains) == 7
    support.commit(top)
    assert lab.raw(base) == lab.raw(top) == wanted and lab.holds_nothing(top)
    qemu_io(top, "write -P 10 1M 512")
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base], mentions=["guest offset 1048576"])


def test_partly_covered_grains_are_filled_from_below(lab):
    root = lab.make("root.vmdk", size=8 * MIB + 512, writes=["write -P 33 0 8M", "write -P 34 8M 512"])
    base = stream(lab, size=None, backing=root, writes=["write -P 1 3M 64k"])
    writes = ["write -P 9 1M 512", "write -P 8 1050624 1k", "write -P 7 8M 512", "write -z 2M 64k", "write -z 5M 1k"]
    top = lab.make("top.qcow2", "qcow2", backing=base, cluster_size=512, writes=writes)
    lab.check_commit(top, base, oracle=False)
    assert_packed(base)


def test_bytes_that_do_not_shrink(lab):
    """They are stored as they are, with a few bytes more."""
    base = stream(lab, size=4 * MIB)
    top = lab.make("top.qcow2", "qcow2", backing=base)
    noise = lab.dir / "noise"
    with open("/dev/urandom", "rb") as file:
        noise.write_bytes(file.read(3 * MIB))
    qemu_io(top, f"write -s {noise} 0 3M")
    length = base.stat().st_size
    lab.check_commit(top, base)
    assert len(assert_packed(base).grains()) == 48
    assert base.stat().st_size <= length + 48 * (GRAIN + 512)


def test_measured_and_looked_at(lab):
    base = stream(lab, writes=["write -P 1 3M 64k"], at_end=True)
    top = lab.make("top.qcow2", "qcow2", backing=base, writes=["write -P 9 1M 300k"])
    shown = support.run_instar("info", base)
    assert "adds grains" in shown.stdout, str(shown)
    with support.untouched(base, top):
        measured = support.run_instar("measure", "--commit", "--output", "json", top).json
    support.commit(top)
    assert base.stat().st_size <= measured["required"] <= base.stat().st_size + 5 * (GRAIN + 512)
    checked = support.run_instar("check", base)
    assert checked.rc == 0, str(checked)
    assert_clean(base, "vmdk")


def test_it_becomes_a_stream_again(lab):
    """As a warning advises before the image goes into an OVA."""
    base = stream(lab, writes=["write -P 1 3M 64k"], at_end=True)
    top = lab.make("top.qcow2", "qcow2", backing=base, writes=["write -P 9 1M 300k"])
    wanted = lab.raw(top)
    assert "instar convert -O vmdk -o subformat=streamOptimized" in support.commit(top).stderr
    again = lab.dir / "again.vmdk"
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", base, again)
    assert lab.raw(again) == wanted
    image = vmdk_bytes.Image(again)
    # Each grain follows the one before it on the disk.
    assert list(image.grains().values()) == sorted(image.grains().values())
