"""`instar commit --by-adoption`: the overlay takes the place of the image that it is committed into."""

from __future__ import annotations

import json
import os
import re
import shutil

import faults
import pytest
import support
from support import MIB, create, qemu_img, qemu_io

INTERRUPTED = "an earlier run with --by-adoption was interrupted"


@pytest.fixture
def chain(tmp_path):
    """root <- base <- top, all of which hold something that the others do not."""
    create(tmp_path / "root", 8 * MIB)
    qemu_io(tmp_path / "root", "write -P 1 0 3M")
    create(tmp_path / "base", backing="root", cwd=tmp_path, cluster_size="4k")
    qemu_io(tmp_path / "base", "write -P 2 2M 1M", "write -P 3 5000 100", "write -z 1M 512k")
    create(tmp_path / "top", backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "top", "write -P 4 2500k 5M", "write -P 5 100k 30k", "discard 4M 256k")
    return tmp_path


def adopt(directory, *options, base="base", top="top"):
    return support.run_instar("commit", "--by-adoption", "-b", base, *options, directory / top)


def state(directory):
    return {path.name: (support.digest(path), path.stat().st_mode) for path in directory.iterdir()}


@pytest.mark.parametrize("sandbox", support.SANDBOXES)
def test_the_overlay_takes_the_place_of_the_base(chain, sandbox):
    expected, inode = support.content_hash(chain / "top"), (chain / "top").stat().st_ino
    root = support.digest(chain / "root")
    (chain / "base").chmod(0o640)
    before = state(chain)
    dry = adopt(chain, "--sandbox", sandbox, "--dry-run", "--output", "json")
    assert dry.rc == 0 and dry.json["dry_run"] is True and dry.json["adopted"] is False, str(dry)
    assert state(chain) == before
    assert "would take the place of" in adopt(chain, "--dry-run").stdout
    result = adopt(chain, "--sandbox", sandbox, "--output", "json")
    assert result.rc == 0 and result.json["adopted"] and result.json["sandbox"] == sandbox, str(result)
    # What only `base` holds, in clusters of 64 KiB: of its first write, the next to the top's, and the zeroes over `root`.
    assert 0 < result.json["bytes_kept"] == dry.json["bytes_kept"] < 2 * MIB
    assert result.json["backing"] == str(chain / "base") and result.json["overlay"] == str(chain / "top")
    assert sorted(path.name for path in chain.iterdir()) == ["base", "root"]
    found = (chain / "base").stat()
    assert found.st_ino == inode and found.st_mode & 0o777 == 0o640
    assert support.content_hash(chain / "base") == expected and support.digest(chain / "root") == root
    support.assert_clean(chain / "base")
    recorded = support.info(chain / "base")
    assert (recorded["backing-filename"], recorded["backing-filename-format"]) == ("root", "qcow2")


def test_what_it_costs_is_what_the_base_holds(tmp_path):
    """And not what the overlay holds."""
    create(tmp_path / "base", 256 * MIB)
    qemu_io(tmp_path / "base", "write -P 1 255M 64k")
    create(tmp_path / "top", backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "top", "write -P 2 0 200M")
    expected = support.content_hash(tmp_path / "top")
    result = adopt(tmp_path, "--output", "json")
    assert result.rc == 0 and result.json["bytes_kept"] == 65536 and result.json["clusters_kept"] == 1, str(result)
    assert support.content_hash(tmp_path / "base") == expected
    assert "backing-filename" not in support.info(tmp_path / "base")


def test_layers_between_are_merged_too(chain):
    expected = support.content_hash(chain / "top")
    result = adopt(chain, base="root")
    assert result.rc == 0 and "'has taken" not in result.stdout, str(result)
    assert f"'{chain / 'base'}': becomes stale" in result.stderr
    assert sorted(path.name for path in chain.iterdir()) == ["base", "root"]
    assert support.content_hash(chain / "root") == expected
    assert "backing-filename" not in support.info(chain / "root")


