"""Attacks on which file is read and written: names that are swapped while commits run, at moments that `strace` holds open, and
headers that claim more than any memory has. Files outside never change; what is inside reads as before or as committed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import qcow2_bytes
import support
from support import KIB, MIB, refuse

COMMITS = 24


@pytest.fixture
def made(pair):
    """A pair with data on both sides."""
    return pair.make(2 * MIB, base=["write -P 9 0 2M"], top=["write -P 1 0 512k", "write -P 2 1M 64k"])


@pytest.fixture
def victim(made, tmp_path):
    """A file outside that looks like the backing."""
    (tmp_path / "outside").mkdir()
    return support.copy(made.base, tmp_path / "outside/base.qcow2")


# --- races ------------------------------------------------------------------------------------------


def swap_file(made, victim):
    """The backing, and a link that leads outside, under one name in turns."""
    os.link(made.base, made.dir / "real")
    link, real = made.dir / "link", made.dir / "again"
    while True:
        link.symlink_to(victim)
        yield os.rename(link, made.base)
        os.link(made.dir / "real", real)
        yield os.rename(real, made.base)


def swap_directory(made, victim):
    """A directory with the backing, and a link to the one outside, under one name in turns."""
    inside, way = made.dir / "inside", made.dir / "way"
    inside.mkdir()
    made.base.rename(inside / "base.qcow2")
    qcow2_bytes.Image(made.top).set_backing(b"way/base.qcow2")
    way.symlink_to("inside")
    while True:
        for target in (victim.parent, inside):
            (made.dir / "link").symlink_to(target)
            yield os.rename(made.dir / "link", way)


@pytest.mark.parametrize("swap", [swap_file, swap_directory])
def test_a_race_never_leads_outside(made, victim, swap):
    """Whichever of the two is there when it is looked at: the commit is done inside, or refused."""
    swaps = swap(made, victim)
    next(swaps)
    next(swaps)
    overlay = support.copy(made.top, made.dir.parent / "overlay")
    stop = threading.Event()

    def race():
        while not stop.is_set():
            next(swaps)

    thread = threading.Thread(target=race)
    thread.start()
    try:
        with support.untouched(victim):
            for _ in range(COMMITS):
                support.copy(overlay, made.top)
                with support.untouched(victim):
                    result = support.run_instar("commit", made.top)
                if result.rc != 0:
                    # Between the look and the opening, or between that and the lock, it is another file by now.
                    replaced = [says for says in ("was replaced", "was moved or replaced") if says in result.stderr]
                    name, says = ("ERROR_OPEN_FAILED", replaced[0]) if replaced else \
                        ("ERROR_WRITE_TARGET_NOT_ALLOWED", "leads outside")
                    support.assert_refused(result, name, says)
                    assert support.digest(made.top) == support.digest(overlay)
                else:
                    assert support.holds_no_clusters(made.top)
    finally:
        stop.set()
        thread.join()
    assert set(os.listdir(victim.parent)) == {"base.qcow2"}


# --- a file that is swapped at a chosen moment ------------------------------------------------------


def descriptors(process):
    """Those that it has open: none if it has ended meanwhile."""
    try:
        return list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return []


class Held:
    """instar under strace, which holds some system calls up for a while."""

    DELAY = 1_500_000

    def __init__(self, call, path, *args, when="1"):
        if shutil.which("strace") is None or support.run("strace", "-o", "/dev/null", "true").rc != 0:
            pytest.skip("strace is not installed, or may not trace")
        only = [] if path is None else ["-P", path]
        self.process = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", "/dev/null", *only, "-e", f"trace={call}",
             "-e", f"inject={call}:delay_enter={self.DELAY}:when={when}", support.instar_binary(), *args],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )

    def wait_for_open(self, path):
        """Until instar has the file open. What is held up then is the call after that."""
        wanted = os.stat(path)
        for _ in range(2000):
            assert self.process.poll() is None, self.process.communicate()
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for descriptor in [d for child in children for d in descriptors(child)]:
                try:
                    found = os.stat(descriptor)
                    flags = (descriptor.parent.parent / "fdinfo" / descriptor.name).read_text()
                except OSError:
                    continue
                # One that only names a place has nothing open.
                if int(re.search(r"flags:\s*(\d+)", flags)[1], 8) & os.O_PATH:
                    continue
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    # Whether it is the file that was looked at, and its lock, come before the call that is held up.
                    time.sleep(0.2)
                    return
            time.sleep(0.005)
        raise AssertionError(f"{path} was not opened")

    def result(self):
        stdout, stderr = self.process.communicate(timeout=support.TIMEOUT)
        return support.Result(self.process.args, self.process.returncode, os.fsdecode(stdout), os.fsdecode(stderr))


@pytest.mark.parametrize("side", ["top", "base"])
def test_swapped_between_open_and_probe(made, side):
    """Another image takes the name when the first has been opened and not yet read: the one that is open is the one that is
    looked at, locked, and written."""
    path = getattr(made, side)
    wanted = support.content_hash(made.top)
    kept, other = made.dir / "kept", support.copy(path, made.dir / "other")
    os.link(path, kept)
    support.qemu_io(other, "write -P 77 1536k 64k")
    swapped = support.digest(other)
    # What has taken the name of the overlay is another image on the backing.
    held = Held("pread64", path, "commit", "--ignore-siblings", made.top)
    held.wait_for_open(path)
    os.rename(other, path)
    result = held.result()
    assert result.rc == 0, str(result)
    assert support.digest(path) == swapped, "a file that was not opened has changed"
    if side == "top":
        assert support.content_hash(made.base) == wanted
        assert support.holds_no_clusters(kept)
    else:
        assert support.content_hash(kept) == wanted
        assert support.holds_no_clusters(made.top)
    support.assert_clean(kept)


@pytest.mark.parametrize("kind", ["link", "fifo", "garbage", "gone"])
def test_swapped_before_the_backing_is_opened(made, victim, kind):
    """The overlay has been read, and its backing becomes something else: refused, and nothing changes."""
    base = support.copy(made.base, made.dir.parent / "base")
    held = Held("fcntl", made.top, "commit", made.top)
    held.wait_for_open(made.top)
    made.base.unlink()
    error, mention = {
        "link": ("ERROR_WRITE_TARGET_NOT_ALLOWED", "leads outside"),
        "fifo": ("ERROR_OPEN_FAILED", "not a regular file"),
        "garbage": ("ERROR_UNSUPPORTED_FORMAT", "qcow2"),
        "gone": ("ERROR_BACKING_NOT_FOUND", "does not exist"),
    }[kind]
    match kind:
        case "link":
            made.base.symlink_to(victim)
        case "fifo":
            os.mkfifo(made.base)
        case "garbage":
            made.base.write_bytes(bytes(range(256)) * 256)
    with support.untouched(victim, made.top, base):
        result = held.result()
    assert result.rc == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1, str(result)
    assert made.base.name in result.stderr and mention in result.stderr, str(result)
    if kind != "garbage":
        support.assert_refused(support.Result(["commit"], 1, "", result.stderr), error, mention)
    else:
        assert made.base.read_bytes() == bytes(range(256)) * 256


# --- headers that claim a lot -----------------------------------------------------------------------

HUGE = {
    "refcount-table": lambda i: i.set("refcount_table_clusters", 0xFFFF_FFFF),
    "refcount-table-of-nothing": lambda i: i.set("refcount_table_clusters", 0),
    "snapshots": lambda i: (i.set("nb_snapshots", 0xFFFF_FFFF), i.set("snapshots_offset", 5 * 65536)),
    "snapshots-most": lambda i: (i.set("nb_snapshots", 65536), i.set("snapshots_offset", 5 * 65536)),
    "snapshots-in-the-header": lambda i: (i.set("nb_snapshots", 1), i.set("snapshots_offset", 0)),
    "backing-name": lambda i: (i.set("backing_offset", 512), i.set("backing_size", 0xFFFF_FFFF)),
    "backing-name-beyond-end": lambda i: (i.set("backing_offset", 1 << 62), i.set("backing_size", 1023)),
    "l1-in-the-header": lambda i: i.set("l1_offset", 0),
    "refcount-table-in-the-header": lambda i: i.set("refcount_table_offset", 0),
    "l1-onto-refcount-table": lambda i: i.set("l1_offset", i.get("refcount_table_offset")),
    "l2-onto-the-header": lambda i: i.poke64(i.l2_at(), qcow2_bytes.COPIED | 0),
    "refcount-block-onto-l1": lambda i: i.poke64(i.get("refcount_table_offset") + 8, i.get("l1_offset")),
    "refcount-block-onto-itself": lambda i: i.poke64(i.get("refcount_table_offset"), i.get("refcount_table_offset")),
}


@pytest.mark.parametrize("side", ["top", "base"])
@pytest.mark.parametrize("spoil", HUGE)
def test_structures_that_are_huge_or_lie_where_they_may_not(made, side, spoil):
    path = getattr(made, side)
    HUGE[spoil](qcow2_bytes.Image(path))
    for output in ([], ["--output", "json"]):
        with support.untouched(made.top, made.base):
            result = support.run_instar("commit", *output, made.top)
        assert result.rc == 1 and result.stdout == "", str(result)
        assert len(result.stderr.splitlines()) == 1 and path.name in result.stderr, str(result)


def test_the_largest_tables_take_no_memory(tmp_path):
    """An L1 table of 32 MiB and a refcount table of 8 MiB, both within the limits of the format, in files that are nothing but
    holes: what the host needs is bounded, and the commit is done."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    size = 4 * MIB * 64 * 512
    for path, backing in ((base, None), (top, "base.qcow2")):
        support.create(path, MIB, backing=backing, cluster_size=512)
        image = qcow2_bytes.Image(path)
        end = 1 << 30
        # A refcount table that describes all of the file, and an L1 table, both behind everything else.
        table = end
        l1 = table + 8 * MIB
        with path.open("r+b") as file:
            old = image.peek(image.get("refcount_table_offset"), image.get("refcount_table_clusters") * 512)
            file.seek(table)
            file.write(old)
            file.truncate(l1 + 32 * MIB)
        image.set("refcount_table_offset", table)
        image.set("refcount_table_clusters", 8 * MIB // 512)
        image.set("l1_offset", l1)
        image.set("l1_size", 4 * MIB)
        image.set("size", size)
        support.qemu_img("check", "-q", "-r", "all", path, rc=None)
    support.qemu_io(top, "write -P 5 64k 64k", f"write -P 6 {size - 64 * KIB} 64k")
    before = [support.run("qemu-io", "-f", "qcow2", "-c", f"read -P {n} {at} 64k", top).stdout for n, at in
              ((5, 64 * KIB), (6, size - 64 * KIB))]
    assert not any("failed" in text for text in before)
    peak = peak_memory([support.instar_binary(), "commit", top])
    assert peak < 256 * MIB, f"{peak} bytes"
    for n, at in ((5, 64 * KIB), (6, size - 64 * KIB)):
        read = support.run("qemu-io", "-f", "qcow2", "-c", f"read -P {n} {at} 64k", base)
        assert read.rc == 0 and "failed" not in read.stdout, str(read)
    assert support.holds_no_clusters(top)


#: A program that runs another and prints the most memory that it had, in KiB. A child counts what its parent had when it was
#: made, and the tests' own process may have read large files.
MEASURE = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def peak_memory(args):
    """Runs a program that must succeed. Returns the most memory that it had, in bytes, as the kernel counted it."""
    result = support.run(sys.executable, "-c", MEASURE, *args)
    assert result.rc == 0, str(result)
    return int(result.stdout) * 1024


# --- names in a vmdk --------------------------------------------------------------------------------

ODD = [b"x\x1b[2J\x1b]0;owned\x07.vmdk", b"\xff\xfe\x9b31m", b"x\rinstar Image committed.", "‮x".encode()]


@pytest.mark.parametrize("name", ODD, ids=["escape", "not-utf8", "return", "bidi"])
@pytest.mark.parametrize("where", ["extent", "parent"])
def test_names_in_a_descriptor_are_escaped(tmp_path, name, where):
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    support.create(base, MIB, fmt="vmdk")
    support.create(top, backing="base.vmdk", backing_fmt="vmdk", fmt="vmdk")
    if where == "extent":
        text = (b"# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n"
                b"RW 2048 FLAT \"" + name + b"\" 0\n")
        base.write_bytes(text)
        data = top.read_bytes()
        start = data.index(b"parentCID=") + len("parentCID=")
        # As many digits as there are: qemu writes no leading zeroes.
        end = data.index(b"\n", start)
        top.write_bytes(data[:start] + b"1".zfill(end - start) + data[end:])
    else:
        data = top.read_bytes()
        old = b'parentFileNameHint="base.vmdk"'
        at, new = data.index(old), b'parentFileNameHint="' + name + b'"'
        end = data.index(b"\0", at)
        data = data[:at] + new + data[at + len(old) : end] + data[end + len(new) - len(old) :]
        top.write_bytes(data)
    for output in ([], ["--output", "json"]):
        with support.untouched(base, top):
            result = support.run_instar("commit", *output, top)
        assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
        assert not support.CONTROL.search(result.stderr) and "‮" not in result.stderr, str(result)
        result.stderr.encode()  # no byte that is not UTF-8
        assert "does not exist" in result.stderr, str(result)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/tty", *(["/dev/kvm"] if support.KVM else [])])
def test_devices_are_no_backings(made, device):
    """Named in the overlay, they lead outside; by the operator, they are no images."""
    qcow2_bytes.Image(made.top).set_backing(device.encode())
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", made.top, files=[made.base], mentions=["-b"])
    refuse("ERROR_OPEN_FAILED", made.top, "-b", device, files=[made.base], mentions=[device])


def test_little_memory_is_said_in_one_line(pair):
    """Whatever is short: the plugins, the sandbox, the process once it is confined. Backtraces would open files."""
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 0 1M"])
    done = False
    for limit in range(8, 160, 4):
        with support.untouched(pair.base, pair.top):
            result = support.run("prlimit", f"--as={limit * MIB}", support.instar_binary(), "commit", "--dry-run", pair.top,
                                 env={"RUST_BACKTRACE": "1"})
        if result.rc == 127:
            assert "error while loading shared libraries" in result.stderr, str(result)
            continue
        done = result.rc == 0
        if not done:
            lines = result.stderr.splitlines()
            assert result.rc == 1 and result.stdout == "" and len(lines) == 1, str(result)
            assert lines[0].startswith("instar: ") and lines[0].endswith(")") and "report" not in lines[0], str(result)
    assert done, "with enough memory it works"
