"""Every documented invocation of `qemu-img commit`, with the word replaced: the documented result, or one sentence."""

from __future__ import annotations

import re
import shutil

import pytest
import support
from support import MIB

TABLE = support.REPO / "docs/commit.md"

#: Arguments, and what is in the overlay's place afterwards: emptied, kept, or the files as they were.
INVOCATIONS = [
    ([], "emptied"),
    (["-f", "qcow2"], "emptied"),
    (["--format", "qcow2"], "emptied"),
    *[([option, mode], "emptied")
      for option in ("-t", "--cache") for mode in ("none", "writeback", "writethrough", "directsync", "unsafe")],
    (["-b", "base.qcow2", "-d"], "kept"),
    (["--base", "base.qcow2", "--drop"], "kept"),
    (["-d"], "kept"),
    (["--drop"], "kept"),
    (["-r", "1G"], "emptied"),
    (["--rate", "500M"], "emptied"),
    (["-p"], "emptied"),
    (["--progress"], "emptied"),
    (["-q"], "emptied"),
    (["--quiet"], "emptied"),
    (["-b", "root.qcow2"], "deep"),
    (["-q", "-f", "qcow2", "-t", "none", "-b", "base.qcow2", "-d", "-r", "1G"], "kept"),
    (["--object", "secret,id=s,data=x"], "refused"),
    (["--image-opts"], "refused"),
]


@pytest.fixture
def chain(tmp_path):
    """root <- base <- top, with data of its own in each."""
    support.create(tmp_path / "root.qcow2", 4 * MIB)
    support.qemu_io(tmp_path / "root.qcow2", "write -P 1 0 4M")
    support.create(tmp_path / "base.qcow2", backing="root.qcow2", cwd=tmp_path)
    support.qemu_io(tmp_path / "base.qcow2", "write -P 2 1M 1M")
    support.create(tmp_path / "top.qcow2", backing="base.qcow2", cwd=tmp_path)
    support.qemu_io(tmp_path / "top.qcow2", "write -P 3 1536k 1M", "write -z 3M 64k")
    return tmp_path


@pytest.mark.parametrize(("options", "outcome"), INVOCATIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_as_qemu_img(chain, options, outcome):
    theirs = chain.parent / "theirs"
    shutil.rmtree(theirs, ignore_errors=True)
    shutil.copytree(chain, theirs)
    files = [chain / f"{name}.qcow2" for name in ("root", "base", "top")]
    if outcome == "refused":
        with support.untouched(*files):
            result = support.run_instar("commit", *options, "top.qcow2", cwd=chain)
        assert result.rc == 2 and "(ERROR_BAD_USAGE)" in result.stderr and options[0] in result.stderr, str(result)
        return
    support.qemu_img("commit", *options, "top.qcow2", cwd=theirs)
    result = support.run_instar("commit", *options, "top.qcow2", cwd=chain)
    assert result.rc == 0, str(result)
    quiet = {"-q", "--quiet"} & set(options)
    assert result.stdout == ("" if quiet else "Image committed.\n")
    target = "root.qcow2" if outcome == "deep" else "base.qcow2"
    support.assert_same_content(chain / target, theirs / target)
    support.assert_clean(chain / target)
    assert support.holds_no_clusters(chain / "top.qcow2") == (outcome == "emptied")
    if outcome != "deep":
        support.assert_same_content(chain / "top.qcow2", theirs / "top.qcow2")


def test_help():
    for option in ("-h", "--help"):
        result = support.run_instar("commit", option)
        assert result.rc == 0 and "FILENAME" in result.stdout


def test_the_table_has_every_option():
    """Those that `qemu-img commit --help` of this machine names, too."""
    section = TABLE.read_text().split("## Every documented invocation")[1].split("\n## ")[0]
    listed = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", section))
    documented = set(re.findall(r"^ *(?:(-[a-z]), )?(--[a-z-]+)", support.qemu_img("commit", "--help", rc=None).stdout, re.M))
    wanted = {option for pair in documented for option in pair if option}
    assert wanted <= listed, f"{wanted - listed} is not in the table"
    used = {argument for options, _ in INVOCATIONS for argument in options if argument.startswith("-")} | {"-h", "--help"}
    assert listed - {"-img"} <= used, f"{listed - used} is in the table and not tried"
