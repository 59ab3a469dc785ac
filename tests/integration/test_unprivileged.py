"""The process sandbox where it is needed: for ordinary users, in containers, and within tight limits.

What a container engine does is done here without one: `tests/tools/container.py`, under the system calls that Docker's and
Kubernetes' default profiles allow.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path

import allowed_calls
import container
import pytest
import schemas
import support
from inside import Inside, ORDINARY
from support import BUNDLED, KIB, MIB

NOBODY = 65534


@pytest.fixture
def inside():
    with Inside.make() as made:
        yield made


def answer(result, command="commit"):
    """What a command prints as JSON on success; its published schema has to allow it."""
    assert result.rc == 0, str(result)
    return schemas.insist(command, json.loads(result.stdout))


def doctor(inside, *arguments, options=()):
    """What the doctor says of the process sandbox."""
    result = inside.run("doctor", "--output", "json", "--sandbox", "process", *arguments, options=options)
    [part] = [part for part in json.loads(result.stdout)["parts"] if part["part"] == "process"]
    return result.rc, part


PROCESS = ["--sandbox", "process", "--output", "json", "top.qcow2"]


def assert_committed(inside, options=()):
    assert answer(inside.run("commit", *PROCESS, options=options))["sandbox"] == "process"
    inside.assert_committed()


def assert_unusable(inside, *mentions, options=(), name="ERROR_SANDBOX_UNUSABLE"):
    """The sandbox cannot be used, or what it would load, the error says why, and nothing has changed."""
    with support.untouched(inside.base, inside.top):
        result = inside.run("commit", *PROCESS, options=options)
    assert (result.rc, result.stdout) == (1, ""), str(result)
    error = support.error_of(result.stderr)
    assert error["name"] == name, str(result)
    for mention in [*mentions, "instar doctor", "nothing was changed"] if name == "ERROR_SANDBOX_UNUSABLE" else mentions:
        assert mention in error["message"], str(result)


@pytest.mark.parametrize(
    ("profile", "proc"), [("docker", []), ("docker", ["--proc"]), ("containerd", []), ("containerd-old", ["--proc"])],
    ids=["docker", "docker-proc", "containerd", "containerd-old-proc"])
def test_in_a_container(inside, profile, proc):
    """Number 1, read-only root, no /dev/kvm, nothing executable in /tmp, no capabilities, the system calls of an engine."""
    options = ["--list", profile, *proc]
    with support.untouched(inside.base, inside.top):
        refused = inside.run("commit", "top.qcow2", options=options)
    assert refused.rc == 1 and "--sandbox process" in refused.stderr, str(refused)
    assert_committed(inside, options)
    status, part = doctor(inside, options=options)
    assert status == 0 and part["state"] == "ok" and "ring 3" in part["found"]


@pytest.mark.parametrize("profile", ["docker", "containerd", "containerd-old"])
def test_workers_and_every_command_in_a_container(inside, profile):
    """Whatever a command asks of the kernel is in the list, or not missed: nothing fails, and nothing is done by fewer processors."""
    # Enough that shrinks for more processors to be used (test_workers.py).
    rng = random.Random(7)
    data = b"".join(rng.randbytes(32 * KIB) + bytes(32 * KIB) for _ in range(80 * MIB // (64 * KIB)))
    (inside.images / "disk.raw").write_bytes(data)

    def run(command, *arguments):
        result = inside.run(command, "--sandbox", "process", *arguments, options=["--list", profile])
        assert result.rc == 0, str(result)
        return result.stderr

    packed = run("convert", "-v", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "large.qcow2")
    unpacked = run("convert", "-v", "-O", "raw", "large.qcow2", "copy.raw")
    processors = len(os.sched_getaffinity(0))
    for said in (packed, unpacked):
        assert "guest: sandbox process, ring 3" in said, said
        used = int(re.search(r"guest: (\d+) processors?", said)[1])
        assert used > 1 or processors == 1, said
    assert (inside.images / "copy.raw").read_bytes() == data
    created = inside.run("create", "-f", "qcow2", "-b", "large.qcow2", "-F", "qcow2", "over.qcow2", options=["--list", profile])
    assert created.rc == 0, str(created)
    run("compare", "over.qcow2", "large.qcow2")
    run("resize", "over.qcow2", "+1M")
    run("check", "-r", "all", "over.qcow2")
    run("measure", "-O", "qcow2", "over.qcow2")
    run("rebase", "-b", "", "over.qcow2")
    for options in (["--atomic"], ["--digest"], ["--verify"], ["--delete-overlay"]):
        support.qemu_io(inside.top, f"write -P {len(options[0])} 2M 1M")
        inside.before = support.content_hash(inside.top)
        run("commit", *options, "top.qcow2")
        assert support.content_hash(inside.base) == inside.before
        support.assert_clean(inside.base)
    assert not inside.top.exists()


def test_auto_takes_the_process_where_there_is_no_kvm(inside):
    assert answer(inside.run("commit", "--sandbox", "auto", "--output", "json", "top.qcow2"))["sandbox"] == "process"
    inside.assert_committed()


def test_all_commands_that_run_a_guest(inside):
    size, mapped = 4 * MIB, 0
    for extent in json.loads(inside.run("map", *PROCESS).stdout):
        mapped += extent["length"]
    assert mapped == size
    assert json.loads(inside.run("check", *PROCESS).stdout)["check-errors"] == 0
    same = inside.run("compare", "--sandbox", "process", "top.qcow2", "top.qcow2")
    other = inside.run("compare", "--sandbox", "process", "base.qcow2", "top.qcow2")
    assert (same.rc, other.rc) == (0, 1) and "mismatch at offset 1048576" in other.stdout, f"{same}{other}"
    assert answer(inside.run("measure", "--commit", *PROCESS), "measure")["sandbox"] == "process"


def test_an_ordinary_user_on_a_machine(inside):
    """nobody, without groups and without any new privileges, with a home and a configuration of its own."""
    home = inside.root / "home"
    (home / ".config/instar").mkdir(parents=True)
    config = home / ".config/instar/config.toml"
    config.write_text('sandbox = "process"\n')
    for path in [home, home / ".config", home / ".config/instar", config]:
        if not ORDINARY:
            os.chown(path, NOBODY, NOBODY)
    inside.own(NOBODY)
    become = [] if ORDINARY else ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    result = support.run(
        *become, "env", "-u", "INSTAR_CONFIG", "-u", "XDG_CONFIG_HOME", f"HOME={home}",
        inside.root / "usr/bin/instar", "commit", "--output", "json", inside.top,
    )
    assert answer(result)["sandbox"] == "process"
    inside.assert_committed()


LIMITS = [
    ("NPROC=1", "NPROC=2", "starting a process"),
    ("AS=50331648", "AS=100663296", "mapping the guest's memory"),
    ("FSIZE=66060288", "FSIZE=67108864", "file in memory"),
    # Each plugin keeps the descriptor that it was loaded by.
    (f"NOFILE={10 + len(BUNDLED)}", f"NOFILE={16 + len(BUNDLED)}", "Too many open files"),
]


@pytest.mark.parametrize(
    ("too_little", "enough", "why"), LIMITS,
    ids=["processes", "address space", "file sizes", "descriptors"])
def test_limits(inside, too_little, enough, why):
    """A limit that is too low is named by what failed, and the doctor's advice is to raise it."""
    # A user of its own: processes of other tests count as well.
    user = 61_000 + os.getpid() % 4000
    inside.own(user)
    options = ["--user", str(user), "--limit", too_little]
    if not (ORDINARY and too_little.startswith("NPROC")):
        # The sandbox has its descriptors before the plugins are loaded, so these are what lacks them.
        name = "ERROR_PLUGIN_UNAVAILABLE" if too_little.startswith("NOFILE") else "ERROR_SANDBOX_UNUSABLE"
        assert_unusable(inside, why, options=options, name=name)
        if not too_little.startswith("NOFILE"):
            status, part = doctor(inside, options=options)
            assert status == 1 and part["state"] == "broken" and "raise the limits" in part["remedy"]
    assert_committed(inside, ["--user", str(user), "--limit", enough])


