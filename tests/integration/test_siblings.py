"""Other images on the image that is committed into: a commit would damage them, so that it is refused.

What a sibling reads before and after is the oracle. A refusal leaves every file of the directory as it was, and what it advises is
done here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket

import pytest
import support
import vdi_bytes
import vhd_bytes
import vhdx_bytes
from inside import ORDINARY
from support import MIB, assert_refused, commit, qemu_img, qemu_io, run_instar

SHARED = "ERROR_BACKING_SHARED"
TOP = ["write -P 1 0 1M", "write -z 2M 256k"]


def child(path, backing="base.qcow2", *commands, fmt="qcow2"):
    """An overlay that records this backing, with something of its own."""
    support.create(path, backing=backing, backing_fmt=fmt, cwd=path.parent)
    qemu_io(path, *(commands or ["write -P 7 3M 64k"]))
    return path


@pytest.fixture
def shared(pair):
    """An overlay, its base, and another overlay of that."""
    pair.make(base=["write -P 9 0 4M"], top=TOP)
    pair.other = child(pair.dir / "other.qcow2")
    return pair


def refuse(overlay, *options, names=(), others=(), directory=None):
    """The commit is refused for these siblings and for no others, in a dry run as well; no file changes."""
    files = [path for path in (directory or overlay.parent).rglob("*") if path.is_file()]
    for output in ([], ["--output", "json"], ["--dry-run"], ["-d"]):
        with support.untouched(overlay, *files):
            result = run_instar("commit", *options, *output, overlay)
        assert_refused(result, SHARED, *names, "--ignore-siblings")
        for other in others:
            assert f"'{other}'" not in result.stderr, str(result)
    error = run_instar("commit", *options, "--output", "json", overlay).error
    assert error["role"] == "backing", error
    return error


def warned(result):
    """The warning of a commit that is done all the same."""
    [line] = [line for line in result.stderr.splitlines() if "damages" in line]
    assert line.startswith("instar: warning: "), str(result)
    return line


def test_a_sibling_is_not_damaged_without_a_word(shared):
    before = support.content_hash(shared.other)
    error = refuse(shared.top, names=["is the backing of 1 other image,", shared.other], others=[shared.top])
    assert error["file"] == str(shared.base)
    # That is what the refusal is about.
    line = warned(commit(shared.top, "--ignore-siblings"))
    assert str(shared.other) in line and str(shared.base) in line
    assert support.content_hash(shared.other) != before
    assert support.holds_no_clusters(shared.top)
    support.assert_clean(shared.base)


def test_the_commit_that_is_wanted_is_what_it_always_was(shared):
    shared.check_commit("--ignore-siblings")


@pytest.mark.parametrize("output", [[], ["--output", "json"]], ids=["human", "json"])
def test_what_a_dry_run_says(shared, output):
    with support.untouched(shared.top, shared.base, shared.other):
        result = commit(shared.top, "--ignore-siblings", "--dry-run", *output)
    lines = result.json["warnings"] if output else result.stderr.splitlines()
    assert [line for line in lines if "would damage" in line and str(shared.other) in line], str(result)


def test_measuring_only_plans(shared):
    with support.untouched(shared.top, shared.base, shared.other):
        result = run_instar("measure", "--commit", "--output", "json", shared.top)
    assert result.rc == 0 and result.json["required"] > 0, str(result)


def test_another_backing_lets_the_commit_through(shared):
    """The first advice of the refusal."""
    before = support.content_hash(shared.other)
    support.copy(shared.base, shared.dir / "copy.qcow2")
    qemu_img("rebase", "-u", "-b", "copy.qcow2", "-F", "qcow2", shared.other)
    commit(shared.top)
    assert support.content_hash(shared.other) == before
    # Or none at all.
    alone = child(shared.dir / "alone.qcow2")
    refuse(shared.top, names=[alone])
    qemu_img("rebase", "-b", "", alone)
    commit(shared.top)


def test_a_template_with_two_hundred_clones(pair):
    pair.make(base=["write -P 9 0 4M"], top=TOP)
    child(pair.dir / "clone0.qcow2")
    for number in range(1, 200):
        support.copy(pair.dir / "clone0.qcow2", pair.dir / f"clone{number}.qcow2")
    first = pair.dir / "clone0.qcow2"
    error = refuse(pair.top, names=["200 other images", first, "and 195 more"], others=[pair.dir / "clone99.qcow2"])
    assert len(error["message"]) < 2000


def test_a_backup_copy_of_the_overlay_is_a_sibling(pair):
    pair.make(base=["write -P 9 0 4M"], top=TOP)
    backup = support.copy(pair.top, pair.dir / "top.qcow2.bak")
    refuse(pair.top, names=[backup])
    os.remove(backup)
    # The same file under another name is not.
    os.link(pair.top, pair.dir / "again.qcow2")
    os.link(pair.base, pair.dir / "base again.qcow2")
    (pair.dir / "link.qcow2").symlink_to("top.qcow2")
    commit(pair.top)


def test_a_snapshot_of_the_whole_directory_is_none(pair):
    """Each overlay in it has the base in it, as with a snapshot of a btrfs subvolume."""
    pair.make(base=["write -P 9 0 4M"], top=TOP)
    shutil.copytree(pair.dir, pair.dir / ".snapshot")
    before = support.content_hash(pair.dir / ".snapshot" / "top.qcow2")
    commit(pair.top, "--allow-backing-dir", pair.dir / ".snapshot")
    assert support.content_hash(pair.dir / ".snapshot" / "top.qcow2") == before


def test_images_elsewhere(pair, tmp_path):
    """Beside the target, beside the overlay and in the directories that are allowed: there, and nowhere else."""
    pair.make(base=["write -P 9 0 4M"])
    places = {name: tmp_path / name for name in ("vm", "allowed", "configured", "stranger")}
    for name, place in places.items():
        place.mkdir()
        child(place / f"{name}.qcow2", str(pair.base))
    (pair.dir / "deep").mkdir()
    below = child(pair.dir / "deep" / "below.qcow2", "../base.qcow2")
    os.remove(pair.top)
    top = child(places["vm"] / "top.qcow2", str(pair.base), *TOP)
    (tmp_path / "config.toml").write_text(
        support.configuration(f"allow-backing-dirs = {json.dumps([str(places['configured']), str(pair.dir)])}\n"))
    files = [path for path in tmp_path.rglob("*.qcow2")]
    with support.untouched(*files):
        result = support.run_instar("commit", "--allow-backing-dir", places["allowed"], top,
                                    env={"INSTAR_CONFIG": str(tmp_path / "config.toml")})
    assert_refused(result, SHARED, "3 other images", *(places[name] / f"{name}.qcow2" for name in ("vm", "allowed", "configured")))
    assert str(below) not in result.stderr
    # Without them, what lies beside the target that -b names.
    other = child(pair.dir / "beside.qcow2")
    with support.untouched(*files, other):
        result = run_instar("commit", "-b", pair.base, top)
    assert_refused(result, SHARED, "2 other images", other, places["vm"] / "vm.qcow2")


def test_a_target_below_the_directory_of_the_overlay(pair):
    """Only the overlay says where it is: its directory is listed when the process is confined already."""
    pair.make()
    (pair.dir / "sub").mkdir()
    base, top = pair.dir / "sub" / "base.qcow2", pair.dir / "upper.qcow2"
    support.create(base, 4 * MIB)
    child(top, "sub/base.qcow2")
    other = child(pair.dir / "sub" / "other.qcow2")
    refuse(top, names=["1 other image", other], directory=pair.dir)
    result = commit(top, "-v", "--ignore-siblings")
    assert "Landlock" in result.stderr and str(other) in warned(result)


def test_layers_between(pair):
    """What is on a layer between reads the target as well, and what is on the overlay reads what it read."""
    pair.make(base=["write -P 9 0 4M"])
    os.remove(pair.top)
    middle = child(pair.dir / "middle.qcow2", "base.qcow2", "write -P 2 1M 64k")
    top = child(pair.dir / "top.qcow2", "middle.qcow2", *TOP)
    leaf = child(pair.dir / "leaf.qcow2", "top.qcow2")
    before = support.content_hash(leaf)
    commit(top, "-d", "--dry-run", "-b", "base.qcow2")
    cousin = child(pair.dir / "cousin.qcow2", "middle.qcow2")
    names = ["1 other image,", f"'{cousin}' (through '{middle}')"]
    refuse(top, "-b", "base.qcow2", names=names, others=[leaf])
    brother = child(pair.dir / "brother.qcow2")
    refuse(top, "-b", "base.qcow2", names=["2 other images", *names[1:], f"'{brother}'"], others=[leaf])
    # What is on the base is not damaged by a commit into the middle, and the other way round.
    refuse(top, names=["1 other image,", cousin, middle], others=[brother, leaf])
    refuse(middle, names=["1 other image,", brother], others=[cousin, top])
    refuse(leaf, "-b", "base.qcow2", names=[cousin, brother], others=[leaf])
    commit(top, "-b", "base.qcow2", "--ignore-siblings")
    assert support.content_hash(leaf) == before


@pytest.mark.parametrize("name", ["raw", "vmdk", "qcow"])
def test_of_any_format(pair, name):
    """The base of one format and a sibling of that format, or of another one, where the base has no children of its own."""
    base = support.create(pair.dir / f"base.{name}", 4 * MIB, fmt=name)
    qemu_io(base, "write -P 9 0 4M", fmt=name)
    kind = "qcow2" if name == "raw" else name
    top, other = pair.dir / "top", pair.dir / "other"
    for path in (top, other):
        support.create(path, fmt=kind, backing=base.name, backing_fmt=name, cwd=pair.dir)
        qemu_io(path, "write -P 1 1M 64k", fmt=kind)
    refuse(top, names=[other])
    commit(top, "--ignore-siblings")
    assert support.content_hash(top, kind) == support.content_hash(base, name)


def test_vhd_by_its_identity(pair):
    """The names in it lead nowhere."""
    base = pair.dir / "base.vhd"
    vhd_bytes.Maker(vhd_bytes.DYNAMIC, 4 * MIB, identity=b"\4" * 16, parent=bytes(16)).write(base)
    relative = (b"W2ru", ".\\base.vhd".encode("utf-16-le"))
    lost = (b"W2ru", ".\\gone.vhd".encode("utf-16-le"))
    top, other, stranger = (pair.dir / name for name in ("top.vhd", "other.vhd", "stranger.vhd"))
    maker = functools.partial(vhd_bytes.Maker, vhd_bytes.DIFFERENCING, 4 * MIB)
    maker(identity=b"\6" * 16, locators=[relative]).write(top)
    maker(identity=b"\7" * 16, locators=[lost]).write(other)
    maker(identity=b"\x08" * 16, parent=b"\3" * 16, locators=[lost]).write(stranger)
    refuse(top, names=["1 other image", other], others=[stranger])


def test_vdi_by_its_identity(pair):
    base, top, other = (pair.dir / name for name in ("base.vdi", "top.vdi", "other.vdi"))
    vdi_bytes.make(base, 4 * MIB, {0: b"\1" * MIB})
    vdi_bytes.make(top, 4 * MIB, {1: b"\2" * MIB}, parent=base)
    vdi_bytes.make(other, 4 * MIB, {2: b"\3" * MIB}, parent=base)
    vdi_bytes.make(pair.dir / "stranger.vdi", 4 * MIB, {2: b"\3" * MIB})
    refuse(top, "-b", "base.vdi", names=["1 other image", other])


def test_vhdx_by_its_identity(pair):
    base, top, other = (pair.dir / name for name in ("base.vhdx", "top.vhdx", "other.vhdx"))
    vhdx_bytes.Maker(vhdx_bytes.DYNAMIC, 4 * MIB, data_write=b"\4" * 16).write(base)
    second = ("parent_linkage2", vhdx_bytes.braces(vhdx_bytes.NULL))
    for number, path, name in [(6, top, ".\\base.vhdx"), (7, other, ".\\gone.vhdx")]:
        vhdx_bytes.Maker(vhdx_bytes.DIFFERENCING, 4 * MIB, data_write=bytes([number]) * 16,
                         pairs=[("relative_path", name), second]).write(path)
    refuse(top, names=["1 other image", other])


def test_what_else_lies_beside(pair):
    """Nothing but images on the base is a sibling, and nothing stops the commit."""
    pair.make(base=["write -P 9 0 4M"], top=TOP)
    good = child(pair.dir / "good").read_bytes()
    os.remove(pair.dir / "good")
    with socket.socket(socket.AF_UNIX) as listener:
        # Its name may not be longer than 108 bytes.
        with contextlib.chdir(pair.dir):
            listener.bind("socket")
    os.mkfifo(pair.dir / "fifo")
    (pair.dir / "tty").symlink_to("/dev/tty")
    (pair.dir / "loop").symlink_to("loop")
    (pair.dir / "empty").touch()
    (pair.dir / "text").write_text("base.qcow2\n")
    (pair.dir / "sparse").touch()
    os.truncate(pair.dir / "sparse", 1 << 40)
    for length in (3, 4, 8, 71, 72, 103, 104, 400, 511, 512):
        (pair.dir / f"cut{length}").write_bytes(good[:length])
    for at in range(8, 24):
        (pair.dir / f"wild{at}").write_bytes(good[:at] + b"\xff" + good[at + 1 :])
    result = commit(pair.top, "-v")
    [note] = [line for line in result.stderr.splitlines() if "could not be looked at" in line]
    assert 1 < int(note.split()[-1]) < 26, note


@pytest.mark.skipif(ORDINARY, reason="only root can give files to others")
def test_what_others_do_not_let_see(pair):
    """Files and directories that the caller may not read are passed over."""
    pair.make(base=["write -P 9 0 4M"], top=TOP)
    closed = child(pair.dir / "closed.qcow2")
    closed.chmod(0)
    directory = pair.dir.parent / "unlisted"
    directory.mkdir()
    child(directory / "inside.qcow2", str(pair.base))
    directory.chmod(0o711)
    user = 65534
    for path in (pair.dir, pair.base, pair.top):
        os.chown(path, user, user)
    for path in pair.dir.parents:
        if path.stat().st_mode & 1 == 0:
            path.chmod(path.stat().st_mode | 0o011)
    binary = support.instar_binary()
    result = support.run("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", binary, "commit", "--sandbox",
                         "process", "-v", "--allow-backing-dir", directory, pair.top)
    assert result.rc == 0, str(result)
    assert "could not be looked at: 1\n" in result.stderr, str(result)
    assert f"'{directory}' cannot be listed" in result.stderr, str(result)


def test_a_commit_that_is_repeated_needs_the_option_again(shared):
    """As after an interruption: the siblings are there as before."""
    read = support.flatten(shared.top, shared.dir.parent / "before.qcow2")
    commit(shared.top, "-d", "--ignore-siblings")
    refuse(shared.top, names=[shared.other])
    commit(shared.top, "--ignore-siblings")
    support.assert_same_content(shared.base, read)


def test_there_is_no_key_of_the_configuration(shared, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(support.configuration("ignore-siblings = true\n"))
    with support.untouched(shared.top, shared.base, shared.other):
        result = run_instar("commit", shared.top, env={"INSTAR_CONFIG": str(path)})
    assert result.rc == 1 and "unknown field `ignore-siblings`" in result.stderr, str(result)
