"""Confinement of the host process: in which order it happens, that it is in force while the guest runs, and that it
lets everything through that a commit may reach."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import support
from support import MIB

TOP = ["write -P 9 1M 2M"]


def has_landlock():
    """Whether the kernel has Landlock: the program says so itself."""
    result = support.run_instar("commit", "-v", "/absent")
    return "confinement: Landlock ABI" in result.stderr


def joined(lines):
    """Each call of a process in one piece, also where strace tells its end apart because another process made one meanwhile. It
    stands where it began; a restriction stands where it is in force."""
    calls, begun = [], {}
    for process, call in lines:
        end = re.match(r"<\.\.\. \w+ resumed>(.*)", call)
        if call.endswith("<unfinished ...>"):
            begun[process] = [process, call.removesuffix("<unfinished ...>").rstrip()]
            calls.append(begun[process])
        elif end and process in begun:
            entry = begun.pop(process)
            entry[1] += end[1]
            if re.match(rf"{FILTER}|{RESTRICT}", entry[1]):
                calls = [other for other in calls if other is not entry] + [entry]
        else:
            calls.append([process, call])
    return calls


@pytest.fixture
def strace(tmp_path):
    """Runs instar under strace; the calls in their order, without what is cut off, and without how a guest's process is
    started and what it does itself."""
    if shutil.which("strace") is None or support.run("strace", "-o", "/dev/null", "true").rc != 0:
        pytest.skip("strace is not installed, or may not trace")

    def run(*args):
        log = tmp_path / "strace"
        result = support.run("strace", "-f", "-qq", "-s", "4096", "-o", log, support.instar_binary(), *args)
        assert result.rc == 0, str(result)
        calls = joined(line.split(None, 1) for line in log.read_text(errors="replace").splitlines())
        guests = {process for process, call in calls if call.startswith("execve")} - {calls[0][0]}
        starts = "CLONE_VM|CLONE_VFORK"
        return [call for process, call in calls if process not in guests and starts not in call]

    return run


def where(calls, pattern, start=0):
    """The numbers of the calls that match."""
    return [number for number, call in enumerate(calls) if number >= start and re.match(pattern, call)]


# Their names, and what an old strace says.
RESTRICT = r"(landlock_restrict_self|syscall_0x1be)\("
FILTER = r"seccomp\(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, .* = 0"
OPEN = r"(open|openat|openat2|creat)\("
# The sandbox is there, and its guest runs: a virtual machine's, or that of another process, which gets an answer.
ACQUIRE, RUN = {
    "kvm": (rf'{OPEN}.*"/dev/kvm"', r"ioctl\(\d+, KVM_RUN"),
    "process": (r"memfd_create\(", r"sendto\("),
}[support.SANDBOX]
OUT = r"(clone|clone3|fork|vfork|execve|execveat|socket|connect|unlink|unlinkat|rename|renameat|renameat2|mkdir)\("


def test_order_of_a_commit(pair, strace):
    pair.make(4 * MIB, base=["write -P 1 0 4M"], top=TOP)
    calls = strace("commit", pair.top)

    opened = [n for n in where(calls, rf'{OPEN}.*"{re.escape(pair.top.name)}"') if "O_PATH" not in calls[n]]
    assert len(opened) == 1, "an image is opened once"
    descriptor = calls[opened[0]].rsplit("= ", 1)[1]
    reads = where(calls, rf"p?readv?(64)?\({descriptor}, ", opened[0])
    filters, runs = where(calls, FILTER), where(calls, RUN)
    assert len(filters) == 2 and reads and runs
    assert filters[0] < opened[0] < reads[0] < filters[1] < runs[0]
    if has_landlock():
        restricts = where(calls, RESTRICT)
        assert len(restricts) == 2
        assert restricts[0] < filters[0] and filters[0] < restricts[1] < filters[1]

    # What is needed from elsewhere is there before.
    assert where(calls, ACQUIRE)[-1] < filters[0]
    assert max(n for n in where(calls, OPEN) if "libinstar_plugin" in calls[n]) < filters[0]
    # From then on nothing leads out, and from the second step on nothing is opened.
    assert not where(calls, OUT, filters[0])
    assert not where(calls, OPEN, filters[1])
    assert not [call for call in calls[filters[0] :] if "PROT_EXEC" in call]


def test_threads_that_copy_are_confined_first(pair, strace):
    """Threads start before the process is confined, reach no file by themselves, and get the same filters."""
    pair.make(16 * MIB, top=["write -P 5 0 8M"])
    expected = support.content_hash(pair.top)
    calls = strace("commit", pair.top)
    started, filters = where(calls, r"(clone|clone3)\("), where(calls, FILTER)
    assert started and max(started) < filters[0] < filters[1]
    assert "CLONE_THREAD" in calls[started[0]]
    if has_landlock():
        # Each of the threads, and then the first one twice.
        restricts = where(calls, RESTRICT)
        assert len(restricts) == len([n for n in where(calls, r"(clone|clone3)\(")]) + 2
        assert len([n for n in restricts if n > filters[0]]) == 1
    writes = where(calls, r"pwrite64\(.*, 1048576, ")
    assert len(writes) == 8 and writes[0] > filters[1], "all of the data, by pieces, once nothing can be opened"
    assert support.content_hash(pair.base) == expected


def test_calls_of_several_processes_are_joined():
    begun, other = "seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, {len=9, filter=0x1}", 'openat(3, "a", O_PATH'
    lines = [["1", begun + " <unfinished ...>"], ["2", other + " <unfinished ...>"], ["2", "<... openat resumed>) = 4"],
             ["2", "close(4) = 0"], ["1", "<... seccomp resumed>) = 0"], ["1", "read(5 <unfinished ...>"]]
    assert joined(lines) == [["2", other + ") = 4"], ["2", "close(4) = 0"], ["1", begun + ") = 0"], ["1", "read(5"]]
    assert where([call for _, call in joined(lines)], FILTER) == [2]


@pytest.mark.parametrize("chain", [(), ("--backing-chain",)])
def test_order_of_info(pair, strace, chain):
    pair.make(4 * MIB, top=TOP)
    calls = strace("info", *chain, pair.top)
    [confined] = where(calls, FILTER)
    assert confined < where(calls, r'pread64\(.*"QFI')[0]
    assert not where(calls, OUT, confined)
    assert not where(calls, r"(pwrite|ftruncate|fallocate|ioctl\(\d+, KVM)", confined)
    opened = [n for n in where(calls, OPEN, confined) if "O_PATH" not in calls[n]]
    assert len(opened) == (2 if chain else 0)


def test_in_force_while_the_guest_runs(pair):
    """As the kernel sees it; a rate limit makes it last."""
    pair.make(4 * MIB, base=["write -P 1 0 4M"], top=TOP)
    child = subprocess.Popen([support.instar_binary(), "commit", "-p", "-r", "512k", pair.top], stderr=subprocess.PIPE)
    try:
        assert b"%" in child.stderr.readline()
        with open(f"/proc/{child.pid}/status") as file:
            status = dict(line.split(":", 1) for line in file.read().splitlines())
        threads = [path.read_text() for path in Path(f"/proc/{child.pid}/task").glob("*/comm")]
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=support.TIMEOUT)
    assert child.returncode == 1, "an interrupted commit ends with an error, also when it is confined"
    assert status["Seccomp"].split() == ["2"] and int(status["Seccomp_filters"]) >= 2
    assert status["NoNewPrivs"].split() == ["1"]
    # Landlock holds for the thread that asked for it. Those of the kernel's own, which KVM starts, do not count.
    assert [name for name in threads if not name.startswith("kvm")] == ["instar\n"]


def test_verbose(pair):
    pair.make(4 * MIB, top=TOP)
    result = support.commit(pair.top, "-v")
    lines = [line for line in result.stderr.splitlines() if line.startswith("instar: confinement")]
    assert len(lines) == 2, result.stderr
    for line in lines:
        assert re.search(r"(Landlock ABI \d+: paths|Landlock is not in force \(.+\))", line), line
        assert re.search(r"(seccomp: \d+ system calls$|seccomp is not in force \(.+\)$)", line), line


# --- what has to be within reach ------------------------------------------------------------------------


def make(directory, backing, base=None):
    """An overlay `top` in a directory, which records `backing`; that file is `base` if it is another name."""
    directory.mkdir(exist_ok=True)
    base = base or directory / backing
    base.parent.mkdir(parents=True, exist_ok=True)
    support.create(base, 4 * MIB)
    top = support.create(directory / "top", 4 * MIB, backing=str(backing), cwd=directory)
    support.qemu_io(top, *TOP)
    return top, base


def commits(base, *args, cwd=None):
    result = support.run_instar("commit", *args, cwd=cwd)
    assert result.rc == 0, str(result)
    support.qemu_io(base, "read -P 9 1M 2M")


def test_relative_paths(tmp_path):
    _, base = make(tmp_path / "images", "deep/base")
    commits(base, "images/top", cwd=tmp_path)


def test_in_the_working_directory(tmp_path):
    _, base = make(tmp_path / "images", "base")
    commits(base, "top", cwd=tmp_path / "images")


def test_an_overlay_behind_a_link(tmp_path):
    """The recorded name begins where the operator's does, as with qemu-img."""
    top, base = make(tmp_path / "images", "base")
    (tmp_path / "store").mkdir()
    top.rename(tmp_path / "store/top")
    top.symlink_to("../store/top")
    commits(base, top)


