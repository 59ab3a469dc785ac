"""`instar convert` to images in several files: all of them appear, or none does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import time

import pytest
import support
from support import MIB

GIB = 1024 * MIB
KINDS = ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


def convert(*args, rc=0, **more):
    result = support.run_instar("convert", *args, **more)
    assert result.rc == rc, str(result)
    return result


def same(first, first_fmt, second, second_fmt):
    compared = support.run("qemu-img", "compare", "-f", first_fmt, "-F", second_fmt, first, second)
    assert compared.rc == 0, str(compared)


def files_of(kind, directory, source, fmt):
    """The names that qemu-img gives, which are VMware's."""
    directory.mkdir()
    support.qemu_img("convert", "-f", fmt, "-O", "vmdk", "-o", f"subformat={kind}", source, directory / "disk.vmdk")
    return sorted(os.listdir(directory))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A disk of more than two extents, of which little is there."""
    path = tmp_path_factory.mktemp("source") / "source.qcow2"
    support.create(path, 4 * GIB + 5 * MIB)
    support.qemu_io(path, "write -P 1 0 1M", "write -P 2 2047M 2M", "write -P 3 4095M 3M", "write -P 4 4100M 64k")
    return path


def test_a_link_to_the_target_gives_no_name_to_the_parts(source, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/real.vmdk").write_bytes(b"old")
    (tmp_path / "link.vmdk").symlink_to("sub/real.vmdk")
    convert("-O", "vmdk", "-o", "subformat=monolithicFlat", source, tmp_path / "link.vmdk")
    assert sorted(os.listdir(tmp_path / "sub")) == ["real-flat.vmdk", "real.vmdk"] and (tmp_path / "link.vmdk").is_symlink()
    same(source, "qcow2", tmp_path / "sub/real.vmdk", "vmdk")


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, old, source, tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    target = ours / "disk.vmdk"
    if old:
        target.write_bytes(b"old")
        target.chmod(0o600)
    convert("-O", "vmdk", "-o", f"subformat={kind}", source, target)
    assert sorted(os.listdir(ours)) == files_of(kind, tmp_path / "theirs", source, "qcow2")
    same(source, "qcow2", target, "vmdk")
    if old:
        assert {stat.S_IMODE(path.stat().st_mode) for path in ours.iterdir()} == {0o600}
    # What was made is an image for instar, too.
    compared = support.run_instar("compare", source, target)
    assert compared.rc == 0, str(compared)
    # It is not overwritten: several files are not replaced at once.
    with support.untouched(*ours.iterdir()):
        result = support.run_instar("convert", "-O", "vmdk", "-o", f"subformat={kind}", source, target)
        support.assert_refused(result, "ERROR_OPEN_FAILED", "exists, and is not overwritten")
    assert sorted(os.listdir(ours)) == sorted(os.listdir(tmp_path / "theirs"))


def test_all_of_it_is_allocated(tmp_path):
    source = tmp_path / "source.raw"
    source.write_bytes(bytes(3 * MIB) + b"x" * MIB)
    convert("-S", "0", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", source, tmp_path / "disk.vmdk")
    same(source, "raw", tmp_path / "disk.vmdk", "vmdk")
    assert (tmp_path / "disk-flat.vmdk").stat().st_blocks * 512 >= 4 * MIB


@pytest.mark.parametrize("part", ["disk-s001.vmdk", "disk-s003.vmdk"])
def test_a_part_that_is_there(part, source, tmp_path):
    (tmp_path / part).write_bytes(b"somebody's")
    result = support.run_instar("convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", source, tmp_path / "disk.vmdk")
    support.assert_refused(result, "ERROR_OPEN_FAILED", part, "exists, and is not overwritten")
    assert os.listdir(tmp_path) == [part] and (tmp_path / part).read_bytes() == b"somebody's"


def test_a_source_that_is_damaged_leaves_nothing(tmp_path):
    source = tmp_path / "source.qcow2"
    support.create(source, 4 * MIB)
    support.qemu_io(source, "write -P 1 0 4M")
    with open(source, "r+b") as file:
        file.truncate(source.stat().st_size - 2 * MIB)
    target = tmp_path / "new/disk.vmdk"
    target.parent.mkdir()
    for kind in KINDS:
        result = support.run_instar("convert", "-O", "vmdk", "-o", f"subformat={kind}", source, target)
        assert result.rc == 1 and os.listdir(target.parent) == [], str(result)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(sent, tmp_path):
    source, target, rng = tmp_path / "source.raw", tmp_path / "new/disk.vmdk", random.Random(7)
    target.parent.mkdir()
    source.write_bytes(rng.randbytes(64 * MIB))
    ended = 0
    for _ in range(6):
        command = [support.instar_binary(), "convert", "-r", "64M", "-f", "raw", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat",
                   source, target]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(0.05, 0.8))
        process.send_signal(sent)
        process.communicate()
        if process.returncode != 0:
            ended += 1
            assert os.listdir(target.parent) == []
        else:
            shutil.rmtree(target.parent)
            target.parent.mkdir()
    assert ended > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_without_files_that_have_no_name(source, tmp_path):
    """Without procfs, such a file cannot be given a name: there are temporary ones, which go away."""
    target = tmp_path / "disk.vmdk"
    without = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", support.instar_binary()]
    command = [*without, "convert", "--plugin-dir", os.path.dirname(support.instar_binary()), "-O", "vmdk", "-o",
               "subformat=twoGbMaxExtentSparse", source, target]
    result = support.run(*command)
    assert result.rc == 0, str(result)
    assert sorted(os.listdir(tmp_path)) == ["disk-s001.vmdk", "disk-s002.vmdk", "disk-s003.vmdk", "disk.vmdk"]
    same(source, "qcow2", target, "vmdk")
    result = support.run(*command)
    assert result.rc == 1 and len(os.listdir(tmp_path)) == 4, str(result)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_the_extents_of_what_is_replaced_stay_and_are_named(subformat, tmp_path):
    """What an image names is nobody's to remove: it may be anything that lies beside it."""
    support.create(tmp_path / "old.vmdk", MIB, fmt="vmdk", subformat=subformat)
    extent = next(path for path in tmp_path.iterdir() if path.name != "old.vmdk")
    support.create(tmp_path / "new.qcow2", MIB)
    with support.untouched(extent):
        result = convert("-O", "vmdk", tmp_path / "new.qcow2", tmp_path / "old.vmdk")
    assert f"{extent}': named by the image" in result.stderr and "left as it is" in result.stderr, str(result)
    # Once more, and with a name that leads elsewhere: nothing is said of what does not lie beside it.
    text = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 2048 FLAT "/etc/passwd" 0\n'
    (tmp_path / "hostile.vmdk").write_text(text)
    for name in ("old.vmdk", "hostile.vmdk"):
        assert convert("-O", "vmdk", tmp_path / "new.qcow2", tmp_path / name).stderr == ""
