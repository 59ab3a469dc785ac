"""Faults in the real program: every system call that touches an image fails, is interrupted, moves less than asked, or is
where the program is killed, one at a time, for whole commits. What must hold afterwards is checked with qemu-img.

`make faults` (every_fault.py) runs all of them; tests/integration/test_faults.py a sample.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import delta_bytes
import support
from support import KIB, MIB

FAULTS = ["KILL", "EIO", "ENOSPC", "EINTR", "SHORT"]
ERRNO = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}
# Calls that a signal can interrupt, and those that may move less than they were asked to.
INTERRUPTIBLE = {"openat", "pread64", "preadv", "pwrite64", "pwritev", "copy_file_range", "fallocate",
                 "ftruncate", "fdatasync"}
SHORTENED = {"pread64", "preadv", "pwrite64", "pwritev", "copy_file_range"}
# Calls of the guest's requests: their failure names the errno.
OF_THE_GUEST = {"preadv", "pwritev", "pwrite64", "copy_file_range", "fdatasync", "ftruncate"}
# Without an answer the program goes on: where the data lies, and that the disk may begin to write, are hints; a file that
# Landlock cannot be told of lies in a directory that it was told of; whether somebody has locked an image (`open`) is asked for
# the sake of a message, and once more when it is locked; what is not dropped from the page cache is read from there; a mark that a
# backup does not get, or an overlay keeps, means nothing.
HINTS = {"lseek", "sync_file_range", "fallocate", "fadvise64", "openat", "open", "fsetxattr", "fremovexattr"}


class Violation(AssertionError):
    """A fault that the program did not survive."""


def injector() -> Path:
    return support.instar_binary().parent / "instar-test-inject"


@dataclass
class Case:
    """A pair, or a chain, that is committed again and again from the same start."""

    name: str
    directory: Path
    top: str
    base: str
    top_fmt: str = "qcow2"
    base_fmt: str = "qcow2"
    args: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    emptied: bool = True
    # Other commands, one of which an operator may run after one that was interrupted. `IMAGE` stands for the path of the image,
    # `BASE` for that of the base.
    sequels: list[list[str]] = field(default_factory=list)
    # Further calls without whose answer the program goes on.
    hints: frozenset = frozenset()
    # The overlay is removed at the end.
    deleted: bool = False

    def __post_init__(self):
        self.pristine = self.directory.with_name(self.directory.name + ".pristine")
        shutil.copytree(self.directory, self.pristine)
        self.expected = support.content_hash(self.path(self.top), self.top_fmt)
        self.snapshot = self.snapshot_hash()

    def path(self, name) -> Path:
        return self.directory / name

    def files(self):
        return [self.path(name) for name in [self.top, self.base, *self.others]]

    def reset(self):
        for name in [self.top, self.base, *self.others]:
            shutil.copyfile(self.pristine / name, self.path(name))

    def snapshot_hash(self):
        """Of what the base's internal snapshot holds, if it has one."""
        if self.base_fmt != "qcow2" or not support.info(self.path(self.base)).get("snapshots"):
            return None
        flat = self.directory / "snapshot.raw"
        support.qemu_img("convert", "-l", "one", "-O", "raw", self.path(self.base), flat)
        return support.digest(flat)

    def command(self) -> list:
        """What is run again and again: the arguments of the program."""
        return ["commit", *self.args, self.path(self.top)]

    def of_sequel(self, words) -> list:
        return [{"IMAGE": self.path(self.top), "BASE": self.path(self.base)}.get(word, word) for word in words]

    def goes_on(self, sequel) -> bool:
        """Whether the case's own command can be run to its end after this one."""
        return sequel[0] in ("check", "map")

    def traced(self) -> list:
        """The files whose calls are counted, and fail."""
        return self.files()

    def run(self, fault="COUNT", nth=0, call="none", *options):
        command = [support.instar_binary(), *self.command(), *options]
        return support.run(injector(), fault, str(nth), call, *self.traced(), "--", *command)

    def again(self):
        return support.run_instar(*self.command())

    def calls(self) -> Counter:
        """How often each call is made by a commit that nothing happens to."""
        self.reset()
        result = self.run()
        assert result.rc == 0, str(result)
        found = re.search(r"inject: not done \((.*)\)", result.stderr)
        return Counter({name: int(count) for count, name in re.findall(r"(\d+) of (\w+)", found[1])})

    def faults(self):
        """All faults of this case."""
        for call, count in sorted(self.calls().items()):
            for fault in FAULTS:
                if (fault == "EINTR" and call not in INTERRUPTIBLE) or (fault == "SHORT" and call not in SHORTENED):
                    continue
                yield from ((fault, nth, call) for nth in range(1, count + 1))

    # --- what must hold ---------------------------------------------------------------------------

    def hold(self, condition, what, result):
        if not condition:
            raise Violation(f"{self.name}: {what}\n{result}")

    def inject(self, fault, nth, call) -> bool:
        """One fault; whether it could be injected. Raises a Violation."""
        self.reset()
        result = self.run(fault, nth, call)
        done = "inject: done" in result.stderr
        self.check_status(fault, call, result, done)
        self.check_images(result, finished=result.rc == 0)
        if self.is_removed():
            return done
        again = self.again()
        self.hold(again.rc == 0, f"after {fault} at {call} {nth} a second run fails", f"{result}\n{again}")
        self.check_images(f"{result}\n{again}", finished=True)
        return done

    def check_status(self, fault, call, result, done):
        lines = [line for line in result.stderr.splitlines() if not line.startswith("inject: ")]
        if fault in ("EINTR", "SHORT") or not done:
            self.hold(result.rc == 0, f"{fault} of {call} is not survived", result)
        elif fault == "KILL":
            self.hold(result.rc == 137, "it was not killed", result)
        elif result.rc == 0:
            self.hold(call in HINTS | self.hints | {"fstat", "fcntl", "pread64"}, f"{fault} of {call} is not noticed", result)
        else:
            # What becomes stale is told before the first change, and so before a fault in it.
            lines = [line for line in lines if ": warning: " not in line]
            named = [path.name for path in self.files() if path.name in result.stderr]
            self.hold(result.rc == 1 and len(lines) == 1 and named, f"{fault} of {call} is not one line", result)
            if call in OF_THE_GUEST:
                self.hold(ERRNO[fault] in lines[0], f"{fault} of {call} is not named", result)
                self.hold("offset" in lines[0] or call in ("fdatasync", "ftruncate"), "the place is not named", result)

    def readable(self, result, finished) -> bool:
        """A vmdk whose commit ended between the two content IDs is not for QEMU until it is committed again."""
        if self.top_fmt != "vmdk" or finished:
            return True
        flat = self.directory / "flat.raw"
        tried = support.qemu_img("convert", "-f", "vmdk", "-O", "raw", self.path(self.top), flat, rc=None)
        self.hold(tried.rc == 0 or "Invalid argument" in tried.stderr, "the overlay cannot be read", f"{result}\n{tried}")
        return tried.rc == 0

    def is_removed(self) -> bool:
        return self.deleted and not self.path(self.top).exists()

    def check_images(self, result, finished):
        if self.deleted:
            self.hold(self.is_removed() or not finished, "the overlay is not removed", result)
        if self.base_fmt not in ("vhdx", "parallels"):
            self.check_files(result, finished)
            return
        # QEMU reads no image whose log is to be replayed, and calls one damaged that was not closed. It repairs a copy, which
        # reads as before then: the next commit has to do that itself.
        with tempfile.TemporaryDirectory() as directory:
            copies = copy.copy(self)
            copies.directory = Path(directory)
            for path in filter(Path.exists, self.files()):
                shutil.copyfile(path, copies.path(path.name))
            support.qemu_img("check", "-q", "-r", "all", "-f", self.base_fmt, copies.path(self.base), rc=None)
            copies.check_files(result, finished)

    def check_files(self, result, finished):
        top, base = self.path(self.top), self.path(self.base)
        if self.is_removed():
            # It is only once the base holds everything.
            self.hold(support.content_hash(base, self.base_fmt) == self.expected, "it is removed, and the base lacks it", result)
            self.check_metadata(base, self.base_fmt, result)
            return
        if self.readable(result, finished):
            self.hold(support.content_hash(top, self.top_fmt) == self.expected, "the overlay reads differently", result)
        for path, fmt in ((top, self.top_fmt), (base, self.base_fmt)):
            self.check_metadata(path, fmt, result)
        self.hold(self.snapshot_hash() == self.snapshot, "the snapshot reads differently", result)
        if finished:
            content = support.content_hash(base, self.base_fmt)
            self.hold(content == self.expected, "the base reads differently", result)
            if self.emptied and self.top_fmt == "qcow2":
                self.hold(support.holds_no_clusters(top), "the overlay is not empty", result)


    def check_metadata(self, path, fmt, result):
        # qemu-img has no check for a vpc.
        if fmt not in ("raw", "vpc"):
            check = support.qemu_img("check", "-f", fmt, path, rc=None)
            # Leaks are allowed.
            self.hold(check.rc in (0, 3), f"{path.name} is damaged", f"{result}\n{check}")