def test_a_directory_behind_a_link(tmp_path):
    _, base = make(tmp_path / "images", "base")
    (tmp_path / "link").symlink_to("images")
    commits(base, tmp_path / "link/top")


def test_a_backing_behind_a_link(tmp_path):
    top, base = make(tmp_path / "images", "base")
    base.rename(tmp_path / "images/real")
    base.symlink_to("real")
    commits(base, top)


@pytest.mark.parametrize("link", [False, True])
def test_an_allowed_directory(tmp_path, link):
    store = tmp_path / "store"
    top, base = make(tmp_path / "images", "../store/base", store / "base")
    allowed = store
    if link:
        allowed = tmp_path / "link"
        allowed.symlink_to("store")
        support.qemu_img("rebase", "-q", "-u", "-b", str(allowed / "base"), "-F", "qcow2", top)
    commits(base, "--allow-backing-dir", allowed, top)


@pytest.mark.parametrize("name", ["absolute", "relative", "link"])
def test_a_base_elsewhere_and_its_ancestors(tmp_path, name):
    """`-b` names the file: it is written, and its own backing, beside it, is read."""
    store = tmp_path / "store"
    top, base = make(tmp_path / "images", "../store/base", store / "base")
    support.create(store / "below", 4 * MIB)
    support.qemu_io(store / "below", "write -P 5 0 4M")
    support.qemu_img("rebase", "-q", "-u", "-b", "below", "-F", "qcow2", base)
    named = {"absolute": base, "relative": "../store/base", "link": store / "other"}[name]
    if name == "link":
        named.symlink_to("base")
    with support.untouched(store / "below"):
        commits(base, "-b", named, top)
    support.qemu_io(base, "read -P 5 0 1M")


def test_a_descriptor_as_a_name(tmp_path):
    top, base = make(tmp_path / "images", "base")
    with top.open("r+b") as file:
        done = subprocess.run(
            [support.instar_binary(), "commit", "-b", base, f"/proc/self/fd/{file.fileno()}"],
            pass_fds=[file.fileno()], capture_output=True, check=False,
        )
    # Where a relative name leads from there is not for this test: it is no failure of the confinement.
    assert b"Permission denied" not in done.stderr and done.returncode in (0, 1), done.stderr