def test_owner_and_attributes_are_the_targets(chain):
    if os.geteuid() != 0:
        pytest.skip("another owner takes root")
    os.chown(chain / "base", 1234, 4321)
    os.setxattr(chain / "base", "user.label", b"kept")
    os.setxattr(chain / "top", "user.own", b"lost")
    assert adopt(chain).rc == 0
    found = (chain / "base").stat()
    assert (found.st_uid, found.st_gid) == (1234, 4321)
    assert os.listxattr(chain / "base") == ["user.label"] and os.getxattr(chain / "base", "user.label") == b"kept"


def test_a_size_that_grows_is_asked_for(tmp_path):
    create(tmp_path / "base", 4 * MIB)
    qemu_io(tmp_path / "base", "write -P 1 0 4M")
    create(tmp_path / "top", 8 * MIB, backing="base", cwd=tmp_path)
    qemu_io(tmp_path / "top", "write -P 2 3M 4M")
    expected, before = support.content_hash(tmp_path / "top"), state(tmp_path)
    refused = adopt(tmp_path, "--output", "json")
    assert refused.rc == 1 and refused.error["name"] == "ERROR_BACKING_TOO_SMALL", str(refused)
    assert "add --resize-backing" in str(refused) and state(tmp_path) == before
    assert adopt(tmp_path, "--resize-backing").rc == 0
    assert support.content_hash(tmp_path / "base") == expected and support.virtual_size(tmp_path / "base", "qcow2") == 8 * MIB


def refusals(directory):
    """How a pair is made that cannot do it, and what is said."""
    def smaller():
        create(directory / "base", 8 * MIB)
        create(directory / "top", 4 * MIB, backing="base", cwd=directory)

    def snapshot_below():
        create(directory / "base", 8 * MIB)
        qemu_img("snapshot", "-c", "one", directory / "base")
        create(directory / "top", backing="base", cwd=directory)

    def snapshot_above():
        create(directory / "base", 8 * MIB)
        create(directory / "top", backing="base", cwd=directory)
        qemu_img("snapshot", "-c", "one", directory / "top")

    def bitmap():
        create(directory / "base", 8 * MIB)
        qemu_img("bitmap", "--add", directory / "base", "one")
        create(directory / "top", backing="base", cwd=directory)

    def raw():
        create(directory / "base", 8 * MIB, fmt="raw")
        create(directory / "top", backing="base", backing_fmt="raw", cwd=directory)

    def identities():
        create(directory / "base", 8 * MIB, fmt="vmdk")
        create(directory / "top", fmt="vmdk", backing="base", backing_fmt="vmdk", cwd=directory)

    def elsewhere():
        (directory / "images").mkdir()
        create(directory / "images/base", 8 * MIB)
        create(directory / "top", backing="images/base", cwd=directory)

    def two_names():
        create(directory / "base", 8 * MIB)
        create(directory / "top", backing="base", cwd=directory)
        os.link(directory / "base", directory / "other")

    def sibling():
        create(directory / "base", 8 * MIB)
        create(directory / "top", backing="base", cwd=directory)
        create(directory / "sibling", backing="base", cwd=directory)

    def child():
        create(directory / "base", 8 * MIB)
        create(directory / "top", backing="base", cwd=directory)
        create(directory / "child", backing="top", cwd=directory)

    def own_bitmap():
        create(directory / "base", 8 * MIB)
        create(directory / "top", backing="base", cwd=directory)
        qemu_img("bitmap", "--add", directory / "top", "one")

    return {
        own_bitmap: "cannot lose the name of its backing file", smaller: "whose end would be lost", snapshot_below: "would be lost with it", snapshot_above: "has internal snapshots (1)",
        bitmap: "has bitmaps (1)", raw: "is a raw image, and the overlay a qcow2 image", identities: "records identities",
        elsewhere: "lies in another directory", two_names: "has 2 names", sibling: "--ignore-siblings",
        child: "which could not be read without it",
    }


