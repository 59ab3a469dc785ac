"""`commit --relink` and `--relink-in`: the overlay's children name the target, so that the overlay can be removed. What a child
reads, `qemu-img` says; of a VDI, `vdi_bytes`."""

from __future__ import annotations

import json
import os
import subprocess

import commands
import jobs
import pytest
import support
import vdi_bytes
from support import MIB, Holder, create, qemu_img, qemu_io, refuse, run_instar

SIZE = 4 * MIB
#: Files of which a test compares all bytes.
KINDS = [("qcow2", "qcow2", "qcow2"), ("qcow2", "qcow2", "qcow"), ("qcow", "qcow", "qcow2"), ("raw", "qcow2", "qcow2"),
         ("vmdk", "vmdk", "qcow2"), ("vmdk", "qcow2", "qcow"),
         ("vmdk", "vmdk", "vmdk")]


def add(path, below, below_fmt="qcow2", fmt="qcow2", *commands, size=None, name=None, **options):
    """An image above another one, named relative to its own directory unless it is to have another `name`."""
    backing = {}
    if below:
        backing = {"backing": name or os.path.relpath(below, path.parent), "backing_fmt": below_fmt}
    create(path, size, fmt=fmt, cwd=path.parent, **backing, **options)
    qemu_io(path, *commands, fmt=fmt)
    return path


@pytest.fixture
def family(tmp_path):
    """base <- mid <- first, second, and sub/third; and `alone`, which only looks like them."""
    return make(tmp_path)


def make(directory, base="qcow2", mid="qcow2", child="qcow2"):
    (directory / "sub").mkdir()
    add(directory / "base", None, None, base, "write -P 1 0 3M", size=SIZE)
    add(directory / "mid", directory / "base", base, mid, "write -P 2 1M 640k")
    for number, name in enumerate(["first", "second", "sub/third"]):
        add(directory / name, directory / "mid", mid, child, f"write -P {number + 3} {number * 512}k 64k")
    return directory


def children(directory):
    return [directory / name for name in ("first", "second", "sub/third")]


def contents(paths, fmt="qcow2"):
    return [support.content_hash(path, fmt) for path in paths]


def named(path):
    said = support.info(path)
    return said.get("backing-filename"), said.get("backing-filename-format")


@pytest.mark.parametrize("kinds", KINDS, ids="-below-".join)
def test_the_overlay_can_be_removed(tmp_path, kinds):
    base, mid, child = kinds
    make(tmp_path, base, mid, child)
    before = contents(children(tmp_path), child)
    relink = [option for path in children(tmp_path) for option in ("--relink", path)]
    result = run_instar("commit", *relink, *["--output", "json"], tmp_path / "mid")
    assert result.rc == 0, str(result)
    records = [{"image": str(path), "backing": name, "already": False}
               for path, name in zip(children(tmp_path), ["base", "base", "../base"], strict=True)]
    assert result.json["relinked"] == records
    (tmp_path / "mid").unlink()
    assert contents(children(tmp_path), child) == before
    for path in children(tmp_path):
        assert child != "qcow2" or named(path)[1] == base
        if child != "qcow":
            # For which qemu-img has no check.
            support.assert_clean(path, child)
        checked = run_instar("check", path)
        assert checked.rc == 0, str(checked)
    again = run_instar("commit", "--ignore-siblings", tmp_path / "first")
    assert again.rc == 0, str(again)


def test_every_child_in_a_directory_and_no_other_image(family):
    add(family / "alone", None, None, size=SIZE)
    (family / "none.txt").write_text("base mid")
    third, alone = support.digest(family / "sub" / "third"), support.digest(family / "alone")
    before = contents(children(family))
    dry = run_instar("commit", "--dry-run", "--relink-in", family, "--output", "json", family / "mid")
    assert [os.path.basename(child["image"]) for child in dry.json["relinked"]] == ["first", "second"]
    with support.untouched(*children(family), family / "mid", family / "base"):
        said = run_instar("commit", "--dry-run", "--relink-in", family, family / "mid")
    assert "2 images would name the target instead of the overlay" in said.stdout
    result = run_instar("commit", "--relink-in", family, family / "mid")
    assert result.rc == 0 and "2 images" in result.stdout and "can be removed" in result.stdout, str(result)
    assert [named(path)[0] for path in children(family)] == ["base", "base", "../mid"]
    assert (third, alone) == (support.digest(family / "sub" / "third"), support.digest(family / "alone"))
    assert contents(children(family)) == before
    # The rest, in a second run: both ways of naming one image name it once.
    options = ["--relink-in", family, "--relink-in", family / "sub", "--relink", family / "sub" / "third"]
    result = run_instar("commit", *options, "--output", "json", family / "mid")
    assert [child["backing"] for child in result.json["relinked"]] == ["../base"]
    none = run_instar("commit", "--relink-in", family, family / "mid")
    assert none.rc == 0 and "No image was found that names" in none.stdout, str(none)
    (family / "mid").unlink()
    assert contents(children(family)) == before


