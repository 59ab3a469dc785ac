"""`instar convert`: the new image shows the same disk, by the word of qemu-img; it appears whole or not at all."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import support
from support import MIB

#: Every format that is read and made.
FORMATS = ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx", "qcow", "parallels"]
CHECKED = {"qcow2", "vmdk", "vdi", "vhdx", "parallels"}


def convert(source, target, fmt, *options, cwd=None):
    """A conversion that must succeed and leave the source alone; no other name appears beside the target."""
    directory = os.path.dirname(os.path.abspath(target)) if cwd is None else cwd
    before = set(os.listdir(directory))
    with support.untouched(source):
        result = support.run_instar("convert", *options, "-O", fmt, source, target, cwd=cwd)
    assert result.rc == 0, str(result)
    assert set(os.listdir(directory)) == before | {os.path.basename(target)}
    return result


def assert_same(source, source_fmt, target, target_fmt):
    """Both show the same disk to qemu-img, and the target is sound."""
    compared = support.run("qemu-img", "compare", "-f", source_fmt, "-F", target_fmt, source, target)
    assert compared.rc == 0, str(compared)
    if target_fmt in CHECKED:
        support.assert_clean(target, fmt=target_fmt)


def fill(image, rng, size, fmt, count=12):
    for _ in range(count):
        at = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, 70_144, 300_032, MIB]), size - at)
        support.qemu_io(image, f"write -P {rng.randrange(1, 255)} {at} {length}", fmt=fmt)


def refused(name, source, target, *options, mentions=(), files=()):
    """Refused, in both ways of asking; every file stays what it was, and none appears."""
    before = sorted(os.listdir(os.path.dirname(target)))
    for output in ([], ["--output", "json"]):
        with support.untouched(source, target, *files):
            result = support.run_instar("convert", *options, *output, source, target)
        support.assert_refused(result, name, *mentions)
        if output:
            role = {str(source): "image", str(target): None}.get(result.error.get("file"))
            assert result.error.get("role") == role, str(result)
        assert sorted(os.listdir(os.path.dirname(target))) == before


@pytest.mark.parametrize("target_fmt", FORMATS)
@pytest.mark.parametrize("source_fmt", FORMATS)
def test_every_pair_of_formats(source_fmt, target_fmt, tmp_path):
    rng = random.Random(f"{source_fmt} {target_fmt}")
    size = 9 * MIB
    source, target = tmp_path / "source", tmp_path / "target"
    support.create(source, size, fmt=source_fmt)
    fill(source, rng, size, source_fmt)
    convert(source, target, target_fmt, "-f", source_fmt)
    assert_same(source, source_fmt, target, target_fmt)


@pytest.mark.parametrize("size", [0, 512, 1000, 65_536, 65_537, 5 * MIB + 512, 33_333_333])
@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vdi", "vmdk", "vhdx", "parallels"])
def test_sizes_that_are_multiples_of_nothing(size, fmt, tmp_path):
    source, target = tmp_path / "source.raw", tmp_path / "target"
    source.write_bytes(random.Random(size).randbytes(size))
    theirs = support.run("qemu-img", "convert", "-f", "raw", "-O", fmt, source, tmp_path / "theirs")
    result = support.run_instar("convert", "-f", "raw", "-O", fmt, source, target)
    if size == 0 and result.rc != 0:
        # As `instar create`: these formats have no empty disk.
        support.assert_refused(result, "ERROR_UNSUPPORTED_FORMAT", "0 bytes")
        assert not target.exists()
        return
    assert result.rc == 0, f"{theirs}\n{result}"
    assert_same(source, "raw", target, fmt)
    if theirs.rc == 0:
        assert support.virtual_size(target, fmt=fmt) == support.virtual_size(tmp_path / "theirs", fmt=fmt)


@pytest.mark.parametrize("seed", range(6))
def test_chains(seed, tmp_path):
    """Layers of other sizes and cluster sizes, with zeroes and discarded parts over what is below."""
    rng = random.Random(seed)
    below = None
    for index in range(rng.randrange(2, 5)):
        layer = tmp_path / f"{index}.qcow2"
        size = rng.choice([3, 4, 6, 9]) * MIB + rng.randrange(3) * 512
        support.create(layer, size, backing=below and below.name, cluster_size=rng.choice([512, 4096, 65536, 2 * MIB]))
        fill(layer, rng, size, "qcow2", 6)
        support.qemu_io(layer, f"write -z {rng.randrange(size // 65536) * 65536} 65536", f"discard 0 {rng.choice([64, 128])}k")
        below = layer
    for fmt in rng.sample(FORMATS, 3):
        convert(below, tmp_path / f"target.{fmt}", fmt)
        assert_same(below, "qcow2", tmp_path / f"target.{fmt}", fmt)


def test_a_snapshot(tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target.raw"
    support.create(source, 5 * MIB)
    support.qemu_io(source, "write -P 1 0 2M")
    support.qemu_img("snapshot", "-c", "one", source)
    support.qemu_img("convert", "-O", "raw", source, tmp_path / "then.raw")
    support.qemu_io(source, "write -P 2 1M 3M", "discard 0 128k")
    for name in ("one", "1", "snapshot.name=one"):
        convert(source, target, "raw", "-l", name)
        assert target.read_bytes() == (tmp_path / "then.raw").read_bytes()
    refused("ERROR_UNSUPPORTED_FORMAT", source, target, "-l", "two", mentions=["one"])


def test_compressed_clusters_and_options(tmp_path):
    plain, source = tmp_path / "plain.raw", tmp_path / "source.qcow2"
    plain.write_bytes(random.Random(1).randbytes(MIB) + bytes(range(256)) * 16384)
    support.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", plain, source)
    target = tmp_path / "target.qcow2"
    convert(source, target, "qcow2", "-o", "cluster_size=4096,lazy_refcounts=on", "-o", "compat=1.1")
    assert_same(plain, "raw", target, "qcow2")
    assert support.info(target)["cluster-size"] == 4096
    result = convert(source, tmp_path / "static.vdi", "vdi", "-o", "static=on", "--output", "json")
    assert result.json["source-virtual-size"] == result.json["target-virtual-size"] == 5 * MIB
    assert_same(plain, "raw", tmp_path / "static.vdi", "vdi")


@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vhdx"])
def test_a_large_disk_with_little_in_it(fmt, tmp_path):
    """What is empty takes neither time nor space."""
    source, target = tmp_path / "source.qcow2", tmp_path / "target"
    support.create(source, 1 << 40)
    support.qemu_io(source, "write -P 7 0 64k", f"write -P 8 {(1 << 40) - 65536} 64k", f"write -z {1 << 39} 1G")
    began = time.monotonic()
    convert(source, target, fmt)
    assert time.monotonic() - began < 20
    assert target.stat().st_blocks * 512 < 16 * MIB
    support.qemu_io(target, "read -P 7 0 64k", f"read -P 8 {(1 << 40) - 65536} 64k", f"read -P 0 {1 << 39} 64k", fmt=fmt)


def test_holes_stay_holes(tmp_path):
    source = tmp_path / "source.raw"
    with open(source, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(20 * MIB)
        file.write(b"\x05" * MIB)
    for fmt in ("raw", "qcow2"):
        target = tmp_path / f"target.{fmt}"
        convert(source, target, fmt, "-f", "raw")
        assert target.stat().st_blocks * 512 < 2 * MIB
        assert_same(source, "raw", target, fmt)


def test_what_is_there_is_replaced_with_its_permissions(tmp_path):
    source, target, link = tmp_path / "source.qcow2", tmp_path / "target.raw", tmp_path / "link"
    support.create(source, MIB)
    target.write_bytes(b"something else")
    os.chmod(target, 0o640)
    link.symlink_to("target.raw")
    convert(source, link, "raw")
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert_same(source, "qcow2", target, "raw")
    # A name without a directory, in the working directory.
    convert("source.qcow2", "here.raw", "raw", cwd=tmp_path)
    assert_same(source, "qcow2", tmp_path / "here.raw", "raw")


def test_what_must_not_be_replaced(tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    support.create(base, MIB)
    support.create(top, backing="base.qcow2")
    os.link(base, tmp_path / "hard")
    for target in (base, top, tmp_path / "hard"):
        refused("ERROR_CHAIN_LOOP", top, target, files=[base, top], mentions=[target.name, "another name"])
    dangling = tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    refused("ERROR_OPEN_FAILED", top, dangling, mentions=["link"])
    result = support.run_instar("convert", top, tmp_path / "absent/target")
    support.assert_refused(result, "ERROR_OPEN_FAILED", "directory does not exist")
    (tmp_path / "directory").mkdir()
    refused("ERROR_OPEN_FAILED", top, tmp_path / "directory", mentions=["not a regular file"])
    refused("ERROR_IMAGE_NOT_FOUND", tmp_path / "absent.qcow2", tmp_path / "target")
    refused("ERROR_PLUGIN_UNAVAILABLE", top, tmp_path / "target", "-O", "nothing")


def test_a_target_that_is_in_use(tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target.qcow2"
    support.create(source, MIB)
    support.create(target, MIB)
    holder = subprocess.Popen(["qemu-io", target], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        while b"ops/sec" not in holder.stdout.readline():
            pass
        refused("ERROR_IMAGE_IN_USE", source, target, "-O", "qcow2", mentions=["target.qcow2", "in use"])
    finally:
        holder.communicate(b"quit\n")
    convert(source, target, "qcow2")


def test_damage_in_the_source_makes_no_image(tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target.raw"
    support.create(source, 4 * MIB)
    support.qemu_io(source, "write -P 1 0 4M")
    with open(source, "r+b") as file:
        file.seek(40)
        first = int.from_bytes(file.read(8), "big")
        file.seek(first)
        table = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        file.seek(table + 8)
        file.write((1 << 63 | 1 << 50).to_bytes(8, "big"))
    refused("ERROR_OVERLAY_CORRUPT", source, target, mentions=["source.qcow2"])
    target.write_bytes(b"old")
    refused("ERROR_OVERLAY_CORRUPT", source, target)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_full_disk_makes_no_image(fmt, tmp_path):
    source, small = tmp_path / "source.raw", tmp_path / "small"
    source.write_bytes(os.urandom(8 * MIB))
    small.mkdir()
    if support.run("mount", "-t", "tmpfs", "-o", "size=4m", "none", small).rc != 0:
        pytest.skip("nothing can be mounted")
    try:
        (small / "target").write_bytes(b"old")
        for target in (small / "target", small / "other"):
            refused("ERROR_NO_SPACE", source, target, "-f", "raw", "-O", fmt)
    finally:
        support.run("umount", small)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
def test_ended_in_the_middle(sent, old, tmp_path):
    source, target = tmp_path / "source.raw", tmp_path / "target.qcow2"
    with open(source, "wb") as file:
        for _ in range(48):
            file.write(os.urandom(MIB))
    if old:
        target.write_bytes(b"old")
    rng = random.Random(int(sent))
    ended = 0
    for _ in range(5):
        args = [support.instar_binary(), "convert", "-r", "20M", "-f", "raw", "-O", "qcow2", source, target]
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.05, 1.0))
        process.send_signal(sent)
        process.communicate()
        if process.returncode != 0:
            ended += 1
            names = {"source.raw", "target.qcow2"} if old else {"source.raw"}
            assert set(os.listdir(tmp_path)) == names
            assert not old or target.read_bytes() == b"old"
    assert ended > 0
    convert(source, target, "qcow2", "-f", "raw")
    assert_same(source, "raw", target, "qcow2")


@pytest.mark.parametrize("options", [["--target-is-zero"], ["--target-image-opts"],
                                     ["-o", "backing_file=base"]])
def test_options_that_are_not_supported(options, tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target"
    support.create(source, MIB)
    with support.untouched(source, target):
        result = support.run_instar("convert", *options, source, target)
    assert result.rc == 2 and result.stderr.count("\n") == 1, str(result)
    result = support.run_instar("convert", source)
    assert result.rc == 2 and not target.exists()


def test_options_that_change_nothing(tmp_path):
    source, target = tmp_path / "source.qcow2", tmp_path / "target"
    support.create(source, MIB)
    support.qemu_io(source, "write -P 3 0 1M")
    convert(source, target, "raw", "-m", "16", "-W", "-C", "-T", "none", "-t", "none", "-p")
    assert target.read_bytes() == b"\x03" * MIB
    listed = support.run_instar("convert", "-O", "qcow2", "-o", "help")
    assert listed.rc == 0 and "cluster_size" in listed.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_without_a_file_that_has_no_name(tmp_path):
    """Without procfs, such a file cannot be given a name: there is a temporary one, which goes away."""
    source, target = tmp_path / "source.qcow2", tmp_path / "target.qcow2"
    support.create(source, MIB)
    support.qemu_io(source, "write -P 3 0 1M")
    without = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", support.instar_binary()]
    # Where the program lies, procfs says.
    plugins = ["--plugin-dir", os.path.dirname(support.instar_binary())]
    for _ in range(2):
        result = support.run(*without, "convert", *plugins, "-O", "qcow2", source, target)
        assert result.rc == 0, str(result)
        assert_same(source, "qcow2", target, "qcow2")
        assert sorted(os.listdir(tmp_path)) == ["source.qcow2", "target.qcow2"]
    old = target.read_bytes()
    slow = subprocess.Popen([*without, "convert", *plugins, "-r", "200k", "-O", "qcow2", source, target], stderr=subprocess.PIPE)
    deadline = time.monotonic() + support.TIMEOUT
    while len(os.listdir(tmp_path)) < 3:
        assert slow.poll() is None and time.monotonic() < deadline, "there was a temporary name"
        time.sleep(0.01)
    slow.send_signal(signal.SIGINT)
    slow.communicate(timeout=support.TIMEOUT)
    assert slow.returncode == 1 and target.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["source.qcow2", "target.qcow2"]


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "vdi", "vpc", "vhdx", "qcow", "parallels"])
def test_holes_take_nothing(tmp_path, fmt):
    """A disk that is almost all hole makes a short image."""
    source, target = tmp_path / "thin.raw", tmp_path / "target"
    with open(source, "wb") as file:
        file.truncate(1024 * MIB)
        file.seek(700 * MIB + 4096)
        file.write(b"x" * 70_000)
    convert(source, target, fmt, "-f", "raw")
    assert target.stat().st_size < 48 * MIB, "tables, and one or two clusters or blocks"
    assert_same(source, "raw", target, fmt)


def test_the_base_of_a_running_machine_is_not_replaced(tmp_path):
    base, overlay, source = (tmp_path / name for name in ("base", "overlay", "source"))
    support.create(base, MIB)
    support.create(overlay, backing=base)
    support.create(source, MIB)
    support.qemu_io(source, "write -P 7 0 64k")
    with support.Holder(overlay), support.untouched(base):
        result = support.run_instar("convert", "-O", "qcow2", source, base)
    assert result.rc == 1 and "ERROR_IMAGE_IN_USE" in result.stderr, str(result)
    convert(source, base, "qcow2")
