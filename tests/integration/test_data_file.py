"""qcow2 images with an external data file, at each place of a chain; content as `qemu-img` reads it is the oracle."""

from __future__ import annotations

import os

import pytest
import support
from support import KIB, MIB, run_instar

OVERLAY = ["write -P 7 1000 5000", "write -P 8 70000 1000", "write -z 200k 64k", "write -P 9 130k 512", "write -P 6 900k 64k"]
BASE = ["write -P 1 0 512k", "write -z 64k 32k", "write -P 2 600k 10k"]


def raw(path, out):
    support.qemu_img("convert", "-O", "raw", path, out)
    return out.read_bytes()


def chain(directory, top, base, *, cluster=65536, more=()):
    """A pair; `top` and `base` tell which of them has a data file."""
    options = {"cluster_size": cluster, **dict(more)}
    data = lambda wanted, name: {"data_file": directory / name} if wanted else {}
    support.create(directory / "base", MIB, **options, **data(base, "base.data"))
    support.qemu_io(directory / "base", *BASE)
    support.create(directory / "top", backing="base", cwd=directory, **options, **data(top, "top.data"))
    support.qemu_io(directory / "top", *OVERLAY)


def clean(*paths):
    for path in paths:
        support.qemu_img("check", path)


@pytest.mark.parametrize("more", [{}, {"extended_l2": "on"}], ids=["plain", "extended"])
@pytest.mark.parametrize(("top", "base"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("cluster", [512, 16 * KIB, 64 * KIB, 2 * MIB])
def test_a_commit_and_a_copy(cluster, top, base, more, tmp_path):
    if more and cluster < 16 * KIB:
        pytest.skip("no subclusters")
    chain(tmp_path, top, base, cluster=cluster, more=more)
    wanted = raw(tmp_path / "top", tmp_path / "wanted")
    copied = run_instar("convert", "-O", "raw", tmp_path / "top", tmp_path / "copy")
    assert copied.rc == 0 and (tmp_path / "copy").read_bytes() == wanted, str(copied)
    assert run_instar("compare", "-F", "raw", tmp_path / "top", tmp_path / "copy").rc == 0
    assert run_instar("check", tmp_path / "top").rc == 0
    result = run_instar("commit", tmp_path / "top")
    assert result.rc == 0, str(result)
    assert raw(tmp_path / "base", tmp_path / "after") == wanted == raw(tmp_path / "top", tmp_path / "again")
    clean(tmp_path / "base", tmp_path / "top")


@pytest.mark.parametrize("command", ["commit", "rebase"])
@pytest.mark.parametrize("before", [[], ["write -z 1M 512"]], ids=["unallocated", "zero"])
@pytest.mark.parametrize("more", [{}, {"extended_l2": "on"}], ids=["plain", "extended"])
def test_what_a_data_file_holds_past_the_disk_stays_hidden(command, before, more, tmp_path, monkeypatch):
    """The disk ends within a cluster, and old bytes stand behind it. QEMU takes the rest of that cluster for the guest's."""
    # QEMU looks for a data file where it was started.
    monkeypatch.chdir(tmp_path)
    size = MIB + 512
    low, high = tmp_path / "low", tmp_path / "high"
    support.create(low, size, **({} if command == "rebase" else {"data_file": "data", **more}))
    support.create(high, size, backing="low", **({"data_file": "data", **more} if command == "rebase" else {}))
    (tmp_path / "data").write_bytes(b"\xee" * 4 * MIB)
    if command == "commit":
        before and support.qemu_io(low, *before)
        support.qemu_io(high, "write -P 2 1M 512")
        result = run_instar("commit", "--verify", high)
    else:
        before and support.qemu_io(high, *before)
        support.qemu_io(low, "write -P 2 1M 512")
        result = run_instar("rebase", "-b", "", high)
    assert result.rc == 0, str(result)
    changed = low if command == "commit" else high
    support.qemu_img("resize", "-q", changed, "2M")
    content = raw(changed, tmp_path / "out")
    assert not any(content[size:]), "old bytes are the guest's now"
    kept = b"\0" if command == "rebase" and before else b"\2"
    assert content[MIB:size] == kept * 512 and not any(content[:MIB])


def test_an_image_on_the_data_file_is_a_sibling(tmp_path, monkeypatch):
    """It reads the data file as a raw image, and so what a commit writes there."""
    monkeypatch.chdir(tmp_path)
    support.create(tmp_path / "base", MIB, data_file="data", data_file_raw="on")
    support.qemu_io(tmp_path / "base", *BASE)
    support.create(tmp_path / "top", backing="base")
    support.qemu_io(tmp_path / "top", *OVERLAY)
    support.qemu_img("create", "-q", "-f", "qcow2", "-b", "data", "-F", "raw", tmp_path / "other")
    with support.untouched(*(tmp_path / name for name in ("base", "data", "top", "other"))):
        result = run_instar("commit", tmp_path / "top")
        assert result.rc == 1 and "ERROR_BACKING_SHARED" in result.stderr and "other'" in result.stderr, str(result)
        result = run_instar("resize", "--shrink", tmp_path / "base", "512K")
        assert result.rc == 1 and "ERROR_BACKING_SHARED" in result.stderr and "other'" in result.stderr, str(result)
    wanted = raw(tmp_path / "top", tmp_path / "wanted")
    result = run_instar("commit", "--ignore-siblings", tmp_path / "top")
    assert result.rc == 0 and "other'" in result.stderr, str(result)
    assert raw(tmp_path / "other", tmp_path / "after") == wanted


def test_a_raw_data_file_reads_as_the_disk(tmp_path):
    support.create(tmp_path / "base", MIB, data_file=tmp_path / "data", data_file_raw="on")
    support.qemu_io(tmp_path / "base", *BASE)
    support.create(tmp_path / "top", 2 * MIB, backing="base", cwd=tmp_path)
    support.qemu_io(tmp_path / "top", *OVERLAY, "write -P 5 1500k 64k")
    wanted = raw(tmp_path / "top", tmp_path / "wanted")
    result = run_instar("commit", "--resize-backing", tmp_path / "top")
    assert result.rc == 0, str(result)
    assert (tmp_path / "data").read_bytes() == wanted == raw(tmp_path / "base", tmp_path / "after")
    assert run_instar("info", "--output", "json", tmp_path / "base").json["format-specific"]["data"]["data-file-raw"]
    clean(tmp_path / "base")
    # It stays complete without a backing file.
    support.create(tmp_path / "other", 2 * MIB)
    with support.untouched(tmp_path / "base", tmp_path / "data"):
        result = run_instar("rebase", "-b", "other", "-F", "qcow2", tmp_path / "base", cwd=tmp_path)
    assert result.rc == 1 and "ERROR_EXTERNAL_DATA_FILE" in result.stderr, str(result)


@pytest.mark.parametrize("raw_file", ["off", "on"])
def test_another_size(raw_file, tmp_path):
    support.create(tmp_path / "a", MIB, data_file=tmp_path / "data", data_file_raw=raw_file)
    support.qemu_io(tmp_path / "a", "write -P 3 0 1M")
    before = raw(tmp_path / "a", tmp_path / "before")
    assert run_instar("resize", "--shrink", tmp_path / "a", "300K").rc == 0
    assert (tmp_path / "data").stat().st_size == 300 * KIB
    result = run_instar("resize", tmp_path / "a", "2M")
    assert result.rc == 0, str(result)
    wanted = before[:300 * KIB] + bytes(2 * MIB - 300 * KIB)
    assert raw(tmp_path / "a", tmp_path / "after") == wanted
    assert raw_file == "off" or (tmp_path / "data").read_bytes() == wanted
    clean(tmp_path / "a")


def test_another_backing_file(tmp_path):
    chain(tmp_path, True, True)
    wanted = raw(tmp_path / "top", tmp_path / "wanted")
    support.create(tmp_path / "other", MIB)
    support.qemu_io(tmp_path / "other", "write -P 5 0 1M")
    result = run_instar("rebase", "-b", "other", "-F", "qcow2", tmp_path / "top", cwd=tmp_path)
    assert result.rc == 0, str(result)
    assert raw(tmp_path / "top", tmp_path / "after") == wanted
    clean(tmp_path / "top")


@pytest.mark.parametrize("name", ["/etc/shadow", "../outside", "link", ".hidden", "nbd://host/x", "guest.qcow2", "base", "missing"])
def test_a_hostile_name_leads_nowhere(name, tmp_path):
    directory = tmp_path / "d"
    directory.mkdir()
    (tmp_path / "outside").write_bytes(bytes(MIB))
    (directory / ".hidden").write_bytes(bytes(MIB))
    os.symlink("../outside", directory / "link")
    support.create(directory / "guest.qcow2", MIB)
    placeholder = "p" * len(name)
    support.create("base", MIB, cwd=directory, data_file=placeholder)
    support.create("top", backing="base", cwd=directory)
    support.qemu_io("top", *OVERLAY, cwd=directory)
    image = (directory / "base").read_bytes()
    assert image.count(placeholder.encode()) == 1
    (directory / "base").write_bytes(image.replace(placeholder.encode(), name.encode()))
    everything = [path for path in (*directory.iterdir(), tmp_path / "outside") if path.is_file() and not path.is_symlink()]
    with support.untouched(*everything):
        result = run_instar("commit", directory / "top")
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
    code = {"guest.qcow2": "FORMAT_MISMATCH", "base": "FORMAT_MISMATCH", "missing": "BACKING_NOT_FOUND"}.get(name, "WRITE_TARGET_NOT_ALLOWED")
    assert code in result.stderr, str(result)
    # What the image is can be told without a look at that file.
    shown = run_instar("info", "--output", "json", directory / "base")
    assert shown.rc == 0 and shown.json["format-specific"]["data"]["data-file"] == name, str(shown)


def test_no_copy_is_compressed_into_a_data_file(tmp_path):
    chain(tmp_path, False, True)
    with support.untouched(tmp_path / "base", tmp_path / "base.data", tmp_path / "top"):
        result = run_instar("commit", "-c", tmp_path / "top")
    assert result.rc != 0, str(result)


def test_a_flag_that_is_missing_is_found_and_mended(tmp_path):
    """COPIED, without which QEMU takes the first cluster for one that is not there."""
    chain(tmp_path, False, True)
    image = bytearray((tmp_path / "base").read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1:l1 + 8], "big") & ~(1 << 63)
    image[l2 + 16] &= 0x7F
    (tmp_path / "base").write_bytes(image)
    assert run_instar("check", tmp_path / "base").rc == 2
    result = run_instar("check", "-r", "all", tmp_path / "base")
    assert result.rc == 0 and run_instar("check", tmp_path / "base").rc == 0, str(result)
    clean(tmp_path / "base")