def test_what_is_done_already_is_left_alone(family):
    before = contents(children(family))
    first = run_instar("commit", "--relink", family / "first", family / "mid")
    assert first.rc == 0, str(first)
    with support.untouched(family / "first"):
        again = run_instar("commit", "--relink", family / "first", "--relink", family / "second", "--output", "json", family / "mid")
    assert [child["already"] for child in again.json["relinked"]] == [True, False]
    assert contents(children(family)) == before


def test_names_are_recorded_as_they_were(family):
    """Relative or absolute, and through links of directories; where a link is the child, no relative name is right for all."""
    elsewhere = family / "elsewhere"
    (family / "real").mkdir()
    elsewhere.symlink_to(family / "real")
    absolute = add(family / "absolute", family / "mid", name=str(family / "mid"))
    through = add(family / "real" / "through", family / "mid")
    linked = family / "linked"
    add(family / "real" / "child", family / "mid", name=str(family / "mid"))
    linked.symlink_to("real/child")
    colon = family / "ba:se"
    before = contents([absolute, through, linked])
    options = ["--relink", absolute, "--relink", elsewhere / "through", "--relink", linked]
    result = run_instar("commit", *options, family / "mid")
    assert result.rc == 0, str(result)
    assert [named(path)[0] for path in (absolute, through, family / "real" / "child")] == [
        str(family / "base"), "../base", str(family / "base")]
    assert contents([absolute, through, linked]) == before
    # A colon before the first slash would make a protocol of it.
    (family / "base").rename(colon)
    support.qemu_img("rebase", "-u", "-b", "./ba:se", "-F", "qcow2", family / "mid")
    for path in (family / "first", family / "sub" / "third"):
        result = run_instar("commit", "--relink", path, family / "mid")
        assert result.rc == 0, str(result)
    assert [named(path)[0] for path in (family / "first", family / "sub" / "third")] == ["./ba:se", "../ba:se"]
    assert contents([family / "first"]) == contents([family / "first"])


def test_layers_that_are_merged_and_overlays_that_are_kept(tmp_path):
    for number, options in enumerate((["-d"], ["-b", "base"], ["-d", "-b", "base"])):
        directory = tmp_path / str(number)
        directory.mkdir()
        make(directory)
        low = directory / "base"
        if "-b" in options:
            (directory / "mid").rename(directory / "between")
            add(directory / "mid", directory / "between", "qcow2", "qcow2", "write -P 9 2M 64k")
        before = contents(children(directory))
        files = [path for path in directory.rglob("*") if path.is_file()]
        refuse("ERROR_BACKING_SHARED", directory / "mid", *options, "--relink-in", directory, files=files, mentions=["keeps its content"])
        relink = [option for path in children(directory) for option in ("--relink", path)]
        result = run_instar("commit", *options, *relink, directory / "mid")
        assert result.rc == 0, str(result)
        # Nothing shows that it was a run that was interrupted which had the others name the target: whoever knows says so.
        qemu_img("rebase", "-u", "-b", "mid", "-F", "qcow2", directory / "second")
        refuse("ERROR_BACKING_SHARED", directory / "mid", *options, *relink, files=files, mentions=["--ignore-siblings"])
        result = run_instar("commit", *options, *relink, "--ignore-siblings", directory / "mid")
        assert result.rc == 0, str(result)
        assert [named(path)[0] for path in children(directory)] == ["base", "base", "../base"]
        for name in ("mid", "between"):
            (directory / name).unlink(missing_ok=True)
        assert contents(children(directory)) == before and low.exists()


@pytest.mark.parametrize("options", [["-d"], ["-b", "base"]])
def test_a_sibling_that_is_named_as_a_child_stays_one(tmp_path, options):
    """It was never on the overlay: an overlay that keeps its content does not show whether it was committed before."""
    make(tmp_path)
    if "-b" in options:
        (tmp_path / "mid").rename(tmp_path / "between")
        add(tmp_path / "mid", tmp_path / "between", "qcow2", "qcow2", "write -P 9 2M 64k")
    sibling = add(tmp_path / "sibling", tmp_path / "base", "qcow2", "qcow2", "write -P 7 3M 64k")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    refuse("ERROR_BACKING_SHARED", tmp_path / "mid", *options, "--relink", sibling, files=files, mentions=["sibling"])