@pytest.mark.parametrize("which", range(11))
def test_what_would_be_lost_or_is_impossible_is_refused(tmp_path, which):
    make, said = list(refusals(tmp_path).items())[which]
    make()
    base = "images/base" if make.__name__ == "elsewhere" else "base"
    before = {path: support.digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    result = adopt(tmp_path, base=base)
    assert result.rc == 1 and said in result.stderr and len(result.stderr.splitlines()) == 1, str(result)
    assert {path: support.digest(path) for path in tmp_path.rglob("*") if path.is_file()} == before
    if "commit without --by-adoption" in result.stderr and make.__name__ not in ("smaller", "child"):
        # The advice helps.
        assert support.run_instar("commit", "-q", "-b", base, tmp_path / "top").rc == 0


def test_a_link_to_the_overlay_is_refused(chain):
    (chain / "link").symlink_to("top")
    before = state(chain)
    result = adopt(chain, top="link")
    assert result.rc == 1 and "is a symbolic link" in result.stderr and state(chain) == before, str(result)


def test_a_link_to_the_target_goes_on_leading_to_it(chain):
    expected = support.content_hash(chain / "top")
    (chain / "base").rename(chain / "real")
    (chain / "base").symlink_to("real")
    assert adopt(chain).rc == 0
    assert (chain / "base").is_symlink() and support.content_hash(chain / "real") == expected


def test_what_may_not_be_renamed_is_refused_before_the_first_change(chain):
    """A directory that may not be written to; another owner of one image, or of both."""
    if os.geteuid() != 0:
        pytest.skip("other users take root")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", support.instar_binary(), "commit", "--sandbox",
              "process", "--by-adoption", "-b", "base", chain / "top"]
    for path in (chain / "base", chain / "top", chain / "root"):
        os.chown(path, 65534, 65534)
    for directory in chain.parents:
        if directory.stat().st_uid == 0 and directory.stat().st_mode & 0o1 == 0:
            directory.chmod(directory.stat().st_mode | 0o11)
    before, expected = state(chain), support.content_hash(chain / "top")
    for mode, owners, said in ((0o755, (65534, 65534), "may not be renamed or replaced"), (0o777, (65534, 0), "has to belong to you"),
                               (0o777, (1000, 1000), "has to belong to you")):
        chain.chmod(mode)
        for name, owner in zip(("top", "base"), owners):
            os.chown(chain / name, owner, owner)
            (chain / name).chmod(0o666)
        before = state(chain)
        result = support.run(*nobody)
        assert result.rc == 1 and said in result.stderr and state(chain) == before, f"{oct(mode)} {result}"
    os.chown(chain / "top", 65534, 65534)
    os.chown(chain / "base", 65534, 65534)
    result = support.run(*nobody)
    assert result.rc == 0, str(result)
    assert support.content_hash(chain / "base") == expected


def test_siblings_that_are_not_needed(tmp_path):
    create(tmp_path / "base", 8 * MIB)
    create(tmp_path / "top", backing="base", cwd=tmp_path)
    create(tmp_path / "sibling", backing="base", cwd=tmp_path)
    result = adopt(tmp_path, "--ignore-siblings")
    assert result.rc == 0 and "'" + str(tmp_path / "sibling") + "'" in result.stderr, str(result)


def killed_before_the_last_step(chain, *options):
    result = support.run(faults.injector(), "KILL", "1", "renameat", chain, "--", support.instar_binary(), "commit", "--by-adoption",
                         *options, "-b", "base", chain / "top")
    assert result.rc == 137 and (chain / "top").exists(), str(result)


