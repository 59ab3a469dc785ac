"""Commits that must be refused: nothing changes, one line names the file, the exit status is 1.

`support.refuse` runs each case twice, once for the line and once for the JSON object.
"""

from __future__ import annotations

import os
import subprocess

import pytest
import qcow2_bytes
import support
from support import MIB, refuse

DATA = ["write -P 1 0 1M", "write -P 2 2M 512k"]


@pytest.fixture
def made(pair):
    """A pair with data on both sides."""
    return pair.make(base=["write -P 9 0 2M"], top=DATA)


# --- what is not there ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none.qcow2", "none/none.qcow2", b"\xff\n\x1b[31m"], ids=["file", "directory", "odd"])
def test_overlay_missing(pair, name):
    overlay = os.path.join(os.fsencode(pair.dir), os.fsencode(name))
    refuse("ERROR_IMAGE_NOT_FOUND", overlay, mentions=["does not exist"])


def test_no_backing_recorded(pair):
    support.create(pair.base, MIB)
    refuse("ERROR_NO_BACKING", pair.base, mentions=["no recorded backing file", pair.base])


def test_no_backing_recorded_but_one_named(made):
    """`-b` does not make an ancestor of a file that is none."""
    alone = support.create(made.dir / "alone.qcow2", 4 * MIB)
    with support.untouched(alone, made.base):
        result = support.run_instar("commit", "-b", "base.qcow2", alone)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
    assert str(alone) in result.stderr


def test_backing_missing(made):
    made.base.unlink()
    refuse("ERROR_BACKING_NOT_FOUND", made.top, mentions=["does not exist", made.base])
    refuse("ERROR_BACKING_NOT_FOUND", made.top, "-b", "base.qcow2", mentions=["does not exist", made.base])


def test_middle_ancestor_missing(made):
    """Its bytes may be needed to fill a cluster of the backing."""
    support.create(made.dir / "third.qcow2", backing="top.qcow2")
    support.qemu_io(made.dir / "third.qcow2", "write -P 7 0 512")
    made.base.unlink()
    refuse("ERROR_BACKING_NOT_FOUND", made.dir / "third.qcow2", files=[made.top],
           mentions=["does not exist", "base.qcow2"])


# --- what is not related ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["other.qcow2", "top.qcow2"])
def test_named_backing_is_no_parent(made, name):
    other = support.create(made.dir / "other.qcow2", 4 * MIB)
    refuse("ERROR_NOT_IN_CHAIN", made.top, "-b", name, files=[made.base, other],
           mentions=["the overlay's immediate parent is base.qcow2", name])


def test_named_backing_begins_at_the_overlays_directory(made, tmp_path):
    """A name that only the working directory knows is not found."""
    refuse("ERROR_BACKING_NOT_FOUND", made.top, "-b", "images/base.qcow2", files=[made.base], cwd=tmp_path,
           mentions=["does not exist"])


def test_same_bytes_are_not_the_parent(made):
    twin = support.copy(made.base, made.dir / "twin.qcow2")
    refuse("ERROR_NOT_IN_CHAIN", made.top, "-b", twin, files=[made.base, twin])


@pytest.mark.parametrize("top_size", [8 * MIB, 4 * MIB + 512])
def test_oversized_overlay(pair, top_size):
    pair.make(4 * MIB, top_size=top_size, top=DATA)
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", pair.top, files=[pair.base],
           mentions=["exceeds backing virtual size", pair.top])


def test_oversized_empty_overlay(pair):
    pair.make(4 * MIB, top_size=8 * MIB)
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", pair.top, files=[pair.base])


@pytest.mark.parametrize("fmt", ["raw", "vmdk"])
def test_wrong_format(made, fmt):
    """Never believed; a format that no plugin knows is refused as such."""
    for output in ([], ["--output", "json"]):
        with support.untouched(made.top, made.base):
            result = support.run_instar("commit", "-f", fmt, *output, made.top)
        known = f'"{fmt}"' in support.run_instar("plugins", "--output", "json").stdout
        wanted = "ERROR_FORMAT_MISMATCH" if known else "ERROR_PLUGIN_UNAVAILABLE"
        support.assert_refused(result, wanted, fmt)


def test_unknown_format(made):
    refuse("ERROR_PLUGIN_UNAVAILABLE", made.top, "-f", "nonesuch", files=[made.base], mentions=["nonesuch"])


def test_recorded_raw_over_a_qcow2_file(pair):
    support.create(pair.base, 4 * MIB)
    support.create(pair.top, 4 * MIB, backing="base.qcow2")
    support.qemu_img("rebase", "-u", "-b", "base.qcow2", "-F", "raw", pair.top)
    support.qemu_io(pair.top, "write -P 1 0 64k")
    refuse("ERROR_FORMAT_MISMATCH", pair.top, files=[pair.base], mentions=["base.qcow2", "looks like a qcow2 image", "-F raw"])
    # As long as the overlay's disk, and with a copy of its first bytes in the overlay: its header is not changed either.
    os.truncate(pair.base, 4 * MIB)
    refuse("ERROR_FORMAT_MISMATCH", pair.top, files=[pair.base], mentions=["base.qcow2", "nothing was changed"])
    copy = pair.dir / "copy"
    copy.write_bytes(pair.base.read_bytes()[:16] + b"\1" + pair.base.read_bytes()[17:4096])
    support.qemu_io(pair.top, f"write -s {copy} 0 4k")
    refuse("ERROR_FORMAT_MISMATCH", pair.top, files=[pair.base], mentions=["base.qcow2", "nothing was changed"])


