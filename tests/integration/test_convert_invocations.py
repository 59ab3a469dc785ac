"""Every documented invocation of `qemu-img convert`, with the word replaced: the documented result, or one sentence."""

from __future__ import annotations

import re

import pytest
import support
from support import MIB

TABLE = support.REPO / "docs/convert.md"

#: Options, the sources, and what comes of it: the disk that qemu-img makes of them (on the same backing file, in the same file,
#: with all of it allocated, with the same bitmaps), or bad usage.
QCOW2 = ["-O", "qcow2"]
TOP = ["top.qcow2"]
INVOCATIONS = [
    ([], TOP, "same"),
    *[([option, "qcow2"], TOP, "same") for option in ("-f", "--source-format", "-O", "--target-format")],
    (["-f", "raw", *QCOW2], ["disk.raw"], "same"),
    *[([*QCOW2, option, "cluster_size=4k"], TOP, "same") for option in ("-o", "--target-options")],
    *[([option, "one"], TOP, "same") for option in ("-l", "--source-snapshot")],
    (["-l", "snapshot.name=one"], TOP, "same"),
    (QCOW2, ["top.qcow2", "base.qcow2", "top.qcow2"], "same"),
    (["-f", "raw"], ["disk.raw", "disk.raw"], "same"),
    *[([*QCOW2, first, "base.qcow2", second, "qcow2"], TOP, "backed")
      for first, second in (("-B", "-F"), ("--backing", "--backing-format"))],
    *[([option, *QCOW2], TOP, "in place") for option in ("-n", "--no-create")],
    (["-n", "--target-is-zero", *QCOW2], TOP, "in place"),
    *[([option, "0", "-O", fmt], TOP, "allocated") for option in ("-S", "--sparse-size") for fmt in ("raw", "qcow2")],
    (["-S", "64k", *QCOW2], TOP, "same"),
    (["--bitmaps", *QCOW2], TOP, "bitmaps"),
    (["--bitmaps", "--skip-broken-bitmaps", *QCOW2], TOP, "bitmaps"),
    (["--salvage"], TOP, "same"),
    *[([option], TOP, "same") for option in ("-U", "--force-share", "-p", "--progress", "-q", "--quiet", "-W", "--oob-writes", "-C",
                                              "--copy-range-offloading")],
    *[([option, mode], TOP, "same") for option in ("-t", "--target-cache", "-T", "--source-cache")
      for mode in ("none", "writeback", "writethrough", "directsync", "unsafe")],
    *[([option, "4"], TOP, "same") for option in ("-m", "--parallel")],
    *[([option, "1G"], TOP, "same") for option in ("-r", "--rate")],
    *[([option, *QCOW2], TOP, "same") for option in ("-c", "--compress")],
    (["-c", "-O", "vmdk", "-o", "subformat=streamOptimized"], TOP, "same"),
    *[(["-O", "vmdk", "-o", f"subformat={kind}"], TOP, "same")
      for kind in ("monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")],
    (["-S", "4k"], TOP, "same"),
    *[([option], TOP, "refused") for option in ("--image-opts", "--source-image-opts", "--target-image-opts")],
    (["--object", "secret,id=s,data=x"], TOP, "refused"),
]

#: The short names of options.
SHORT = {
    "--source-format": "-f", "--target-format": "-O", "--target-options": "-o", "--source-snapshot": "-l", "--backing": "-B",
    "--backing-format": "-F", "--no-create": "-n", "--sparse-size": "-S", "--force-share": "-U", "--progress": "-p",
    "--quiet": "-q", "--oob-writes": "-W", "--copy-range-offloading": "-C", "--target-cache": "-t", "--source-cache": "-T",
    "--parallel": "-m", "--rate": "-r", "--compress": "-c",
}


@pytest.fixture
def images(tmp_path):
    """A chain of two, a bitmap and a snapshot in the upper one; a plain disk; an image to be written in place."""
    support.create(tmp_path / "base.qcow2", 4 * MIB)
    support.qemu_io(tmp_path / "base.qcow2", "write -P 2 1M 1M")
    support.create(tmp_path / "top.qcow2", backing="base.qcow2", cwd=tmp_path)
    support.qemu_io(tmp_path / "top.qcow2", "write -P 9 0 64k")
    support.qemu_img("snapshot", "-c", "one", tmp_path / "top.qcow2")
    support.qemu_img("bitmap", "--add", tmp_path / "top.qcow2", "changed")
    support.qemu_io(tmp_path / "top.qcow2", "write -P 3 1536k 1M", "write -z 3M 64k")
    (tmp_path / "disk.raw").write_bytes(bytes(MIB) + b"\x05" * 70_000 + bytes(100))
    return tmp_path


def bitmaps(image):
    return support.info(image)["format-specific"]["data"].get("bitmaps")


@pytest.mark.parametrize(("options", "sources", "outcome"), INVOCATIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_as_qemu_img(images, options, sources, outcome):
    ours, theirs = images / "ours", images / "theirs"
    if outcome == "in place":
        for target in (ours, theirs):
            support.create(target, 4 * MIB)
            if "--target-is-zero" not in options:
                support.qemu_io(target, "write -P 77 0 4M")
    files = [images / name for name in ("base.qcow2", "top.qcow2", "disk.raw")]
    if outcome == "refused":
        with support.untouched(*files):
            result = support.run_instar("convert", *options, *sources, "ours", cwd=images)
        option = next(option for option in options if option != "-O" and option.startswith("-"))
        assert result.rc == 2 and "(ERROR_BAD_USAGE)" in result.stderr and option in result.stderr, str(result)
        assert result.stderr.count("\n") == 1 and not ours.exists()
        return
    # Some versions document long names that they do not take.
    support.qemu_img("convert", *(SHORT.get(option, option) for option in options), *sources, "theirs", cwd=images)
    with support.untouched(*files):
        result = support.run_instar("convert", *options, *sources, "ours", cwd=images)
    assert result.rc == 0 and result.stdout == "", str(result)
    named = [value for option, value in zip(options, options[1:]) if option in ("-O", "--target-format")]
    fmt = named[0] if named else "raw"
    assert support.virtual_size(ours, fmt=fmt) == support.virtual_size(theirs, fmt=fmt)
    support.assert_same_content(ours, theirs, fmt, fmt, strict=False)
    if fmt == "qcow2":
        support.assert_clean(ours)
    if outcome == "backed":
        for key in ("backing-filename", "backing-filename-format"):
            assert support.info(ours)[key] == support.info(theirs)[key]
    if outcome == "allocated":
        assert ours.stat().st_blocks * 512 >= 4 * MIB
    if outcome == "bitmaps":
        assert bitmaps(ours) and bitmaps(ours) == bitmaps(theirs)


def test_help():
    for option in ("-h", "--help"):
        result = support.run_instar("convert", option)
        assert result.rc == 0 and "FILENAME" in result.stdout


def test_the_table_has_every_option():
    """Those that `qemu-img convert --help` of this machine names, too."""
    section = TABLE.read_text().split("## Every documented invocation")[1].split("\n## ")[0]
    listed = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", section.split("\n\n", 2)[2]))
    documented = set(re.findall(r"^ *(?:(-[a-zA-Z]), )?(--[a-z-]+)", support.qemu_img("convert", "--help", rc=None).stdout, re.M))
    wanted = {option for pair in documented for option in pair if option}
    assert wanted <= listed, f"{wanted - listed} is not in the table"
    used = {argument for options, _, _ in INVOCATIONS for argument in options if argument.startswith("-")} | {"-h", "--help"}
    assert listed - {"-img"} <= used, f"{listed - used} is in the table and not tried"
