"""The two sandboxes: they do the same, each is chosen as it is documented, and the process of one may be lost.

These tests name the sandbox themselves, so that `make test` tries both, whatever SANDBOX says for all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import faults
import pytest
import support
import test_matrix
from support import MIB, SANDBOXES

SAMPLE = 60 if os.environ.get("INSTAR_DEEP") else 8
needs_kvm = pytest.mark.skipif(not support.KVM, reason="this machine has no /dev/kvm")
#: Those that work here: without KVM, the other one is still held against qemu-img.
HERE = [sandbox for sandbox in SANDBOXES if sandbox != "kvm" or support.KVM]
# What hides the device in a mount namespace of its own.
ABSENT, NO_DEVICE = "mount -t tmpfs none /dev", "mount --bind /dev/null /dev/kvm"
WITHOUT_KVM = [
    pytest.param(ABSENT, "ERROR_KVM_MISSING", id="absent"),
    pytest.param(NO_DEVICE, "ERROR_KVM_UNUSABLE", id="another device", marks=needs_kvm),
]


@pytest.fixture(autouse=True)
def built_in_defaults(monkeypatch):
    """What is configured for the other tests does not count."""
    monkeypatch.setenv("INSTAR_CONFIG", "")


def hidden(how, *args, **options):
    """Runs instar where there is no KVM."""
    become_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *become_root, "--mount", "sh", "-c", f'{how} && exec "$0" "$@"']
    return support.run(*command, support.instar_binary(), *args, **options)


def files_of(directory):
    return {path.name: support.digest(path) for path in sorted(directory.iterdir())}


# --- both do the same -------------------------------------------------------------------------------------------------


def commit_with_each(images, top, base, formats, args, place, by_qemu=True):
    """Commits copies with each sandbox and with qemu-img: equal files, and equal content."""
    copies = {name: shutil.copytree(images, place / name) for name in (*HERE, "qemu")}
    said = {}
    for sandbox in HERE:
        result = support.run_instar("commit", "--output", "json", "--sandbox", sandbox, *args, top, cwd=copies[sandbox])
        assert result.rc == 0, str(result)
        said[sandbox] = result.json
        assert said[sandbox].pop("sandbox") == sandbox
        said[sandbox] = json.dumps(said[sandbox]).replace(f"/{sandbox}/", "/")
    for sandbox in HERE:
        assert said[sandbox] == said["process"]
        assert files_of(copies[sandbox]) == files_of(copies["process"])
    assert files_of(copies["process"])[base] != support.digest(images / base), "nothing was committed"
    top_fmt, base_fmt = formats
    if not by_qemu:
        # What is as large as its backing, or larger, shows there whole afterwards.
        support.assert_same_content(copies["process"] / base, images / top, base_fmt, top_fmt)
    else:
        theirs = ["-b", base] if "-b" in args else []
        support.qemu_img("commit", "-q", *theirs, "-f", top_fmt, top, cwd=copies["qemu"])
        support.assert_same_content(copies["process"] / base, copies["qemu"] / base, base_fmt, base_fmt)
    support.assert_same_content(copies["process"] / top, images / top, top_fmt, top_fmt)


@pytest.mark.parametrize("seed", range(SAMPLE))
def test_drawn_chains_become_the_same_files(tmp_path, seed):
    images = tmp_path / "images"
    images.mkdir()
    for command in test_matrix.plan(seed):
        made = support.run(*command, cwd=images)
        assert made.rc == 0, str(made)
    base = test_matrix.base_name(seed)
    fmt = base.rpartition(".")[2]
    grows = support.virtual_size(images / "top.qcow2") > support.virtual_size(images / base, fmt)
    args = ["--resize-backing"] if grows else []
    commit_with_each(images, "top.qcow2", base, ("qcow2", fmt), args, tmp_path)


# Those that leave an overlay: it is compared as well.
@pytest.mark.parametrize("make", [case for case in faults.CASES if case not in (faults.removed, faults.wiped_and_removed)], ids=lambda make: make.__name__)
def test_every_kind_of_chain_becomes_the_same_files(tmp_path, make):
    """Compressed clusters, growth, raw, vmdk, several layers, several threads."""
    (tmp_path / "images").mkdir()
    case = make(tmp_path / "images")
    for path in case.directory.iterdir():
        if path not in case.files():
            path.unlink()
    # QEMU lets no VHD, VHDX and Parallels image grow, and writes the table of a delta disk of ESX over its header.
    by_qemu = make not in (faults.into_vpc, faults.into_vhdx, faults.into_parallels, faults.delta)
    formats = (case.top_fmt, case.base_fmt)
    commit_with_each(case.directory, case.top, case.base, formats, case.args, tmp_path, by_qemu)


@needs_kvm
def test_what_only_reads_says_the_same(pair):
    pair.make(4 * MIB, base=["write -P 1 0 2M"], top=["write -P 9 1M 2M", "write -z 3M 64k"])
    flat = support.flatten(pair.top, pair.dir / "flat.qcow2")
    leaky = support.copy(pair.top, pair.dir / "leaky.qcow2")
    with leaky.open("ab") as file:
        file.write(b"x" * 65536)
    commands = {
        "check": ["check", leaky],
        "map": ["map", pair.top],
        "compare": ["compare", pair.top, pair.base],
        "compare, equal": ["compare", pair.top, flat],
        "measure": ["measure", "-O", "qcow2", pair.top],
    }
    for what, command in commands.items():
        for output in ([], ["--output", "json"]):
            results = [support.run_instar(command[0], "--sandbox", sandbox, *output, *command[1:]) for sandbox in SANDBOXES]
            kvm, process = results
            assert (kvm.rc, kvm.stderr) == (process.rc, process.stderr) and kvm.rc in (0, 1, 3) and kvm.stdout, str(results)
            if output and isinstance(kvm.json, dict):
                assert kvm.json["sandbox"] == "kvm", what
                assert {**kvm.json, "sandbox": "process"} == process.json, what
            else:
                assert kvm.stdout == process.stdout, what


# --- which one is used ------------------------------------------------------------------------------------------------


def used(result):
    """The sandbox that a commit with `-v` says that it used."""
    assert result.rc == 0, str(result)
    return re.search(r"guest: sandbox (\w+), ring 3, [1-9]\d* exits", result.stderr)[1]


@needs_kvm
def test_auto_takes_kvm_where_it_works(pair):
    pair.make(top=["write -P 9 0 64k"])
    assert used(support.run_instar("commit", "-v", "--sandbox", "auto", pair.top)) == "kvm"
    assert support.run_instar("check", "--output", "json", "--sandbox", "auto", pair.top).json["sandbox"] == "kvm"


@pytest.mark.parametrize(("how", "code"), WITHOUT_KVM)
def test_auto_takes_the_process_where_kvm_does_not_work(pair, how, code):
    pair.make(top=["write -P 9 0 64k"])
    assert hidden(how, "commit", pair.top, "--output", "json").error["name"] == code
    assert used(hidden(how, "commit", "-v", "--sandbox", "auto", pair.top)) == "process"
    support.qemu_io(pair.base, "read -P 9 0 64k")
    assert hidden(how, "check", "--output", "json", "--sandbox", "auto", pair.top).json["sandbox"] == "process"


@pytest.mark.parametrize(("how", "code"), WITHOUT_KVM)
def test_without_kvm_the_way_out_is_named(pair, how, code):
    """The weaker sandbox is never taken silently; what the message says of it, and that it works."""
    pair.make(top=["write -P 9 0 64k"])
    for option in ([], ["--sandbox", "kvm"]):
        with support.untouched(pair.top, pair.base):
            result = hidden(how, "commit", *option, pair.top)
        assert result.rc == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1, str(result)
        assert result.stderr.endswith(f" ({code})\n"), str(result)
        advice, weaker = re.search(r"use `(--sandbox process)`, which needs no KVM and is weaker: (.+) \(", result.stderr).groups()
        assert "seccomp" in weaker, result.stderr
    assert used(hidden(how, "commit", "-v", *advice.split(), pair.top)) == "process"
    support.qemu_io(pair.base, "read -P 9 0 64k")


def test_a_configured_sandbox(pair, tmp_path):
    """The file counts, an option counts more, and `instar config` says where the value comes from."""
    pair.make(top=["write -P 9 0 64k"])
    config = tmp_path / "config.toml"
    config.write_text('sandbox = "process"\n')
    config.chmod(0o644)
    env = {"INSTAR_CONFIG": str(config)}

    def configured(*args, **more):
        answer = support.run_instar("config", "--output", "json", *args, **more).json["sandbox"]
        return answer["name"], answer["from"]

    assert configured() == ("kvm", "built in")
    assert configured(env=env) == ("process", str(config))
    assert configured("--sandbox", "auto", env=env) == ("auto", "--sandbox")
    assert f"process (from {config})" in support.run_instar("config", env=env).stdout
    if support.KVM:
        assert used(support.run_instar("commit", "-v", "--sandbox", "kvm", pair.top, env=env)) == "kvm"
    assert used(support.run_instar("commit", "-v", pair.top, env=env)) == "process"
    assert used(hidden(ABSENT, "commit", "-v", pair.top, env=env)) == "process"
    config.write_text('sandbox = "container"\n')
    wrong = support.run_instar("commit", pair.top, env=env)
    assert wrong.rc == 1 and str(config) in wrong.stderr and "kvm, process or auto" in wrong.stderr, str(wrong)


@pytest.mark.parametrize(
    ("wanted", "kvm", "state", "rc"),
    [(None, "broken", "broken", 1), ("kvm", "broken", "broken", 1), ("process", "unneeded", "ok", 0), ("auto", "weak", "weak", 0)],
)
def test_the_doctor_tries_both_and_goes_by_the_one_that_is_wanted(tmp_path, wanted, kvm, state, rc):
    config = tmp_path / "config.toml"
    config.write_text("" if wanted is None else f'sandbox = "{wanted}"\n')
    config.chmod(0o644)
    by_option = [] if wanted is None else ["--sandbox", wanted]
    for options, env in (([], {"INSTAR_CONFIG": str(config)}), (by_option, {})):
        result = hidden(ABSENT, "doctor", "--output", "json", *options, env=env)
        parts = {part["part"]: part for part in result.json["parts"] if part["part"] in SANDBOXES}
        assert (result.rc, result.json["state"]) == (rc, state), str(result)
        assert (parts["kvm"]["state"], parts["process"]["state"]) == (kvm, "ok"), str(result)
        assert result.json["sandbox"] == (None if rc else "process"), str(result)
        assert parts["kvm"]["remedy"] and "ring 3" in parts["process"]["found"]


# --- the process of the sandbox -----------------------------------------------------------------------------------------


def children(parent):
    """The processes of this parent, and the state of each."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name may hold anything, and ends at the last parenthesis.
            state, ppid = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(ppid) == parent:
                found[int(stat.parent.name)] = state
    return found


