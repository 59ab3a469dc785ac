"""For people at a terminal: colors, sentences that fit into 80 columns, usage errors, and names that were probably meant."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
import support
from support import KIB, MIB, run_instar

ESCAPE = "\x1b["
COLUMNS = 80


def on_a_terminal(*args, cwd, columns=COLUMNS, **environment):
    """What a command prints on a terminal of that width, both streams, as it was written."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "CI")}
    process = subprocess.Popen([support.instar_binary(), *args], cwd=cwd, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave,
                               env={**inherited, "TERM": "xterm", **environment})
    os.close(slave)
    printed = b""
    while True:
        try:
            more = os.read(master, 1 << 16)
        except OSError:
            break
        if not more:
            break
        printed += more
    process.wait(support.TIMEOUT)
    os.close(master)
    return printed.decode()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def images(tmp_path):
    support.create(tmp_path / "base", MIB)
    support.create(tmp_path / "top", backing="base")
    support.qemu_io(tmp_path / "base", f"write -P 1 0 {256 * KIB}")
    support.qemu_io(tmp_path / "top", f"write -P 2 {64 * KIB} {64 * KIB}")
    return tmp_path


COMMANDS = [["info", "--backing-chain", "top"], ["map", "top"], ["map", "--picture", "top"], ["check", "top"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_terminal_gets_colors_and_nothing_else_does(images, command):
    piped = run_instar(*command, cwd=images)
    assert piped.rc == 0 and ESCAPE not in piped.stdout + piped.stderr, str(piped)
    shown = on_a_terminal(*command, cwd=images)
    assert ESCAPE in shown and plain(shown) == piped.stdout, repr(shown)
    assert max(map(len, plain(shown).splitlines())) <= COLUMNS, shown
    # A runner of a CI service says so in CI, which makes nothing a terminal that shows colors.
    for quiet in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "dumb", "CI": "true"}):
        assert on_a_terminal(*command, cwd=images, **quiet) == piped.stdout, quiet
    assert on_a_terminal(*command, "--color=never", cwd=images) == piped.stdout
    forced = run_instar(*command, "--color", "always", cwd=images, env={"NO_COLOR": "1"})
    assert forced.stdout == shown, str(forced)


@pytest.mark.parametrize("command", [["info", "top"], ["map", "top"], ["check", "top"]], ids=" ".join)
def test_json_has_no_colors(images, command):
    shown = on_a_terminal(*command, "--output", "json", "--color", "always", cwd=images)
    assert ESCAPE not in shown and shown == run_instar(*command, "--output", "json", cwd=images).stdout


def test_damage_is_red_on_the_stream_that_tells_it(images):
    with open(images / "top", "r+b") as file:
        # The refcount table's first entry: its block lies nowhere.
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write(bytes(8))
    result = run_instar("check", "--color", "always", "top", cwd=images)
    assert result.rc == 2 and "\x1b[1m\x1b[31mERROR\x1b[0m " in result.stderr, str(result)
    assert re.search("\x1b\\[1m\x1b\\[31m\\d+ errors were found on the image.\x1b\\[0m", result.stdout), str(result)


def test_sentences_are_broken_between_words_and_only_on_a_terminal(images):
    with open(images / "top", "r+b") as file:
        file.seek(79)
        file.write(b"\2")  # the corrupt bit of the incompatible features
    piped = run_instar("info", "top", cwd=images).stdout
    shown = plain(on_a_terminal("info", "top", cwd=images))
    assert any(len(line) > COLUMNS for line in piped.splitlines()), piped
    assert max(map(len, shown.splitlines())) <= COLUMNS and shown.split() == piped.split(), shown


#: What may be longer than a line: one word, such as a path; a name or a command in quotes; and a code. They are copied whole.
WHOLE = re.compile(r"^\W*(?:'[^']*'|`[^`]*`|\S+|ERROR_\w+ \(\d+\))[.,;:)]*$")
#: Two runs differ in that.
MEASURED = re.compile(r"[\d.]+\s+\w+\s+free|\d+\s+µs")


@pytest.mark.parametrize("columns", [24, 40, 59])
@pytest.mark.parametrize("command", [["map", "--picture", "top"], ["explain"], ["doctor"], ["info", "base"], ["commit", "--dry-run", "top"],
                                     ["commit", "--verify", "top"], ["rebase", "-b", "", "--dry-run", "top"], ["recover", "top"]], ids=" ".join)
def test_a_narrow_terminal_breaks_no_word(images, command, columns):
    support.qemu_img("snapshot", "-c", "before", images / "base")
    shown = plain(on_a_terminal(*command, cwd=images, columns=columns))
    # Lines of qemu-img are as they are there.
    ours = shown.split("Notes:\n")[1] if command[0] == "info" else shown
    assert ours.count("\n") > 1 or command[0] == "recover" and len(ours) <= columns, shown
    assert [line for line in ours.splitlines() if len(line) > columns and not WHOLE.match(line)] == [], shown
    if "--picture" not in command and "--verify" not in command:
        piped = run_instar(*command, cwd=images)
        assert MEASURED.sub("", piped.stdout).split() == MEASURED.sub("", shown).split(), shown