# --- images in use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["-r"]], ids=["writer", "reader"])
@pytest.mark.parametrize("held", ["top", "base"])
def test_image_in_use(made, held, options):
    path = getattr(made, held)
    with support.Holder(path, *options):
        refuse("ERROR_IMAGE_IN_USE", made.top, files=[made.base], mentions=[path, "another process"])
    made.check_commit()


# --- what an overlay may not lead to ----------------------------------------------------------------


def outside(made, tmp_path):
    """The backing moves out of the overlay's directory."""
    elsewhere = tmp_path / "outside"
    elsewhere.mkdir()
    return made.base.rename(elsewhere / "base.qcow2")


@pytest.mark.parametrize("form", ["../outside/base.qcow2", "sub/../../outside/base.qcow2", "{absolute}", "./../outside/base.qcow2"])
def test_recorded_name_leads_outside(made, tmp_path, form):
    base = outside(made, tmp_path)
    (made.dir / "sub").mkdir()
    name = form.format(absolute=base)
    qcow2_bytes.Image(made.top).set_backing(name.encode())
    before = support.content_hash(made.top)
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", made.top, files=[base], mentions=[made.top, "-b"])
    support.commit(made.top, "--allow-backing-dir", base.parent)
    assert support.content_hash(base) == before
    assert support.holds_no_clusters(made.top)


def test_recorded_name_leads_outside_but_is_named(made, tmp_path):
    base = outside(made, tmp_path)
    qcow2_bytes.Image(made.top).set_backing(b"../outside/base.qcow2")
    before = support.content_hash(made.top)
    support.commit(made.top, "-b", base)
    assert support.content_hash(base) == before
    assert support.holds_no_clusters(made.top)


def test_another_allowed_directory_does_not_help(made, tmp_path):
    base = outside(made, tmp_path)
    (tmp_path / "allowed").mkdir()
    qcow2_bytes.Image(made.top).set_backing(os.fsencode(base))
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", made.top, "--allow-backing-dir", tmp_path / "allowed", files=[base])


@pytest.mark.parametrize("absolute", [True, False])
def test_link_leads_outside(made, tmp_path, absolute):
    base = outside(made, tmp_path)
    made.base.symlink_to(base if absolute else "../outside/base.qcow2")
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", made.top, files=[base], mentions=["base.qcow2"])


def test_directory_link_leads_outside(made, tmp_path):
    base = outside(made, tmp_path)
    (made.dir / "way").symlink_to("../outside")
    qcow2_bytes.Image(made.top).set_backing(b"way/base.qcow2")
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", made.top, files=[base], mentions=["base.qcow2"])


@pytest.mark.parametrize(
    "name",
    [b"nbd://localhost:10809/x", b"nbd:localhost:10809", b'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}',
     b"file:base.qcow2", b"http://localhost/x", b"fat:rw:.", b"host_device:/dev/null"],
    ids=["nbd-url", "nbd", "json", "file", "http", "fat", "device"],
)
def test_protocol_names(made, name):
    qcow2_bytes.Image(made.top).set_backing(name)
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", made.top, files=[made.base], mentions=[made.top])


@pytest.mark.parametrize(
    "name",
    [b"x\ny", b"\x1b[2J\x1b[31mx", b"x\rinstar: Image committed.", b"\xff\xfe\x9b31m", b"a\0b", b"\x07bell\x7f", "‮x".encode()],
    ids=["newline", "escape", "return", "not-utf8", "nul", "bell", "bidi"],
)
def test_names_are_escaped(made, name):
    """`assert_refused` finds any control character; a bidirectional override must not pass either."""
    qcow2_bytes.Image(made.top).set_backing(name)
    for output in ([], ["--output", "json"]):
        with support.untouched(made.top, made.base):
            result = support.run_instar("commit", *output, made.top)
        assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
        assert not support.CONTROL.search(result.stderr) and "‮" not in result.stderr, str(result)
        result.stderr.encode()  # no byte that is not UTF-8
        assert "Image committed." not in result.stdout


def test_self_backing(pair):
    support.create(pair.base, MIB)
    support.create(pair.top, backing="base.qcow2")
    support.qemu_io(pair.top, "write -P 1 0 64k")
    qcow2_bytes.Image(pair.top).set_backing(b"top.qcow2")
    refuse("ERROR_CHAIN_LOOP", pair.top, mentions=[pair.top])
    refuse("ERROR_CHAIN_LOOP", pair.top, "-b", "top.qcow2", mentions=[pair.top])


def relative_symlink(target, link):
    os.symlink(target.name, link)


@pytest.mark.parametrize("link", [os.link, relative_symlink])
def test_link_to_itself(made, link):
    made.base.unlink()
    link(made.top, made.base)
    refuse("ERROR_CHAIN_LOOP", made.top, mentions=[made.top])


def test_loop_of_two(pair):
    support.create(pair.dir / "root", MIB)
    for name in ("base.qcow2", "top.qcow2"):
        support.create(pair.dir / name, backing="root")
    support.qemu_io(pair.top, "write -P 1 0 64k")
    qcow2_bytes.Image(pair.top).set_backing(b"base.qcow2")
    qcow2_bytes.Image(pair.base).set_backing(b"top.qcow2")
    refuse("ERROR_CHAIN_LOOP", pair.top, files=[pair.base])


def test_loop_below_the_backing(pair):
    support.create(pair.dir / "root", MIB)
    names = ["a", "b", "base.qcow2"]
    for name in names:
        support.create(pair.dir / name, backing="root")
    support.create(pair.top, backing="base.qcow2")
    for name, below in zip(names, [b"b", b"a", b"a"]):
        qcow2_bytes.Image(pair.dir / name).set_backing(below)
    refuse("ERROR_CHAIN_LOOP", pair.top, files=[pair.dir / name for name in names])