@contextlib.contextmanager
def none_left_behind(but=0):
    """Whatever loses its parent meanwhile becomes a child of this process: so many, and they have ended."""
    subreaper = ctypes.CDLL(None, use_errno=True).prctl
    before = children(os.getpid())
    assert subreaper(36, 1, 0, 0, 0) == 0, "PR_SET_CHILD_SUBREAPER"
    try:
        yield
        left = lambda: {pid: state for pid, state in children(os.getpid()).items() if pid not in before}  # noqa: E731
        deadline = time.monotonic() + 2
        while any(state != "Z" for state in left().values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        orphans = left()
        for pid in orphans:
            os.waitpid(pid, os.WNOHANG)
        assert len(orphans) == but and set(orphans.values()) <= {"Z"}, orphans
    finally:
        subreaper(36, 0, 0, 0, 0)


def mind_signals():
    """Tests that were started by `nohup`, or in the background of a script, pass on that they ignore these."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Slow:
    """A commit in the process sandbox that takes some seconds, and is in the middle of writing."""

    def __init__(self, pair, *options):
        # More runs of data than a ring takes at once.
        writes = [f"write -P {1 + n % 250} {n * 8}k 4k" for n in range(800)]
        small = {"cluster_size": "4k"}
        pair.make(8 * MIB, base=["write -P 255 0 8M"], top=writes, base_options=small, top_options=small)
        self.pair, self.expected = pair, support.content_hash(pair.top)
        command = [support.instar_binary(), "commit", "--sandbox", "process", "-p", "-r", "1M", *options, pair.top]
        self.host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     start_new_session=True, preexec_fn=mind_signals)
        line = self.host.stderr.readline()
        assert b"%" in line, line
        [self.guest] = children(self.host.pid)

    def end(self):
        """Its exit status, and the lines that it said besides its progress; the seconds that it took."""
        begin = time.monotonic()
        try:
            out, err = self.host.communicate(timeout=support.TIMEOUT)
        finally:
            self.host.kill()
        assert out == b"", out
        lines = [line for line in re.split(r"[\r\n]+", err.decode()) if line and "%" not in line]
        return self.host.returncode, lines, time.monotonic() - begin

    def is_finished_by_another_run(self):
        """The images are what an interruption may leave, and the next commit does the rest."""
        top, base = self.pair.top, self.pair.base
        assert support.content_hash(top) == self.expected, "the overlay reads differently"
        assert support.content_hash(base) != self.expected, "it was over before"
        for path in (top, base):
            # Leaks are allowed.
            assert support.qemu_img("check", path, rc=None).rc in (0, 3), path
        support.commit(top, "--sandbox", "process")
        for path in (top, base):
            assert support.content_hash(path) == self.expected, path
            support.assert_clean(path)
        assert support.holds_no_clusters(top)


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "ended from outside (signal 9)"), (signal.SIGSTOP, "was stopped from outside")],
    ids=["KILL", "STOP"],
)
def test_a_guest_that_is_lost(pair, number, words):
    """One line with the reason, at a safe point; nothing is lost."""
    with none_left_behind():
        slow = Slow(pair)
        os.kill(slow.guest, number)
        status, lines, seconds = slow.end()
    assert status == 1 and len(lines) == 1, lines
    assert lines[0].startswith("instar: ") and words in lines[0] and lines[0].endswith(" (ERROR_SANDBOX_LOST)"), lines
    assert seconds < 30, "it waited for nothing"
    slow.is_finished_by_another_run()


def test_other_signals_do_not_reach_a_guest(pair):
    with none_left_behind():
        slow = Slow(pair)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM):
            os.kill(slow.guest, number)
        out, err = slow.host.communicate(timeout=support.TIMEOUT)
    assert slow.host.returncode == 0 and out == b"Image committed.\n", err
    assert support.content_hash(pair.base) == slow.expected


def test_a_stop_of_both_is_no_loss(pair):
    """Job control: the terminal stops the whole group, and continues it much later."""
    with none_left_behind():
        slow = Slow(pair)
        os.killpg(slow.host.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(slow.host.pid, signal.SIGCONT)
        out, err = slow.host.communicate(timeout=support.TIMEOUT)
    assert slow.host.returncode == 0, err
    assert support.content_hash(pair.base) == slow.expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
def test_a_signal_to_the_group_ends_it_at_a_safe_point(pair, number):
    """As a terminal does it: the guest gets it as well, which is no reason for another message."""
    with none_left_behind():
        slow = Slow(pair)
        os.killpg(slow.host.pid, number)
        status, lines, _ = slow.end()
    assert status == 1 and len(lines) == 1 and lines[0].endswith(" (ERROR_INTERRUPTED)"), lines
    slow.is_finished_by_another_run()


def test_a_guest_dies_with_its_host(pair):
    with none_left_behind(but=1):
        slow = Slow(pair)
        slow.host.kill()
        slow.host.communicate(timeout=support.TIMEOUT)
    slow.is_finished_by_another_run()


@pytest.mark.parametrize("command", ["commit", "check", "map", "compare", "measure", "doctor"])
def test_no_child_is_left(pair, command):
    pair.make(4 * MIB, top=["write -P 9 1M 2M"])
    images = {"compare": [pair.top, pair.base], "measure": ["-O", "raw", pair.top], "doctor": []}
    with none_left_behind():
        result = support.run_instar(command, "--sandbox", "process", *images.get(command, [pair.top]))
    assert result.rc in (0, 1) and result.stdout, str(result)


def test_no_child_is_left_by_a_refusal(pair):
    """The process is there before the images are looked at."""
    pair.make(4 * MIB, top=["write -P 9 1M 2M"])
    pair.base.write_bytes(b"this is no image")
    with none_left_behind(), support.untouched(pair.top, pair.base):
        result = support.run_instar("commit", "--sandbox", "process", pair.top)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