def test_a_snapshot_in_a_child_reads_what_it_read(tmp_path):
    """It is longer than the overlay, and the target has data there."""
    add(tmp_path / "base", None, None, "qcow2", "write -P 1 0 4M", size=SIZE)
    add(tmp_path / "mid", tmp_path / "base", "qcow2", "qcow2", "write -P 2 0 64k", size=MIB)
    child = add(tmp_path / "child", tmp_path / "mid", size=SIZE)
    qemu_img("snapshot", "-c", "long", child)
    qemu_img("resize", "--shrink", child, "1M")
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    refuse("ERROR_UNSUPPORTED_FORMAT", tmp_path / "mid", "--relink", child, files=files, mentions=["child", "reads zeroes past"])


def test_a_backing_that_grows(tmp_path):
    add(tmp_path / "base", None, None, "qcow2", "write -P 1 0 1M", size=2 * MIB)
    add(tmp_path / "mid", tmp_path / "base", "qcow2", "qcow2", "write -P 2 3M 64k", size=SIZE)
    child = add(tmp_path / "child", tmp_path / "mid", size=2 * SIZE)
    before = contents([child])
    result = run_instar("commit", "--resize-backing", "--relink", child, tmp_path / "mid")
    assert result.rc == 0, str(result)
    (tmp_path / "mid").unlink()
    assert contents([child]) == before


