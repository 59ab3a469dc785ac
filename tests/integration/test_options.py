"""`-p`, `-r` and `-t` of `instar commit`."""

from __future__ import annotations

import os
import pty
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import support
from support import KIB, MIB, refuse

TOP = ["write -P 9 1M 6M", "write -z 8M 1M", "write -c -P 3 10M 64k", "write -P 4 700k 3k"]


@pytest.fixture
def made(pair):
    return pair.make(16 * MIB, base=["write -P 1 0 16M"], top=TOP)


# --- progress ---------------------------------------------------------------------------------------


def test_progress_as_lines(made):
    result = made.check_commit("-p")
    lines = result.stderr.splitlines()
    assert result.stdout == "Image committed.\n"
    total = 7 * MIB + 128 * KIB
    begin, end = lines.index("instar: emptying the overlay"), len(lines) - 1
    assert percents(lines[:begin], "", total)[-1] == 100, lines
    emptied = percents(lines[begin + 1 : end], "emptying the overlay: ", made.top.stat().st_size, exact=False)
    assert emptied and emptied[-1] == 100, lines
    assert lines[end] == "instar: done"


def percents(lines, what, total, exact=True):
    """The percentages of progress lines: each is the true one rounded down, and more than the one before."""
    shown = []
    for line in lines:
        if re.fullmatch(rf"instar: {what}99 % \(all \d+ bytes have moved: finishing\)", line):
            continue
        percent, done, of = map(int, re.fullmatch(rf"instar: {what}(\d+) % \((\d+) of (\d+) bytes(?:, [\d.]+ \w+ of [\d.]+ \w+)?\)", line).groups())
        assert percent == done * 100 // of and (of == total or not exact), line
        shown.append(percent)
    assert shown == sorted(set(shown)), shown
    return shown


def test_progress_of_a_commit_for_which_there_is_no_room(pair, tmp_path):
    """Nothing is said to be done that a full disk then breaks: what a line counts is in the file."""
    fits = 8 * MIB
    start = support.FILE_LIMIT - fits
    pair.make(96 * MIB, base_options={"preallocation": "metadata"},
              top=[f"write -P {1 + n} {start + n * MIB} 1M" for n in range(32)])
    script = f"ulimit -f {support.FILE_LIMIT // KIB}; exec {support.instar_binary()} commit -p -r 16M {pair.top}"
    result = support.run("bash", "-c", script)
    lines = result.stderr.splitlines()
    assert result.rc == 1 and result.stdout == "", str(result)
    assert "100 %" not in result.stderr and lines[-1].endswith("(ERROR_BACKING_IO)"), str(result)
    stopped, done = map(int, re.fullmatch(r"instar: stopped at (\d+) % \((\d+) of \d+ bytes(?:, [^)]*)?\)", lines[-2]).groups())
    assert stopped < 30 and done <= fits


def test_a_dry_run_makes_no_progress(made):
    with support.untouched(made.top, made.base):
        result = support.commit(made.top, "-p", "--dry-run")
    assert result.stderr == "instar: done: a dry run writes nothing\n"


def test_a_refused_commit_makes_no_progress(made):
    with support.untouched(made.top, made.base):
        result = support.run_instar("commit", "-p", "-f", "vmdk", made.top)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1 and "%" not in result.stderr, str(result)


def test_progress_and_json(made):
    result = support.commit(made.top, "--progress", "--output", "json")
    assert result.json["bytes_committed"] == 7 * MIB + 128 * KIB and "100 %" in result.stderr


def test_quiet_wins(made):
    result = support.commit(made.top, "-p", "-q")
    assert (result.stdout, result.stderr) == ("", "")


def test_nothing_to_commit(pair):
    pair.make()
    result = support.commit(pair.top, "-p")
    lines = result.stderr.splitlines()
    assert lines[0] == "instar: emptying the overlay" and lines[-1] == "instar: done" and "of 0 bytes" not in result.stderr
    assert support.commit(pair.top, "-p", "-d").stderr == "instar: done\n"


