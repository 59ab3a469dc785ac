"""One mistake at the command line, one exit status, whatever the command: the table of docs/errors.md."""

from __future__ import annotations

import re

import pytest
import support
from support import MIB, run_instar

#: Arguments with which each command does its work.
GOOD = {
    "commit": ["top"], "check": ["top"], "info": ["top"], "map": ["top"], "compare": ["top", "base"], "convert": ["top", "new"],
    "rebase": ["-u", "-b", "base", "-F", "qcow2", "top"], "recover": ["top"], "measure": ["top"], "resize": ["top", "2M"],
    "create": ["-f", "qcow2", "new", "1M"], "plugins": [], "config": [], "doctor": [], "explain": ["16"],
}
READS = [command for command, args in GOOD.items() if "top" in args]
FORMATTED = [command for command in READS if command != "recover"]
IN_SANDBOX = [command for command in FORMATTED if command != "info"]


def every(commands, *options):
    return [(command, [*options, *GOOD[command]]) for command in commands]


def with_file(name):
    return [(command, [name if arg == "top" else arg for arg in GOOD[command]]) for command in FORMATTED]


#: Mistakes that the command line alone shows, and options that the image contradicts.
USAGE = {
    "an unknown option": every(GOOD, "--nonesuch"),
    "nothing": [(command, []) for command, args in GOOD.items() if args and command != "explain"],
    "one argument more": [(command, [*args, "x", "y"]) for command, args in GOOD.items() if command not in ("convert", "rebase")],
    "an unknown choice": every(set(GOOD) - {"create"}, "--output", "xml") + every([*IN_SANDBOX, "doctor"], "--sandbox", "x"),
    "no number": [*every(["commit", "convert"], "-r", "1x"), *every([*IN_SANDBOX, "recover"], "--wait", "x"), *every(["map"], "-s", "1x"),
                  *every(["convert"], "-S", "7"), ("resize", ["top", "1x"]), ("resize", ["top", "9E"]), ("measure", ["--size", "1x"]),
                  ("create", ["-f", "qcow2", "new", "1x"]), ("create", ["-f", "qcow2", "new", "9E"]), ("create", ["-f", "qcow2", "new"])],
    "options of qemu-img that none has": [case for option in (["--object", "x"], ["--image-opts"]) for case in every(set(FORMATTED) | {"create"}, *option)],
    "options that contradict each other": [
        *every(["commit"], "-d", "--wipe"), *every(["commit"], "-b", "base", "--by-adoption", "-t", "unsafe"), *every(["check"], "-r", "all", "-U"),
        *every(["convert"], "-n", "-o", "x=1"), *every(["measure"], "--size", "1M"), ("rebase", ["-u", "-b", "base", "top"]),
        ("create", ["-f", "qcow2", "-b", "base", "new"]), ("resize", ["top", "512k"])],
    "an option without the one that it needs": [
        *every(["check"], "--dry-run"), *every(["commit"], "--by-adoption"), *every(["commit"], "--keep-backup", "x"),
        *[case for option in (["-b", "base"], ["-F", "qcow2"], ["--resize-backing"], ["--bitmaps"], ["--atomic"])
          for case in every(["measure"], *option) + every(["measure"], "-O", "qcow2", *option)]],
    "a part of -o that is none": [(command, ["-o", option, *args]) for option in ("cluster_size", "size=1M", "backing_file=base")
                                  for command, args in (("convert", ["-O", "qcow2", "top", "new"]), ("measure", ["-O", "qcow2", "top"]))],
    "a code that none is": [("explain", ["NOPE"]), ("explain", ["4600"])],
}
#: Mistakes that another plugin, another image or another machine would not call one.
REFUSED = {
    "an unknown format": [*every(FORMATTED, "-f", "qcow9"), *every(["convert", "measure"], "-O", "qcow9"), *every(["compare"], "-F", "qcow9"),
                          *every(["commit"], "-b", "base", "-F", "qcow9"), ("create", ["-f", "qcow9", "new", "1M"])],
    "another format": every(FORMATTED, "-f", "vmdk"),
    "no format": with_file("junk"),
    "a missing file": [*with_file("none"), ("recover", ["none"]), *every(["commit"], "-b", "none"), ("rebase", ["-b", "none", "-F", "qcow2", "top"])],
    "a directory": with_file("."),
    "an option that the format does not have, or a value": [
        (command, ["-o", option, *args]) for option in ("nonesuch=1", "cluster_size=63k", "preallocation=x", "compat=v9")
        for command, args in (("create", GOOD["create"]), ("convert", ["-O", "qcow2", "top", "new"]), ("measure", ["-O", "qcow2", "top"]))],
    "an unknown snapshot": every(["convert", "measure"], "-l", "nope"),
}


@pytest.fixture
def images(tmp_path):
    support.create(tmp_path / "base", MIB)
    support.create(tmp_path / "top", backing="base")
    (tmp_path / "junk").write_bytes(b"junk" * 1024)
    return tmp_path


def test_each_command_is_asked():
    listed = run_instar("--help").stdout.split("Commands:\n")[1].split("\n\n")[0]
    assert set(re.findall(r"(?m)^  (\w+)  ", listed)) == {*GOOD, "help"}


@pytest.mark.parametrize("command", GOOD)
def test_without_a_mistake_it_is_0(images, command):
    result = run_instar(command, *GOOD[command], cwd=images)
    assert result.rc == 0, str(result)


@pytest.mark.parametrize("mistake", [*USAGE, *REFUSED])
def test_one_mistake_has_one_status(images, mistake):
    status, others = (2, {"check": 64}) if mistake in USAGE else (1, {"compare": 2})
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    for command, args in (USAGE | REFUSED)[mistake]:
        result = run_instar(command, *args, cwd=images)
        assert result.rc == others.get(command, status) and result.stdout == "", str(result)
        assert ("(ERROR_BAD_USAGE)\n" in result.stderr) == (mistake in USAGE), str(result)
        assert {path.name: path.read_bytes() for path in images.iterdir()} == before, str(result)


def test_the_table_is_the_documented_one():
    rows = re.findall(r"(?m)^\| (\d) \| (.*) \| ([\d, or]+) \| ([\d, or]+) \|$", (support.REPO / "docs/errors.md").read_text())
    assert [(status, check, compare) for status, _, check, compare in rows] == [("0", "0", "0"), ("2", "64", "2"), ("1", "1", "2, 3 or 4")]
    assert "`ERROR_BAD_USAGE`" in rows[1][1]