class HolderOfBytes(Holder):
    """qemu-io with the file alone open, and no image below it."""

    def __init__(self, path):
        self.process = subprocess.Popen(
            ["qemu-io", "-f", "raw", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def __enter__(self):
        self.process.stdin.write("length\n")
        self.process.stdin.flush()
        assert "iB" in self.process.stdout.readline()
        return self


def test_what_is_no_child_or_cannot_be_one_is_refused(family):
    first, files = family / "first", [*children(family), family / "base"]
    top = add(family / "grandchild", first)
    alone = add(family / "alone", None, None, size=SIZE)
    sibling = add(family / "sibling", family / "base")
    files += [top, alone, family / "sub" / "sibling"]

    def refused(code, *mentions, relink):
        options = [option for path in relink for option in ("--relink", path)]
        refuse(code, family / "mid", *options, files=files, mentions=mentions)

    refused("ERROR_NOT_IN_CHAIN", "grandchild", "is backed by 'first'", relink=[first, top])
    refused("ERROR_NOT_IN_CHAIN", "alone", "no backing file", relink=[first, alone])
    refused("ERROR_BACKING_SHARED", "sibling", relink=[first, sibling])
    sibling.rename(family / "sub" / "sibling")
    qemu_img("rebase", "-u", "-b", "../base", "-F", "qcow2", family / "sub" / "sibling")
    refused("ERROR_NOT_IN_CHAIN", "sibling", "leave it out", relink=[first, family / "sub" / "sibling"])
    refused("ERROR_CHAIN_LOOP", "named twice", relink=[first, first])
    refused("ERROR_CHAIN_LOOP", "the overlay itself", relink=[family / "mid"])
    refused("ERROR_CHAIN_LOOP", "below the overlay", relink=[family / "base"])
    refused("ERROR_IMAGE_NOT_FOUND", "absent", relink=[first, family / "absent"])
    os.link(first, family / "again")
    refused("ERROR_CHAIN_LOOP", "named twice", relink=[first, family / "again"])
    with HolderOfBytes(family / "second"):
        refused("ERROR_IMAGE_IN_USE", "second", relink=[first, family / "second"])
    refuse("ERROR_OPEN_FAILED", family / "mid", "--relink-in", family / "nowhere", files=files, mentions=["nowhere"])
    with (family / "second").open("r+b") as file:
        file.seek(79)
        file.write(b"\2")
    refused("ERROR_OVERLAY_CORRUPT", "second", relink=[first, family / "second"])


def test_a_second_run_is_not_stopped_by_what_the_first_one_has_relinked(family):
    """They are on the target now, as siblings are, and read what they read before: nothing is committed into it."""
    before = contents(children(family))
    for option in (["--relink", family / "first"], ["--relink-in", family], ["--relink-in", family / "sub"]):
        result = run_instar("commit", *option, family / "mid")
        assert result.rc == 0, str(result)
    assert contents(children(family)) == before and {named(path)[1] for path in children(family)} == {"qcow2"}
    # With something to commit they are siblings.
    qemu_io(family / "mid", "write -P 8 3M 64k")
    refuse("ERROR_BACKING_SHARED", family / "mid", files=children(family), mentions=["first", "second"])


def test_a_child_that_would_read_something_else_is_refused(tmp_path):
    add(tmp_path / "base", None, None, "qcow2", "write -P 1 0 4M", size=SIZE)
    create(tmp_path / "mid", MIB, backing="base", cwd=tmp_path)
    child = add(tmp_path / "child", tmp_path / "mid", size=2 * MIB)
    same = add(tmp_path / "same", tmp_path / "mid")
    files = [tmp_path / "base", child, same]
    refuse("ERROR_UNSUPPORTED_FORMAT", tmp_path / "mid", "--relink", child, files=files, mentions=["reads zeroes past the 1048576 bytes"])
    before = contents([child, same])
    result = run_instar("commit", "--relink", same, tmp_path / "mid")
    assert result.rc == 0, str(result)
    # As the refusal says.
    qemu_img("rebase", "-b", "base", "-F", "qcow2", child, cwd=tmp_path)
    (tmp_path / "mid").unlink()
    assert contents([child, same]) == before


def test_a_format_that_cannot_record_the_target(tmp_path):
    make(tmp_path, base="raw", child="qcow")
    files = [*children(tmp_path), tmp_path / "base"]
    refuse("ERROR_UNSUPPORTED_FORMAT", tmp_path / "mid", "--relink", tmp_path / "first", files=files,
           mentions=["first", "is raw", "nothing was changed"])


def test_vdi_children_get_the_identity_that_the_target_gets(tmp_path):
    size, names = 4 * MIB, ["base.vdi", "mid.vdi", "one.vdi", "two.vdi"]
    base, mid, one, two = (tmp_path / name for name in names)
    vdi_bytes.make(base, size, {0: b"a" * MIB, 1: b"b" * MIB})
    vdi_bytes.make(mid, size, {1: b"c" * MIB}, parent=base)
    for number, child in enumerate((one, two)):
        vdi_bytes.make(child, size, {number + 2: b"d" * MIB}, parent=mid)
    before = [vdi_bytes.content(child, mid, base) for child in (one, two)]
    options = ["--relink", one, "--relink", two]
    refuse("ERROR_UNSUPPORTED_FORMAT", mid, "-b", base, "-d", *options, files=[base, one, two], mentions=["without -d"])
    result = run_instar("commit", "-b", base, *options, "--output", "json", mid)
    assert result.rc == 0, str(result)
    mid.unlink()
    for child, was in zip((one, two), before, strict=True):
        assert vdi_bytes.Image(child).goes_with(vdi_bytes.Image(base))
        assert vdi_bytes.content(child, base) == was


def test_two_hundred_children(tmp_path):
    make(tmp_path)
    many = tmp_path / "many"
    many.mkdir()
    first = add(many / "0", tmp_path / "mid", "qcow2", "qcow2", "write -P 7 3M 64k")
    for number in range(1, 200):
        (many / str(number)).write_bytes(first.read_bytes())
    before = support.content_hash(first)
    result = run_instar("commit", "--relink-in", many, "--output", "json", tmp_path / "mid")
    assert result.rc == 0, str(result)
    assert len(result.json["relinked"]) == 200
    (tmp_path / "mid").unlink()
    assert {(many / str(number)).read_bytes() for number in range(200)} == {first.read_bytes()}
    assert support.content_hash(first) == before and named(first) == ("../base", "qcow2")


@pytest.fixture
def case(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    return commands.relink(directory)


def test_killed_at_every_call_that_changes_something(case):
    calls = case.calls()
    changing = [call for call in ("pwritev", "pwrite64", "copy_file_range", "fallocate", "ftruncate", "fdatasync") if calls[call]]
    injected = [case.inject("KILL", nth, call) for call in changing for nth in range(1, calls[call] + 1)]
    assert len(injected) > 12 and all(injected)


def test_calls_that_fail(case):
    calls = case.calls()
    for call in ("pwritev", "fdatasync", "preadv"):
        for nth in range(1, calls[call] + 1):
            case.inject("EIO", nth, call)


def test_a_child_whose_name_cannot_be_followed_is_told(case):
    """A name on a disk that cannot be read leads nobody knows where: the file may be a child, and is not left out silently."""
    told = 0
    for nth in range(12, case.calls()["fstat"] + 1):
        case.reset()
        result = case.run("EIO", nth, "fstat")
        relinked = all(os.path.basename(jobs.named(case.path(name))[0]) == "base" for name in case.others)
        assert result.rc != 0 or relinked or "could not be looked at" in result.stderr, str(result)
        told += "could not be looked at" in result.stderr
    assert told > 0


def test_the_library_and_a_worker_say_the_same(family):
    """What is printed is what the published schema allows; without the option the key is not there."""
    without = run_instar("commit", "--output", "json", "-d", family / "mid")
    assert "relinked" not in without.json
    verbose = run_instar("commit", "-v", "--relink", family / "first", "--output", "json", family / "mid")
    assert "will record 'base'" in verbose.stderr and json.loads(verbose.stdout)["relinked"]