@pytest.mark.parametrize("base", ["base", "root"])
@pytest.mark.parametrize("sandbox", support.SANDBOXES)
def test_a_second_run_finishes_one_that_was_killed_before_the_last_step(chain, sandbox, base):
    """The overlay does not lead to the target any more, and does not go one layer deeper."""
    expected, root = support.content_hash(chain / "top"), support.digest(chain / "root")
    (chain / base).chmod(0o640)
    os.setxattr(chain / base, "user.label", b"kept")
    result = support.run(faults.injector(), "KILL", "1", "renameat", chain, "--", support.instar_binary(), "commit", "--by-adoption",
                         "-b", base, chain / "top")
    assert result.rc == 137, str(result)
    os.utime(chain / "top")
    before = state(chain)
    dry = adopt(chain, "--dry-run", "--output", "json", base=base)
    assert dry.rc == 0 and dry.json["bytes_kept"] == 0 and not dry.json["adopted"] and state(chain) == before, str(dry)
    done = adopt(chain, "--sandbox", sandbox, "-v", "--output", "json", base=base)
    assert done.rc == 0 and done.json["adopted"] and done.json["bytes_kept"] == 0, str(done)
    assert "an earlier run was interrupted before the last step" in done.stderr
    assert not (chain / "top").exists() and (chain / base).stat().st_mode & 0o777 == 0o640
    assert os.listxattr(chain / base) == ["user.label"]
    assert support.content_hash(chain / base) == expected
    assert base == "root" or support.digest(chain / "root") == root
    support.assert_clean(chain / base)
    again = adopt(chain, base=base)
    assert again.rc == 1 and "if an earlier run with --by-adoption has ended" in again.stderr, str(again)


def test_a_wrong_base_is_not_taken_for_an_interruption(chain):
    """Without a mark, the overlay was on no way."""
    assert support.run_instar("rebase", "-q", "-b", "root", "-F", "qcow2", chain / "top").rc == 0
    before = state(chain)
    for top in (chain / "top", chain / "root"):
        result = adopt(chain, top=top.name)
        assert result.rc == 1 and "interrupted" not in result.stderr and "--by-adoption" not in result.stderr, str(result)
        assert re.search(r"ERROR_NOT_IN_CHAIN|ERROR_NO_BACKING", result.stderr) and state(chain) == before, str(result)


def test_only_the_file_that_the_first_run_was_to_replace_is_replaced(chain):
    killed_before_the_last_step(chain)
    shutil.copy2(chain / "base", chain / "other")
    for change in (lambda: None, lambda: qemu_io(chain / "base", "write -P 9 6M 64k"), lambda: (chain / "top").chmod(0o600)):
        change()
        before = state(chain)
        for base in ("base", "other") if change() else ("other",):
            result = adopt(chain, base=base)
            assert result.rc == 1 and INTERRUPTED in result.stderr and "this is not the file" in result.stderr, str(result)
            assert state(chain) == before
    result = adopt(chain, "--ignore-siblings")
    assert result.rc == 1 and "or something wrote to it since then" in result.stderr and state(chain) == before, str(result)


def test_a_second_run_asks_everybody_again(chain):
    """Images that were made on one of the two meanwhile."""
    killed_before_the_last_step(chain)
    expected = support.content_hash(chain / "top")
    for name, backing, said in (("sibling", "base", "is the backing of 1 other image"), ("child", "top", "which could not be read without it")):
        create(chain / name, backing=backing, cwd=chain)
        before = state(chain)
        result = adopt(chain)
        assert result.rc == 1 and said in result.stderr and state(chain) == before, str(result)
        (chain / name).unlink()
    assert adopt(chain).rc == 0 and support.content_hash(chain / "base") == expected


def test_an_overlay_with_another_parent_since_then_is_not_renamed(chain):
    killed_before_the_last_step(chain)
    assert support.run_instar("rebase", "-q", "-b", "", chain / "top").rc == 0
    before = state(chain)
    result = adopt(chain)
    assert result.rc == 1 and "this is not the file" in result.stderr and state(chain) == before, str(result)