def terminal(*args):
    """Runs instar with a terminal as stderr; the exit status, stdout, and what the terminal got."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen([support.instar_binary(), *args], stdout=subprocess.PIPE, stderr=theirs,
                             env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    got = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        got += piece
    os.close(ours)
    out = child.communicate()[0]
    return child.returncode, out.decode(), got.decode()


def test_progress_as_a_bar(made):
    rc, out, shown = terminal("commit", "-p", "-r", "20M", made.top)
    assert (rc, out) == (0, "Image committed.\n"), shown
    assert "100%" in shown and "done" in shown and "\r" in shown
    assert "7.12 MiB/7.12 MiB" in shown


def test_a_bar_goes_before_an_error(made):
    damaged = made.top.read_bytes()
    made.top.write_bytes(damaged[: len(damaged) // 2])
    rc, out, shown = terminal("commit", "-p", made.top)
    assert (rc, out) == (1, "")
    assert shown.count("\n") == 1 and "ERROR" not in out and str(made.top) in shown


# --- rate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["100M", "0", "1.5G", "52428800"])
def test_limited(made, rate):
    made.check_commit("-r", rate)


def test_a_limit_is_kept(made):
    """Never faster; how much slower a machine is says nothing."""
    begin = time.monotonic()
    made.check_commit("--rate-limit=4M")
    assert time.monotonic() - begin >= 6 / 4


def test_a_pause_can_be_interrupted(made):
    before = support.flatten(made.top, made.dir.parent / "before")
    child = subprocess.Popen([support.instar_binary(), "commit", "-r", "64k", made.top], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    # It has begun to write as soon as the backing is another one.
    began = made.base.stat().st_mtime_ns
    while made.base.stat().st_mtime_ns == began and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    out, error = child.communicate(timeout=20)
    assert (child.returncode, out) == (1, "") and "again" in error, error
    support.assert_same_content(made.top, before)
    support.assert_clean(made.top)
    support.commit(made.top)
    support.assert_same_content(made.top, before)
    assert support.holds_no_clusters(made.top)


@pytest.mark.parametrize("rate", ["", "fast", "-1", "1.5", "1Q", "9E9"])
def test_rates_that_are_none(made, rate):
    with support.untouched(made.top, made.base):
        result = support.run_instar("commit", f"--rate-limit={rate}", made.top)
    assert result.rc == 2 and "rate-limit" in result.stderr, str(result)


# --- cache ------------------------------------------------------------------------------------------


def calls(made, *options):
    """The system calls of a commit that concern durability."""
    trace = made.dir.parent / "trace"
    wanted = "fdatasync,fsync,sync_file_range,pwritev,copy_file_range,fallocate,ftruncate"
    argv = ["strace", "-f", "-e", f"trace={wanted}", "-o", trace, support.instar_binary(), "commit", *options, made.top]
    result = support.run(*argv)
    assert result.rc == 0, str(result)
    return [found[1] for line in trace.read_text().splitlines() if (found := re.search(r"\b(\w+)\(\d+", line))]


@pytest.mark.parametrize("mode", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_modes(made, mode):
    made.check_commit("-t", mode)


@pytest.mark.parametrize("mode", ["none", "directsync"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_direct_modes(pair, mode, cluster_size):
    """Small clusters, compressed ones, an odd end of a raw file: nothing of it is aligned."""
    pair.make(4 * MIB, base_options={"cluster_size": cluster_size}, base=["write -P 1 0 1M", "write -c -P 3 3M 64k"],
              top_options={"cluster_size": cluster_size},
              top=[f"write -c -P 9 2M {cluster_size}", "write -P 8 512 1k", "write -z 512k 128k", "write -P 7 3145k 1k"])
    pair.check_commit("-t", mode)


def test_direct_modes_into_raw(pair):
    content = random.Random(5).randbytes(1_000_001)
    for mode in ("none", "directsync"):
        base, top = pair.dir / f"{mode}.raw", pair.dir / f"{mode}.qcow2"
        base.write_bytes(content)
        support.create(top, backing=base.name, backing_fmt="raw", cluster_size=512)
        support.qemu_io(top, "write -P 9 512 5k", "write -P 7 700k 100k", "write -z 900k 3k")
        result = support.commit(top, "-b", base, "-t", mode)
        wanted = bytearray(content)
        for start, length, byte in ((512, 5 * KIB, 9), (700 * KIB, 100 * KIB, 7), (900 * KIB, 3 * KIB, 0)):
            wanted[start : start + length] = bytes([byte]) * length
        assert base.read_bytes() == bytes(wanted), str(result)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which shows the system calls, is not installed")
@pytest.mark.parametrize("mode", ["none", "directsync", "writeback"])
def test_the_page_cache_is_passed_by(made, mode):
    trace = made.dir.parent / "trace"
    result = support.run("strace", "-f", "-e", "trace=fcntl", "-o", trace, support.instar_binary(), "commit", "-t", mode, made.top)
    assert result.rc == 0, str(result)
    switched = [line for line in trace.read_text().splitlines() if "F_SETFL" in line and "O_DIRECT" in line]
    assert (len(switched) >= 2) == (mode != "writeback")


def test_a_file_system_without_direct_io(made):
    """A tmpfs knows it since Linux 6.6: before, the mode is refused by name, as qemu-img does."""
    directory = Path("/dev/shm") / f"instar-{os.getpid()}"
    directory.mkdir()
    try:
        base = support.copy(made.base, directory / made.base.name)
        top = support.copy(made.top, directory / made.top.name)
        theirs = support.qemu_img("commit", "-t", "none", top, rc=None) if not direct_works(base) else None
        if theirs is None:
            support.commit(top, "-t", "none")
        else:
            assert theirs.rc == 1
            refuse("ERROR_OPEN_FAILED", top, "-t", "none", files=[base], mentions=["O_DIRECT", "-t writeback"])
    finally:
        shutil.rmtree(directory)


def direct_works(path):
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace, which shows the system calls, is not installed")
def test_what_is_synchronised(made):
    copies = {mode: made.dir / f"{mode}.qcow2" for mode in ("writeback", "writethrough", "unsafe")}
    found = {}
    for mode, copy in copies.items():
        support.copy(made.base, copy)
        pair_top = made.dir / f"{mode}-top.qcow2"
        support.create(pair_top, backing=copy.name)
        support.qemu_io(pair_top, *TOP)
        made.top = pair_top
        found[mode] = calls(made, "-t", mode)
    assert "fdatasync" not in found["unsafe"] and "pwritev" in found["unsafe"]
    assert found["writeback"].count("fdatasync") >= 4
    # Every change is followed by a flush of its own.
    changes = [call for call in found["writethrough"]]
    assert all(after == "fdatasync" for call, after in zip(changes, changes[1:]) if call == "pwritev")
    assert changes[-1] == "fdatasync"


def test_a_mode_that_is_none(made):
    with support.untouched(made.top, made.base):
        result = support.run_instar("commit", "-t", "bogus", made.top)
    assert result.rc == 2 and "bogus" in result.stderr


# --- directories that are named -----------------------------------------------------------------------


def test_a_plugin_directory_that_cannot_be_used(pair, tmp_path):
    """To go on without it would be to go on with other plugins than those that were asked for."""
    pair.make(top=["write -P 1 0 64k"])
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for directory, says in ((tmp_path / "absent", "does not exist"), (open_to_all, "no plugin is loaded from it")):
        refuse("ERROR_PLUGIN_UNAVAILABLE", pair.top, "--plugin-dir", directory, mentions=[directory, says])
        for command in (["check", pair.top], ["map", pair.top], ["info", pair.top], ["create", pair.dir / "new", "1M"]):
            result = support.run_instar(*command, "--plugin-dir", directory)
            assert result.rc == 1 and says in result.stderr, str(result)
    assert not (pair.dir / "new").exists()


def test_directories_are_refused_in_the_same_words(pair, tmp_path):
    pair.make(top=["write -P 1 0 64k"])
    for path, says in ((tmp_path / "absent", "the directory does not exist"), (pair.base, "cannot open the directory: Not a directory")):
        for option, begins, code in (("--plugin-dir", "no plugin is loaded from it", "ERROR_PLUGIN_UNAVAILABLE"),
                                     ("--allow-backing-dir", "no backing is allowed in it", "ERROR_WRITE_TARGET_NOT_ALLOWED")):
            refuse(code, pair.top, option, path, mentions=[f"'{path}': {begins}: {says}"])


def test_the_last_line_on_a_terminal_says_how_it_ended(made):
    """A bar that stops looks like one that is done."""
    def said(*options):
        command = [support.instar_binary(), "commit", "-p", *options, made.top]
        main, side = pty.openpty()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=side)
        if "-r" in options:
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=support.TIMEOUT)
        os.close(side)
        text = b""
        while chunk := _read(main):
            text += chunk
        os.close(main)
        return text.decode()

    assert re.search(r"instar: stopped at \d+ % \(\d+ of \d+ bytes, [^)]+\)", said("-r", "1M"))
    assert "instar: done: a dry run" in said("--dry-run")
    assert said().rstrip().endswith("instar: done")


def _read(terminal):
    """What a terminal has to read; nothing once the other side is closed."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""
