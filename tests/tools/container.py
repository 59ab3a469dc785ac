"""Runs a program as a container engine does, without one: `container.py [OPTION...] ROOT PROGRAM [ARGUMENT...]`.

In a process of number 1, in namespaces of its own: a read-only root with nothing of the host, no /dev/kvm, /tmp and /dev/shm
from which nothing can be executed, an ordinary user without capabilities and without new privileges, and only the system
calls of a [list](allowed_calls.py). Started by root, or by an ordinary user, who is then called 0 inside and has no more
rights than that.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import allowed_calls

USER = 65532
DEVICES = ("null", "zero", "full", "random", "urandom")
# linux/prctl.h
PR_CAPBSET_DROP = 24
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1


def command(root, *arguments, options=()):
    """The command line that runs a program and its arguments in a container; `options` are those of this program."""
    become_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    namespaces = ["--mount", "--pid", "--ipc", "--net", "--fork", "--kill-child"]
    return ["unshare", *become_root, *namespaces, sys.executable, os.path.abspath(__file__), *options, os.fspath(root), *arguments]


def mount(*arguments):
    subprocess.run(["mount", *map(os.fspath, arguments)], check=True, stdin=subprocess.DEVNULL)


def build(root, writable, proc):
    """Mount what a container has."""
    mount("--make-rprivate", "/")
    mount("--bind", root, root)
    for folder in ("dev", "proc", "tmp", *writable):
        (root / folder).mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", "mode=755,nosuid,noexec", "none", root / "dev")
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", Path("/dev") / name, root / "dev" / name)
    for folder in ("dev/shm", "tmp"):
        (root / folder).mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", "mode=1777,nosuid,nodev,noexec,size=1m", "none", root / folder)
    if proc:
        mount("-t", "proc", "none", root / "proc")
    for folder in writable:
        mount("--bind", root / folder, root / folder)


def hand_in_kvm(root, group):
    """A device of the container's own: the host's may belong to root alone."""
    node = root / "dev/kvm"
    os.mknod(node, stat.S_IFCHR | 0o660, os.stat("/dev/kvm").st_rdev)
    os.chown(node, 0, group)
    os.chmod(node, 0o660)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", default="docker", help="the system calls that there are")
    parser.add_argument("--user", type=int, default=USER)
    parser.add_argument("--writable", action="append", default=[], help="a folder of the root that is a volume")
    parser.add_argument("--proc", action="store_true", help="with /proc")
    parser.add_argument("--cwd", default="/")
    parser.add_argument("--limit", action="append", default=[], help="NAME=VALUE, as RLIMIT_NAME of getrlimit(2)")
    parser.add_argument("--memfd-noexec", action="append", default=[], help="set `sysctl vm.memfd_noexec` of this namespace")
    parser.add_argument("--cgroup", type=Path, help="a cgroup to enter last, so that nothing of this program counts there")
    parser.add_argument("--kvm", type=int, metavar="GROUP", help="with /dev/kvm, which this group may use, as the user's second")
    parser.add_argument("--deny-write-execute", action="store_true", help="as MemoryDenyWriteExecute= of systemd")
    parser.add_argument("root", type=Path)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    for value in options.memfd_noexec:
        Path("/proc/sys/vm/memfd_noexec").write_text(value)
    program = allowed_calls.read(options.list).program()
    # Of an ordinary user, who has no other number in this namespace.
    only_one = Path("/proc/self/uid_map").read_text().split()[2] == "1"
    build(options.root, options.writable, options.proc)
    if options.kvm is not None:
        hand_in_kvm(options.root, options.kvm)
    mount("-o", "remount,bind,ro", options.root)
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    if options.cgroup:
        # It is no place of the new process number: 0 is the writer itself.
        (options.cgroup / "cgroup.procs").write_text("0")
    os.chroot(options.root)
    os.chdir(options.cwd)
    for limit in options.limit:
        name, _, value = limit.partition("=")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(value), int(value)))
    if options.deny_write_execute:
        # What newer versions of systemd do from Linux 6.3 on; older ones have a filter of the same effect.
        libc.prctl(PR_SET_MDWE, ctypes.c_ulong(PR_MDWE_REFUSE_EXEC_GAIN), 0, 0, 0)
    allowed_calls.install(program)
    if not only_one:
        os.setgroups([] if options.kvm is None else [options.kvm])
        os.setresgid(options.user, options.user, options.user)
        os.setresuid(options.user, options.user, options.user)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", "LC_ALL": "C.UTF-8"}
    os.execve(options.program[0], options.program, environment)


if __name__ == "__main__":
    main()