def test_a_mark_that_stayed_says_nothing_of_the_next_run(chain):
    """A crash before the mark is removed."""
    expected = support.content_hash(chain / "top")
    os.setxattr(chain / "base", "user.instar.takes-the-place-of", b"1 2 3.000000000")
    os.setxattr(chain / "top", "user.instar.takes-the-place-of", b"1 2 3.000000000")
    assert adopt(chain).rc == 0
    assert support.content_hash(chain / "base") == expected and os.listxattr(chain / "base") == []


@pytest.mark.parametrize("call, number", [("fsync", 3), ("fremovexattr", 1)])
def test_a_mark_that_a_killed_run_left_is_removed_by_the_next(chain, call, number):
    """The rename is done; before it, the mark is what a second run goes by."""
    expected = support.content_hash(chain / "top")
    result = support.run(faults.injector(), "KILL", str(number), call, chain, "--", support.instar_binary(), "commit",
                         "--by-adoption", "-b", "base", chain / "top")
    assert result.rc == 137 and not (chain / "top").exists() and os.listxattr(chain / "base") != [], str(result)
    assert adopt(chain, "--dry-run").rc == 1 and os.listxattr(chain / "base") != []
    # While the file that the mark names is there, something is left to do.
    mark = os.getxattr(chain / "base", "user.instar.takes-the-place-of")
    os.setxattr(chain / "base", "user.instar.takes-the-place-of", b"%d 2 3.000000000" % (chain / "root").stat().st_ino)
    assert adopt(chain).rc == 1 and os.listxattr(chain / "base") != []
    os.setxattr(chain / "base", "user.instar.takes-the-place-of", mark)
    result = adopt(chain)
    assert result.rc == 1 and "if an earlier run with --by-adoption has ended" in result.stderr, str(result)
    assert os.listxattr(chain / "base") == [] and support.content_hash(chain / "base") == expected


def test_children_of_an_overlay_whose_adoption_was_cut_short(chain):
    """The advice leads to the end: no commit relinks to a target that the overlay does not lead to any more."""
    killed_before_the_last_step(chain)
    create(chain / "child", backing="top", cwd=chain)
    expected = support.content_hash(chain / "child")
    result = adopt(chain)
    assert result.rc == 1 and "`instar rebase -u`, and add --ignore-siblings" in result.stderr, str(result)
    assert "--relink" not in result.stderr
    assert support.run_instar("rebase", "-q", "-u", "-b", "base", "-F", "qcow2", chain / "child").rc == 0
    assert adopt(chain, "--ignore-siblings").rc == 0
    assert support.content_hash(chain / "child") == support.content_hash(chain / "base") == expected


def test_a_chain_that_cannot_be_followed_is_no_run_that_was_cut_short(chain):
    """To rename the overlay would lose what only the target holds."""
    create(chain / "upper", backing="top", cwd=chain)
    for name, damage in (("top", lambda: (chain / "top").write_bytes(b"no image" * 100)), ("top", lambda: (chain / "top").unlink())):
        damage()
        result = adopt(chain, top="upper")
        assert result.rc == 1 and name in result.stderr and "--by-adoption was interrupted" not in result.stderr, str(result)


def test_the_target_has_to_be_named(chain):
    result = support.run_instar("commit", "--by-adoption", chain / "top")
    assert result.rc == 2 and "--base <BASE>" in result.stderr, str(result)


@pytest.mark.parametrize("option", ["-d", "--atomic", "--bitmaps", "--wipe", "--verify", "--digest", "--detect-zeroes", "--delete-overlay", "--keep-backup=x"])
def test_options_that_do_not_go_with_it(chain, option):
    result = adopt(chain, option)
    assert result.rc == 2 and "cannot be used with" in result.stderr, str(result)


def test_the_last_progress_line_has_the_result(chain):
    result = adopt(chain, "-q", "--progress=json")
    assert result.rc == 0, str(result)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert lines[-1]["result"]["adopted"] is True