def test_few_descriptors_are_no_fault_of_an_image(inside):
    """Whatever cannot be opened first: no plugin is left out, by which an image would be taken for another one."""
    for number in range(4, 11 + len(BUNDLED)):
        for command in ("commit", "info", "check"):
            with support.untouched(inside.base, inside.top):
                result = inside.run(command, *(PROCESS if command != "info" else PROCESS[2:]), options=["--limit", f"NOFILE={number}"])
            if result.rc == 0 and command != "commit":
                continue
            error = support.error_of(result.stderr)
            assert error["name"] in ("ERROR_OPEN_FAILED", "ERROR_PLUGIN_UNAVAILABLE", "ERROR_SANDBOX_UNUSABLE"), f"{number}: {result}"
            assert "Too many open files: raise this process's limit with `ulimit -n`" in error["message"], f"{number}: {result}"
    options = ["--limit", "NOFILE=8"]
    parts = json.loads(inside.run("doctor", "--output", "json", options=options).stdout)["parts"]
    skipped = [part for part in parts if part["found"].startswith("skipped: ")]
    assert skipped and all(part["state"] == "broken" and "raise the limits" in part["remedy"] for part in skipped), parts


def test_plugins_are_found_beside_the_program_without_procfs(inside):
    """An installation below another prefix; `/proc/self/exe` is not there."""
    for path in [inside.root / "usr/bin/instar", *(inside.root / "usr/lib/x86_64-linux-gnu/instar/plugins").iterdir()]:
        target = inside.root / "opt" / path.relative_to(inside.root / "usr")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for program, options in (("/opt/bin/instar", []), ("../opt/bin/instar", []), ("/opt/bin/instar", ["--proc"])):
        options = ["--writable", "images", "--cwd", "/images", *options]
        found = support.run(*container.command(inside.root, program, "plugins", "--output", "json", options=options))
        assert found.rc == 0, str(found)
        libraries = [plugin["path"] for plugin in found.json["plugins"]]
        assert len(libraries) == len(BUNDLED) and all(name.startswith("/opt/lib/") for name in libraries), str(found)
    assert support.run(*container.command(inside.root, "/opt/bin/instar", "commit", *PROCESS, options=options)).rc == 0
    inside.assert_committed()


