"""`commit --delete-overlay`: the overlay's file is removed once the base holds everything, and nothing else ever is."""

from __future__ import annotations

import os
import stat
import subprocess

import faults
import pytest
import support
from support import MIB, Holder, create, qemu_img, qemu_io, refuse, run, run_instar
from test_devices import Loop

ORDINARY = 1000


def pair(directory, fmt="qcow2", base_fmt="raw", **options):
    """base <- top: what a commit has to leave in the base."""
    create(directory / "base", 8 * MIB, fmt=base_fmt)
    qemu_io(directory / "base", "write -P 1 0 6M", fmt=base_fmt)
    create(directory / "top", backing="base", backing_fmt=base_fmt, fmt=fmt, cwd=directory, **options)
    qemu_io(directory / "top", "write -P 2 1M 640k", "write -P 3 7M 64k", fmt=fmt)
    return support.content_hash(directory / "top", fmt)


@pytest.fixture
def expected(tmp_path):
    return pair(tmp_path)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("sandbox", ["kvm", "process"])
def test_it_is_removed(tmp_path, expected, sandbox):
    result = run_instar("commit", "--sandbox", sandbox, "--delete-overlay", tmp_path / "top")
    assert (result.rc, result.stderr) == (0, ""), str(result)
    assert result.stdout == f"Image committed.\n'{tmp_path}/top' was removed.\n"
    assert names(tmp_path) == ["base"]
    assert support.content_hash(tmp_path / "base", "raw") == expected


def test_programs_are_told(tmp_path, expected):
    with support.untouched(tmp_path / "top", tmp_path / "base"):
        dry = run_instar("commit", "--delete-overlay", "--dry-run", "--output", "json", tmp_path / "top")
        told = run_instar("commit", "--delete-overlay", "--dry-run", tmp_path / "top").stdout
    assert (dry.json["overlay_deleted"], dry.json["dry_run"]) == (False, True)
    assert "The overlay's file would be removed. Nothing was changed." in told
    done = support.commit(tmp_path / "top", "--delete-overlay", "--output", "json").json
    # Emptying what is removed would be wasted.
    assert (done["overlay_deleted"], done["overlay_clusters_cleared"], done["bytes_committed"] > 0) == (True, 0, True)
    assert names(tmp_path) == ["base"]


def test_it_is_overwritten_before(tmp_path, expected):
    os.link(tmp_path / "top", tmp_path / "kept")
    result = support.commit(tmp_path / "top", "--delete-overlay", "--wipe", "--output", "json")
    assert result.json["overlay_bytes_wiped"] >= 704 * 1024
    [warning] = result.json["warnings"]
    assert "has 2 names (hard links)" in warning
    assert names(tmp_path) == ["base", "kept"] and support.holds_no_clusters(tmp_path / "kept")
    assert support.content_hash(tmp_path / "kept") == expected


def test_a_hard_link_stays_with_its_content(tmp_path, expected):
    os.link(tmp_path / "top", tmp_path / "kept")
    result = support.commit(tmp_path / "top", "--delete-overlay")
    assert "warning: " in result.stderr and "this one, and the file stays with the others" in result.stderr
    assert names(tmp_path) == ["base", "kept"]
    assert not support.holds_no_clusters(tmp_path / "kept") and support.content_hash(tmp_path / "kept") == expected


def test_children_that_are_relinked_read_the_same(tmp_path, expected):
    children = [tmp_path / "first", tmp_path / "second"]
    for number, child in enumerate(children):
        create(child, backing="top", cwd=tmp_path)
        qemu_io(child, f"write -P {number + 5} {number}M 64k")
    contents = [support.content_hash(child) for child in children]
    files = [tmp_path / "base", *children]
    for options in ([], ["--relink", "first"], ["--ignore-siblings"], ["--dry-run"]):
        arguments = ["--delete-overlay", *options]
        with support.untouched(tmp_path / "top", *files):
            result = run_instar("commit", *arguments, "top", cwd=tmp_path)
        support.assert_refused(result, "ERROR_BACKING_SHARED", f"'{tmp_path}/second'", "--relink", "leave out --delete-overlay")
        assert ("first'" in result.stderr) == ("first" not in options)
    result = support.commit(tmp_path / "top", "--delete-overlay", "--relink-in", tmp_path, "--output", "json")
    assert result.json["overlay_deleted"] and len(result.json["relinked"]) == 2
    assert names(tmp_path) == ["base", "first", "second"]
    assert [support.content_hash(child) for child in children] == contents
    assert all(support.info(child)["backing-filename"] == "base" for child in children)


