"""`instar create -f vmdk` of disks in several files: qemu takes them for what its own are, and they commit."""

from __future__ import annotations

import os

import pytest
from support import GIB, KIB, MIB, assert_same_content, commit, create, info, qemu_img, qemu_io, run, run_instar

KINDS = ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"]


def make(path, size, kind, *options, cwd=None, rc=0):
    result = run_instar("create", "-q", "-f", "vmdk", "-o", f"subformat={kind}", *options, path, str(size), cwd=cwd)
    assert result.rc == rc, str(result)
    return result


def specific(path):
    data = info(path)["format-specific"]["data"]
    return {key: value for key, value in data.items() if key not in ("cid", "parent-cid")}


@pytest.mark.parametrize("size", [MIB + 512, 2 * GIB, 5 * GIB])
@pytest.mark.parametrize("kind", KINDS)
def test_as_qemu_makes_them(tmp_path, kind, size):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(), theirs.mkdir()
    make("disk.vmdk", size, kind, cwd=ours)
    create(theirs / "disk.vmdk", size, fmt="vmdk", subformat=kind)
    assert {p.name: p.stat().st_size for p in ours.iterdir() if p.name != "disk.vmdk"} == {
        p.name: p.stat().st_size for p in theirs.iterdir() if p.name != "disk.vmdk"
    }

    def named(directory):
        return {
            **specific(directory / "disk.vmdk"),
            "extents": [
                {**e, "filename": os.path.relpath(e["filename"], directory)}
                for e in specific(directory / "disk.vmdk")["extents"]
            ],
        }

    assert named(ours) == named(theirs)
    mapped = qemu_img("map", "--output=json", ours / "disk.vmdk").json
    if kind == "twoGbMaxExtentSparse":
        assert mapped == qemu_img("map", "--output=json", theirs / "disk.vmdk").json
    else:
        # qemu writes the first block of a flat file to see whether it can; ours are one hole.
        assert sum(entry["length"] for entry in mapped) == size and all(e["data"] and e["zero"] for e in mapped)
    if kind == "twoGbMaxExtentSparse":
        qemu_img("check", "-f", "vmdk", ours / "disk.vmdk")


@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_into_one(tmp_path, kind):
    base = tmp_path / "base.vmdk"
    make(base, 5 * GIB, kind)
    qemu_io(base, "write -P 1 0 100k", f"write -P 2 {2 * GIB - 65536} 128k", fmt="vmdk")
    top = create(tmp_path / "top.qcow2", backing="base.vmdk", backing_fmt="vmdk")
    qemu_io(top, "write -P 3 50k 100k", f"write -P 4 {4 * GIB} 64k")
    flat = tmp_path / "flat.qcow2"
    qemu_img("convert", "-O", "qcow2", top, flat)
    commit(top)
    assert_same_content(flat, base, second_fmt="vmdk")


def test_an_overlay_in_several_files(tmp_path):
    base = tmp_path / "base.vmdk"
    make(base, 3 * GIB, "twoGbMaxExtentSparse")
    top = tmp_path / "top.vmdk"
    result = run_instar(
        "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "-b", "base.vmdk", "-F", "vmdk", top
    )
    assert result.rc == 0, str(result)
    qemu_io(top, f"write -P 5 {2 * GIB - 64 * KIB} 128k", fmt="vmdk")
    flat = tmp_path / "flat.qcow2"
    qemu_img("convert", "-f", "vmdk", "-O", "qcow2", top, flat)
    commit(top)
    assert_same_content(flat, base, second_fmt="vmdk")
    assert_same_content(flat, top, second_fmt="vmdk")


def test_extents_are_never_overwritten(tmp_path):
    """A file that is in the way stays, and what was made before it goes again."""
    victim = tmp_path / "disk-f002.vmdk"
    victim.write_bytes(b"precious")
    result = make(tmp_path / "disk.vmdk", 5 * GIB, "twoGbMaxExtentFlat", rc=1)
    assert "disk-f002.vmdk" in result.stderr and "not overwritten" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["disk-f002.vmdk"] and victim.read_bytes() == b"precious"
    victim.unlink()
    os.symlink(tmp_path / "elsewhere", victim)
    make(tmp_path / "disk.vmdk", 5 * GIB, "twoGbMaxExtentFlat", rc=1)
    assert [p.name for p in tmp_path.iterdir()] == ["disk-f002.vmdk"]


def test_a_descriptor_that_cannot_be_written(tmp_path):
    """The extents go again when the descriptor fails."""
    (tmp_path / "disk.vmdk").mkdir()
    make(tmp_path / "disk.vmdk", 3 * GIB, "twoGbMaxExtentSparse", rc=1)
    assert [p.name for p in tmp_path.iterdir()] == ["disk.vmdk"]


def test_refusals(tmp_path):
    path = tmp_path / "disk.vmdk"
    create(tmp_path / "base.vmdk", MIB, fmt="vmdk")
    for kind, options, words in [
        ("monolithicFlat", ("-b", "base.vmdk", "-F", "vmdk"), "backing"),
        ("vmfs", (), "subformat"),
    ]:
        assert words in make(path, MIB, kind, *options, rc=1).stderr
    assert "too large" in make(path, 2048 * GIB, "twoGbMaxExtentFlat", rc=1).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["base.vmdk"]
    assert run("qemu-img", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", "-b", "base.vmdk", "-F", "vmdk", path).rc != 0