@pytest.mark.parametrize("command", ["check", "map", "doctor"])
def test_a_limit_of_file_sizes_kills_no_command(inside, command):
    """To go beyond it raises a signal, which only a commit ignores."""
    name = [] if command == "doctor" else ["top.qcow2"]
    result = inside.run(command, "--sandbox", "process", *name, options=["--limit", "FSIZE=1048576"])
    assert result.rc == 1 and "File too large" in result.stdout + result.stderr, str(result)


def memory_cgroups():
    """Where groups with a limit of memory are made: the folder, and the file with the limit."""
    for folder, limit in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]:
        controllers = Path(folder, "cgroup.subtree_control")
        if os.access(folder, os.W_OK) and (limit != "memory.max" or "memory" in controllers.read_text().split()):
            if limit == "memory.max" or Path(folder, limit).exists():
                return Path(folder), limit
    return None


@pytest.mark.skipif(memory_cgroups() is None, reason="no memory cgroup can be made here")
def test_eight_mebibytes_of_memory_are_enough(inside):
    """The guest's 64 MiB are room, of which a page that was never touched takes nothing."""
    folder, limit = memory_cgroups()
    group = folder / f"instar-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(8 * MIB))
        assert_committed(inside, ["--cgroup", str(group)])
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


ROOT_SYSCTL = pytest.mark.skipif(ORDINARY, reason="`vm.memfd_noexec` is root's, also in a pid namespace")


@ROOT_SYSCTL
def test_memfd_noexec_that_asks_for_a_decision(inside):
    assert_committed(inside, ["--memfd-noexec", "1"])


@ROOT_SYSCTL
def test_memfd_noexec_that_forbids(inside):
    """Nothing else runs a program that is in no file: the error names the setting, and the doctor what to set."""
    options = ["--memfd-noexec", "2"]
    assert_unusable(inside, "vm.memfd_noexec", options=options)
    status, part = doctor(inside, options=options)
    assert status == 1 and part["state"] == "broken"
    [advice] = re.findall(r"`sysctl (vm\.memfd_noexec)=(\d)`", part["remedy"])
    assert_committed(inside, ["--memfd-noexec", "2", "--memfd-noexec", advice[1]])


def without(tmp_path, name):
    """A list like Docker's, but for one system call: the option that names it."""
    lines = (allowed_calls.LISTS / "docker.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith((f"{name} where", f"{name} errno", "#"))]
    path = tmp_path / name
    path.write_text("\n".join(line if " where " in line else re.sub(rf"\b{name}\b", "", line) for line in kept))
    assert name not in allowed_calls.read(path).rules
    return ["--list", str(path)]


NEEDED = {
    "memfd_create": "memfd_create", "execveat": "starting a process", "clone": "starting a process", "socketpair": "socketpair",
    "seccomp": "setting up seccomp", "setrlimit": "giving up privileges", "personality": "giving up privileges",
    "setsid": "giving up privileges", "sigaltstack": "signals of faults", "pwrite64": "writing the guest",
}


def test_each_call_that_is_needed_is_missed_by_its_step(inside, tmp_path):
    for name, step in NEEDED.items():
        assert_unusable(inside, step, "Operation not permitted", options=without(tmp_path, name))
    status, part = doctor(inside, options=without(tmp_path, "seccomp"))
    assert status == 1 and "CONFIG_SECCOMP_FILTER" in part["remedy"] and part["remedy"].endswith("seccomp")


OPTIONAL = ["close_range", "landlock_create_ruleset", "kill", "wait4", "statx", "copy_file_range", "fallocate"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_call_that_is_not_needed_is_not_missed(inside, tmp_path, name):
    """Neither on a kernel that does not have it, nor under a list that does not know it."""
    assert_committed(inside, without(tmp_path, name))


def test_the_lists_are_in_force():
    """What the tests above run under stops what it should."""
    def under(name, *command):
        return support.run(sys.executable, allowed_calls.__file__, name, *command)

    state = under("docker", "grep", "Seccomp:", "/proc/self/status")
    assert state.stdout.split() == ["Seccomp:", "2"], str(state)
    threads = "import threading; thread = threading.Thread(target=print, args=('started',)); thread.start(); thread.join()"
    for name in ("docker", "containerd"):
        assert under(name, "unshare", "--user", "true").rc == 1
        assert under(name, sys.executable, "-c", threads).stdout == "started\n"
    # The C library's way to start a thread since 2.34, which goes another one after ENOSYS only.
    assert "can't start new thread" in under("containerd-old", sys.executable, "-c", threads).stderr
    with pytest.raises(ValueError, match="no system calls"):
        allowed_calls.List.parse("default errno 1\nread wriet")
    with pytest.raises(ValueError, match="does not say"):
        allowed_calls.List.parse("read write")