def test_a_run_with_children_that_was_cut_short_is_repeated(tmp_path, expected):
    """Killed when one child names the base and the other does not, and again before the name is removed."""
    for number, name in enumerate(["first", "second"]):
        create(tmp_path / name, backing="top", cwd=tmp_path)
        qemu_io(tmp_path / name, f"write -P {number + 5} {number}M 64k")
    contents = [support.content_hash(tmp_path / name) for name in ("first", "second")]
    command = [support.instar_binary(), "commit", "--delete-overlay", "--relink-in", tmp_path, tmp_path / "top"]
    for call, file in (("pwritev", "second"), ("unlinkat", "top")):
        killed = run(faults.injector(), "KILL", "1", call, tmp_path / file, "--", *command)
        assert killed.rc == 137, str(killed)
        assert (tmp_path / "top").exists()
        assert [support.content_hash(tmp_path / name) for name in ("first", "second")] == contents
    done = run(*command)
    assert done.rc == 0, str(done)
    assert names(tmp_path) == ["base", "first", "second"]
    assert [support.content_hash(tmp_path / name) for name in ("first", "second")] == contents


def test_killed_before_it_is_removed(tmp_path, expected):
    command = [support.instar_binary(), "commit", "--delete-overlay", tmp_path / "top"]
    killed = run(faults.injector(), "KILL", "1", "unlinkat", tmp_path / "top", "--", *command)
    assert killed.rc == 137, str(killed)
    for image, fmt in (("top", "qcow2"), ("base", "raw")):
        assert support.content_hash(tmp_path / image, fmt) == expected
    assert run(*command).rc == 0 and names(tmp_path) == ["base"]
    assert support.content_hash(tmp_path / "base", "raw") == expected
    # Once more: it is not there, and that is said.
    refuse("ERROR_IMAGE_NOT_FOUND", tmp_path / "top", "--delete-overlay", files=[tmp_path / "base"], mentions=["does not exist"])


def test_a_removal_that_fails_is_told(tmp_path, expected):
    command = [support.instar_binary(), "commit", "--delete-overlay", tmp_path / "top"]
    failed = run(faults.injector(), "EIO", "1", "unlinkat", tmp_path / "top", "--", *command)
    line = failed.stderr.splitlines()[0]
    assert failed.rc == 1 and failed.stdout == "" and "is committed, and cannot be removed: Input/output error" in line
    assert line.endswith("(ERROR_OVERLAY_IO)")
    assert support.content_hash(tmp_path / "top") == support.content_hash(tmp_path / "base", "raw") == expected


def test_another_file_takes_the_name_meanwhile(tmp_path, expected):
    """What is removed is the overlay, or nothing."""
    os.link(tmp_path / "top", tmp_path / "elsewhere")
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    command = [support.instar_binary(), "commit", "--delete-overlay", tmp_path / "top"]
    result = run(faults.injector(), "REPLACE", "1", "fdatasync", tmp_path / "top", other, tmp_path / "base", "--", *command)
    assert result.rc == 1 and "leads to another file by now" in result.stderr, str(result)
    assert (tmp_path / "top").read_bytes() == b"precious"
    assert support.content_hash(tmp_path / "elsewhere") == support.content_hash(tmp_path / "base", "raw") == expected


# --- what is refused, before the first change -----------------------------------------------------


def test_what_contradicts_it(tmp_path, expected):
    top, base = tmp_path / "top", tmp_path / "base"
    with support.untouched(top, base):
        both = run_instar("commit", "--delete-overlay", "-d", top)
    assert both.rc == 2 and "--delete-overlay" in both.stderr and "--drop" in both.stderr
    with support.untouched(top, base):
        unsafe = run_instar("commit", "--delete-overlay", "-t", "unsafe", top)
    assert unsafe.rc == 2 and "-t unsafe flushes nothing" in unsafe.stderr, str(unsafe)