@pytest.mark.parametrize("columns", [40, 60])
@pytest.mark.parametrize("command", [["create", "-f", "vmdk", "-o", "help"], ["convert", "-O", "raw", "cut", "new"], ["check", "cut"],
                                     ["check", "-r", "all", "cut"], ["commit", "--sandbox", "none", "top"], ["commit", "missing-overlay.qcow2"],
                                     ["rebase", "-u", "-b", "elsewhere", "-F", "raw", "top"], ["check", "-v", "top"]], ids=" ".join)
def test_errors_findings_warnings_and_help_are_broken_between_words(images, command, columns):
    disk = images / "disk"
    disk.write_bytes(b"x" * MIB)
    run_instar("convert", "-f", "raw", "-O", "qcow2", "disk", "cut", cwd=images)
    with open(images / "cut", "r+b") as file:
        file.truncate((images / "cut").stat().st_size - 4096)
    shown = plain(on_a_terminal(*command, cwd=images, columns=columns))
    # What clap says below the line of a usage error, and the lines of qemu-img, are as they are.
    lines = [line for line in shown.split("\n\nUsage:")[0].splitlines() if not re.match(r"Data may|This means|\d+/\d+ = |No errors|\s*\[possible", line)]
    assert len(lines) > 1, shown
    assert [line for line in lines if len(line) > columns and not WHOLE.match(line)] == [], shown
    if "-r" not in command and "-v" not in command:
        piped = run_instar(*command, cwd=images)
        assert sorted(shown.split()) == sorted((piped.stdout + piped.stderr).split()), shown


@pytest.mark.parametrize("columns", [24, 40, 59, 80])
def test_a_bar_fits_into_a_line(images, columns):
    shown = plain(on_a_terminal("commit", "-p", "top", cwd=images, columns=columns))
    drawn = [line.rstrip() for line in re.split(r"[\r\n]|\x1b\[\d*[A-Z]", shown)]
    assert any("writing" in line for line in drawn) and any("%" in line for line in drawn), repr(shown)
    assert max(len(line) for line in drawn if not line.endswith(".")) <= columns, repr(shown)


# --- usage errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["nonesuch"], ["commit"], ["commit", "--nonesuch", "x"], ["info", "--output", "xml", "x"], ["create", "-f"],
                                     ["check", "--repair", "some", "x"]], ids=" ".join)
def test_a_usage_error_begins_with_a_line_like_any_other(command):
    result = run_instar(*command)
    line, empty, *advice = result.stderr.splitlines()
    assert result.rc == (64 if command[0] == "check" else 2) and result.stdout == "", str(result)
    assert re.fullmatch(r"instar: .+ \(ERROR_BAD_USAGE\)", line) and empty == "", str(result)
    assert "For more information, try '--help'." in advice, str(result)


def test_without_a_command_the_help_comes_first():
    result = run_instar()
    assert result.rc == 2 and "Commands:" in result.stderr, str(result)
    assert result.stderr.endswith("instar: a command is missing: see `instar --help` (ERROR_BAD_USAGE)\n"), str(result)


# --- names that were probably meant -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["info", "-f", "qcow3", "x"], "qcow2"), (["create", "-f", "vmkd", "new", "1M"], "vmdk"),
     (["create", "-f", "qcow2", "-o", "comapt=v3", "new", "1M"], "compat"),
     (["create", "-f", "vmdk", "-o", "subfromat=streamOptimized", "new", "1M"], "subformat"),
     (["create", "-f", "vmdk", "-o", "subformat=monolithicsparse", "new", "1M"], "monolithicSparse"),
     (["create", "-f", "vhdx", "-o", "subformat=fixde", "new", "1M"], "fixed"),
     (["convert", "-O", "qcow2", "-o", "clutser_size=64k", "x", "new"], "cluster_size"),
     (["measure", "-O", "qcow2", "-o", "preallocation=ful", "--size", "1M"], "full"),
     (["convert", "-O", "raw", "-l", "befor-update", "x", "new"], "before-update"), (["explain", "NO_SPCAE"], "ERROR_NO_SPACE")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_the_nearest_name_is_said(tmp_path, arguments, near):
    support.create(tmp_path / "x", MIB)
    support.qemu_img("snapshot", "-c", "before-update", tmp_path / "x")
    result = run_instar(*arguments, cwd=tmp_path)
    assert result.rc in (1, 2) and result.stderr.count("\n") == 1, str(result)
    assert re.search(rf"the nearest one is {re.escape(near)}\b", result.stderr) and not (tmp_path / "new").exists(), str(result)


@pytest.mark.parametrize("option", ["nothing_like_it=1", "cluster_size=63k", "compat=v9"])
def test_what_is_far_away_was_not_meant(tmp_path, option):
    result = run_instar("create", "-f", "qcow2", "-o", option, "new", "1M", cwd=tmp_path)
    assert result.rc == 1 and "nearest" not in result.stderr, str(result)