# --- the cases ------------------------------------------------------------------------------------


def scribble(path, seed, fmt, size, count=5):
    rng = random.Random(seed)
    commands = []
    for number in range(count):
        length = rng.choice([4, 64, 200]) * KIB
        at = rng.randrange(0, (size - length) // 512) * 512
        commands.append(f"write -P {number + seed % 50 + 1} {at} {length}")
    if fmt != "vmdk":
        commands.append(f"write -z {size // 2} 128k")
    support.qemu_io(path, *commands, fmt=fmt)


def qcow2_with_snapshot(directory) -> Case:
    support.create(directory / "base", 4 * MIB, cluster_size="16k")
    scribble(directory / "base", 1, "qcow2", 4 * MIB)
    support.qemu_img("snapshot", "-c", "one", directory / "base")
    support.create(directory / "top", backing="base", cwd=directory)
    scribble(directory / "top", 2, "qcow2", 4 * MIB)
    sequels = [["rebase", "-q", "-b", "", "IMAGE"], ["check", "-q", "-r", "all", "BASE"], ["check", "-q", "-r", "all", "IMAGE"]]
    return Case("qcow2 with a snapshot", directory, "top", "base", sequels=sequels)


def compressed_and_growing(directory) -> Case:
    plain = directory / "plain"
    plain.write_bytes(b"compresses well " * (1 << 15) + bytes(MIB) + random.Random(3).randbytes(1 << 18))
    support.create(directory / "base", MIB, cluster_size="4k")
    scribble(directory / "base", 3, "qcow2", MIB)
    support.qemu_img("convert", "-c", "-O", "qcow2", plain, directory / "top")
    support.qemu_img("rebase", "-u", "-b", "base", "-F", "qcow2", directory / "top")
    support.qemu_io(directory / "top", "write -P 9 1M 100k")
    plain.unlink()
    return Case("compressed, into smaller clusters and a base that grows", directory, "top", "base", args=["--resize-backing"])


def into_raw(directory) -> Case:
    (directory / "base").write_bytes(random.Random(4).randbytes(MIB) + bytes(3 * MIB))
    support.create(directory / "top", 4 * MIB, backing="base", backing_fmt="raw", cwd=directory)
    scribble(directory / "top", 5, "qcow2", 4 * MIB)
    return Case("qcow2 into raw", directory, "top", "base", base_fmt="raw")


def vmdk(directory) -> Case:
    support.create(directory / "base", 4 * MIB, fmt="vmdk")
    scribble(directory / "base", 6, "vmdk", 4 * MIB, count=2)
    support.create(directory / "top", backing="base", backing_fmt="vmdk", fmt="vmdk", cwd=directory)
    scribble(directory / "top", 7, "vmdk", 4 * MIB)
    return Case("vmdk into vmdk", directory, "top", "base", top_fmt="vmdk", base_fmt="vmdk")


def delta(directory) -> Case:
    """A delta disk of ESX into another one, which gets new tables and grains, over a flat disk."""
    rng, size, parent, others = random.Random(8), 5 * MIB, None, []
    for name, kind, numbers in (("flat", delta_bytes.FLAT, []), ("base", delta_bytes.COWD, range(90, 200, 3)),
                                ("top", delta_bytes.COWD, [*range(100, 400, 7), *range(4000, 4200)])):
        extent = directory / f"{name}.extent"
        if kind == delta_bytes.FLAT:
            extent.write_bytes(rng.randbytes(size))
        else:
            delta_bytes.cowd(extent, size, {number: rng.randbytes(512) for number in numbers})
        line = (size // 512, delta_bytes.LINE[kind][0], extent.name.encode())
        above = {} if parent is None else {"parent": 0x10000000 + len(others), "hint": parent.encode()}
        text = delta_bytes.descriptor(kind, [line], cid=0x10000001 + len(others), newline=b"\r\n", **above)
        (directory / name).write_bytes(text)
        parent, others = name, [*others, extent.name]
    return Case("a delta disk of ESX into another one", directory, "top", "base", top_fmt="vmdk", base_fmt="vmdk",
                others=["flat", *others])


def growing(directory, fmt, **options) -> Case:
    """Into an image of another format, into blocks that are there and new ones, and growth."""
    support.create(directory / "base", 4 * MIB, fmt=fmt, **options)
    scribble(directory / "base", 8, fmt, 2 * MIB, count=2)
    support.create(directory / "top", 9 * MIB, backing="base", backing_fmt=fmt, cwd=directory)
    scribble(directory / "top", 9, "qcow2", 9 * MIB)
    return Case(f"qcow2 into {fmt}, which grows", directory, "top", "base", args=["--resize-backing"], base_fmt=fmt)


def into_vpc(directory) -> Case:
    """New blocks go over the footer at the end; growth moves nothing here."""
    return growing(directory, "vpc", force_size="on")


def into_vhdx(directory) -> Case:
    """All that is said of new blocks goes by the log."""
    return growing(directory, "vhdx", block_size="1M")


def into_parallels(directory) -> Case:
    """It says that it is open until the end; clusters make way for more entries."""
    return growing(directory, "parallels", cluster_size="4k")


def chain(directory) -> Case:
    below = None
    for number in range(3):
        name = f"layer{number}"
        support.create(directory / name, 4 * MIB, backing=below, cwd=directory, cluster_size=["64k", "4k", "16k"][number])
        scribble(directory / name, number + 10, "qcow2", 4 * MIB)
        below = name
    return Case("a chain, into the lowest", directory, "layer2", "layer0", args=["-b", "layer0"], others=["layer1"], emptied=False)


def much_data(directory) -> Case:
    """So much that several threads copy it, into clusters that are there and new ones."""
    support.create(directory / "base", 16 * MIB)
    support.qemu_io(directory / "base", "write -P 77 1M 2M")
    support.create(directory / "top", backing="base", cwd=directory)
    support.qemu_io(directory / "top", "write -P 1 1M 3M", "write -P 2 5M 300k", "write -P 3 8M 2M", "write -z 12M 1M")
    return Case("much data, by several threads", directory, "top", "base")


def read_back(directory) -> Case:
    """What was written is read back before the overlay is emptied."""
    case = compressed_and_growing(directory)
    case.name, case.args = "read back", [*case.args, "--verify"]
    return case


def removed(directory) -> Case:
    """The overlay is read back, and removed instead of emptied."""
    case = qcow2_with_snapshot(directory)
    case.name, case.args, case.emptied, case.deleted = "read back and removed", ["--verify", "--delete-overlay"], False, True
    return case


def wiped_and_removed(directory) -> Case:
    """The overlay is overwritten, and then removed."""
    case = into_raw(directory)
    case.name, case.args, case.deleted = "overwritten and removed", ["--wipe", "--delete-overlay"], True
    return case


CASES = [qcow2_with_snapshot, compressed_and_growing, into_raw, vmdk, delta, into_vpc, into_vhdx, into_parallels, chain, much_data,
         read_back, removed, wiped_and_removed]