def test_a_symbolic_link(tmp_path, expected):
    (tmp_path / "link").symlink_to("top")
    refuse("ERROR_OPEN_FAILED", tmp_path / "link", "--delete-overlay", files=[tmp_path / "top", tmp_path / "base"],
           mentions=["symbolic link", "name the file that it leads to"])
    (tmp_path / "there").symlink_to(tmp_path)
    support.commit(tmp_path / "there/top", "--delete-overlay")
    assert names(tmp_path) == ["base", "link", "there"]


def test_an_image_in_several_files(tmp_path):
    pair(tmp_path, "vmdk", "vmdk", subformat="twoGbMaxExtentSparse")
    files = [path for path in tmp_path.iterdir() if path.name != "top"]
    assert len(files) > 1
    refuse("ERROR_OPEN_FAILED", tmp_path / "top", "--delete-overlay", files=files, mentions=["in 2 files"])


def test_internal_snapshots_are_not_lost(tmp_path, expected):
    qemu_img("snapshot", "-c", "one", tmp_path / "top")
    refuse("ERROR_OPEN_FAILED", tmp_path / "top", "--delete-overlay", files=[tmp_path / "base"],
           mentions=["1 internal snapshots, which would be lost"])


def test_only_the_overlay_of_several_layers(tmp_path, expected):
    create(tmp_path / "upper", backing="top", cwd=tmp_path)
    qemu_io(tmp_path / "upper", "write -P 9 3M 64k")
    content = support.content_hash(tmp_path / "upper")
    between = support.digest(tmp_path / "top")
    result = support.commit(tmp_path / "upper", "-b", "base", "--delete-overlay")
    assert "becomes stale" in result.stderr
    assert names(tmp_path) == ["base", "top"] and support.digest(tmp_path / "top") == between
    assert support.content_hash(tmp_path / "base", "raw") == content


def test_whoever_uses_it(tmp_path, expected):
    with Holder(tmp_path / "top"):
        refuse("ERROR_IMAGE_IN_USE", tmp_path / "top", "--delete-overlay", files=[tmp_path / "base"])


def as_user(user, *command):
    return subprocess.run(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command], text=True,
                          capture_output=True, timeout=120, check=False)


@pytest.fixture
def lent(tmp_path_factory):
    """A folder that an ordinary user can reach, whoever owns it."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    folder = tmp_path_factory.mktemp("lent")
    for parent in [folder, *folder.parents]:
        if not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    return folder


def lend(folder, mode, owner):
    """The pair in it, whose files everybody may write to."""
    pair(folder)
    for name in ("top", "base"):
        os.chown(folder / name, owner, owner)
        (folder / name).chmod(0o666)
    folder.chmod(mode)


@pytest.mark.parametrize("mode, owner, why", [(0o755, ORDINARY, "Permission denied"), (0o1777, 0, "sticky")])
def test_a_directory_in_which_nothing_may_be_removed(lent, mode, owner, why):
    lend(lent, mode, owner)
    command = [support.instar_binary(), "commit", "--sandbox", "process", "--delete-overlay", lent / "top"]
    with support.untouched(lent / "top", lent / "base"):
        result = as_user(ORDINARY, *command)
        if "cannot execute" in result.stderr or "Permission denied" in result.stderr and "instar" not in result.stderr:
            pytest.skip("the program cannot be reached")
        dry = as_user(ORDINARY, *command, "--dry-run")
    assert result.returncode == 1 and why in result.stderr and "(ERROR_PERMISSION_DENIED)" in result.stderr, result
    assert dry.returncode == 0 and "warning: " in dry.stderr and why in dry.stderr, dry
    assert names(lent) == ["base", "top"]


def test_a_sticky_directory_in_which_the_overlay_is_ones_own(lent):
    lend(lent, 0o1777, ORDINARY)
    result = as_user(ORDINARY, support.instar_binary(), "commit", "--sandbox", "process", "--delete-overlay", lent / "top")
    assert result.returncode == 0, result
    assert names(lent) == ["base"]


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices take root")
def test_a_block_device(tmp_path, expected):
    with Loop(tmp_path / "disk", 16 * MIB) as device:
        create(device, backing=tmp_path / "base", backing_fmt="raw")
        qemu_io(device, "write -P 2 1M 640k")
        refuse("ERROR_OPEN_FAILED", device, "-b", tmp_path / "base", "-F", "raw", "--ignore-siblings", "--delete-overlay",
               files=[tmp_path / "base"], mentions=["is a block device"])
