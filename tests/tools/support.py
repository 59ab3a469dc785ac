"""What every integration test uses: running the programs, and asking what an image holds.

Content is the oracle. A test says what bytes a guest reads, before and after, and what `qemu-img check`
thinks of both files; it does not compare `qemu-img info` output.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import qcow2_bytes
import schemas

REPO = Path(__file__).resolve().parents[2]
TIMEOUT = 120
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
#: A limit of the length of files (RLIMIT_FSIZE) in bytes, to make writes fail behind it. The process sandbox needs 64 MiB: the
#: guest's memory is a file, too.
FILE_LIMIT = 65 * MIB

#: The codes that tests name; `guest/abi/src/error.rs` is where they come from.
CODES = {
    name: int(number)
    for number, name in re.findall(
        r"= (\d+), (ERROR_\w+);", (REPO / "guest/abi/src/error.rs").read_text()
    )
}


#: The formats of the plugins that come with the program.
BUNDLED = tuple(re.search(r"(?m)^BUNDLED := (.*)$", (REPO / "packaging" / "packaging.mk").read_text())[1].split())
#: The sandboxes that the program has.
SANDBOXES = ("kvm", "process")
#: The one that the program under test is told to use: `make test SANDBOX=process` sets it.
SANDBOX = os.environ.get("INSTAR_TEST_SANDBOX") or "kvm"
if SANDBOX not in SANDBOXES:
    raise SystemExit(f"INSTAR_TEST_SANDBOX is {' or '.join(SANDBOXES)}, and not {SANDBOX!r}")
#: Whether tests of KVM run: always, unless the tests were told to do without and the machine has none.
KVM = SANDBOX == "kvm" or os.path.exists("/dev/kvm")


def configure() -> str:
    """Makes every command of this process and of those that it starts go by no configuration but that of the tests, and
    returns the file. There is none (an empty name) for the default, so that the tests cover the default itself."""
    path = ""
    if SANDBOX != "kvm":
        # Users that tests become read it, too. The program believes it only if nobody else could have written it.
        directory = tempfile.mkdtemp(prefix="instar-test-config.")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        path = os.path.join(directory, "config.toml")
        Path(path).write_text(configuration())
        os.chmod(path, 0o644)
        os.chmod(directory, 0o755)
    os.environ["INSTAR_CONFIG"] = path
    return path


def configuration(text="") -> str:
    """What a configuration file of a test has to say, besides what the test is about."""
    return text if SANDBOX == "kvm" else f'sandbox = "{SANDBOX}"\n{text}'


def instar_binary() -> Path:
    """The program under test: `INSTAR_BIN`, or the release build of this checkout."""
    return Path(os.environ.get("INSTAR_BIN") or REPO / "target/release/instar")


@dataclass
class Result:
    """How a program ended."""

    args: list
    rc: int
    stdout: str
    stderr: str

    def __str__(self):
        text = (
            f"$ {shlex.join(os.fsdecode(a) for a in self.args)}\n"
            f"rc {self.rc}\nstdout: {self.stdout!r}\nstderr: {self.stderr!r}"
        )
        # Reports travel between processes as UTF-8.
        return text.encode("utf-8", "backslashreplace").decode()

    @property
    def json(self):
        """What it printed. Of instar, its published schema has to allow that."""
        value = json.loads(self.stdout)
        if Path(os.fsdecode(self.args[0])).name == "instar":
            schemas.insist("adoption" if "--by-adoption" in self.args else self.args[1], value)
        return value

    @property
    def json_of_sandbox(self):
        """What it printed, without the name of the sandbox, which has to be that of the tests."""
        value = self.json
        assert value.pop("sandbox") == SANDBOX, str(self)
        return value

    @property
    def error(self) -> dict:
        """The error that instar printed as JSON; its published schema has to allow it."""
        return error_of(self.stderr)


def error_of(stderr: str) -> dict:
    """The error that standard error has as one JSON object; its published schema has to allow it."""
    return schemas.insist("error", json.loads(stderr))["error"]


def run(*args, cwd=None, env=None, timeout=TIMEOUT) -> Result:
    """Runs a program; its output is decoded so that no byte is lost."""
    argv = [os.fspath(a) if isinstance(a, os.PathLike) else a for a in args]
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=None if env is None else {**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return Result(argv, done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))


def run_instar(*args, cwd=None, env=None) -> Result:
    return run(instar_binary(), *args, cwd=cwd, env=env)


def in_shell(script, directory) -> str:
    """What a script for people prints, errors included, in this directory, with `instar` in the PATH."""
    (directory / "bin").mkdir(exist_ok=True)
    (directory / "bin/instar").symlink_to(instar_binary())
    environment = {**os.environ, "PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False, timeout=TIMEOUT)
    return done.stdout


def qemu_img(*args, cwd=None, rc=0) -> Result:
    """Runs qemu-img and insists on its exit status (`rc=None`: any)."""
    result = run("qemu-img", *args, cwd=cwd)
    assert rc is None or result.rc == rc, str(result)
    return result


def qemu_io(path, *commands, fmt="qcow2", cwd=None) -> None:
    """Runs qemu-io commands on an image, some hundreds in one process."""
    for start in range(0, len(commands), 500):
        args = ["qemu-io", "-f", fmt]
        for command in commands[start : start + 500]:
            args += ["-c", command]
        result = run(*args, path, cwd=cwd)
        assert result.rc == 0 and "failed" not in result.stdout, str(result)


def create(path, size=None, *, backing=None, backing_fmt="qcow2", fmt="qcow2", cwd=None, **options):
    """`qemu-img create`; a backing name is recorded as it is given."""
    args = ["create", "-q", "-f", fmt]
    if options:
        args += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    if backing is not None:
        args += ["-b", backing, "-F", backing_fmt]
    args.append(path)
    if size is not None:
        args.append(str(size))
    qemu_img(*args, cwd=cwd)
    return Path(os.fsdecode(os.fspath(path)))


def info(path, *args) -> dict:
    return json.loads(qemu_img("info", "--output=json", *args, path).stdout)


def virtual_size(path, fmt="qcow2") -> int:
    return info(path, "-f", fmt)["virtual-size"]


def content_hash(path, fmt="qcow2") -> str:
    """sha256 of the bytes a guest sees. Of huge disks only ranges with data count, with their offsets."""
    path = Path(path)
    size = virtual_size(path, fmt)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        raw = Path(scratch) / "raw"
        qemu_img("convert", "-f", fmt, "-O", "raw", path, raw)
        digest = hashlib.sha256(str(size).encode())
        with raw.open("rb") as file:
            if size <= 256 * MIB:
                while block := file.read(MIB):
                    digest.update(block)
                return digest.hexdigest()
            # `convert` leaves holes wherever a whole 4 KiB is zero, so this depends on content only.
            for offset in data_blocks(file, size):
                block = os.pread(file.fileno(), 4096, offset)
                if block.strip(b"\0"):
                    digest.update(offset.to_bytes(8, "big") + block)
    return digest.hexdigest()


def data_blocks(file, size):
    """The 4 KiB blocks of a sparse file that are not in holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(file.fileno(), position, os.SEEK_DATA)
        except OSError:
            return
        position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        yield from range(start & ~4095, position, 4096)


def flatten(path, to, fmt="qcow2") -> Path:
    """A copy of what a guest reads, without any backing."""
    qemu_img("convert", "-f", fmt, "-O", "qcow2", path, to)
    return Path(to)


def assert_same_content(first, second, first_fmt="qcow2", second_fmt="qcow2", strict=True):
    """Both read the same; with `strict` they are equally long, too."""
    result = qemu_img("compare", "-f", first_fmt, "-F", second_fmt, first, second, rc=None)
    assert result.rc == 0, str(result)
    if strict:
        assert virtual_size(first, first_fmt) == virtual_size(second, second_fmt)


def assert_clean(path, fmt="qcow2"):
    """`qemu-img check` finds neither errors nor leaks."""
    result = qemu_img("check", "--output=json", "-f", fmt, path, rc=None)
    assert result.rc == 0, str(result)
    found = result.json
    wrong = {k: found[k] for k in ("corruptions", "leaks", "check-errors") if found.get(k)}
    assert not wrong, f"{wrong}\n{result}"


def repair(path):
    """Lets qemu-img repair an image. Saving bitmaps afterwards, it may leak a cluster: the second time it finds that."""
    qemu_img("check", "-q", "-r", "all", path, rc=None)
    qemu_img("check", "-q", "-r", "all", path, rc=None)
    assert_clean(path)


def holds_no_clusters(overlay) -> bool:
    """Whether no guest cluster of a qcow2 file is mapped: no L2 table has an entry (from the bytes)."""
    image = qcow2_bytes.Image(overlay)
    return not any(entry for _, entry in image.mapped())


def digest(path):
    """Size and sha256 of a file's bytes."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(MIB):
            sha.update(block)
        return file.tell(), sha.hexdigest()


@contextlib.contextmanager
def untouched(*paths):
    """Files (those that are regular ones) are byte-identical afterwards; missing ones stay missing."""
    before = {p: digest(p) if os.path.isfile(p) else os.path.lexists(p) for p in paths}
    yield
    for path, was in before.items():
        now = digest(path) if os.path.isfile(path) else os.path.lexists(path)
        assert now == was, f"{path!r} changed"


@contextlib.contextmanager
def read_only(directory):
    """The directory as a read-only file system; False where nothing can be mounted."""
    mounted = os.geteuid() == 0 and run("mount", "--bind", "-o", "ro", directory, directory).rc == 0
    try:
        yield mounted
    finally:
        if mounted:
            run("umount", directory)


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def assert_refused(result: Result, name: str, *mentions):
    """A failure as the contract has it: exit status 1, one line (or one JSON object), nothing else."""
    assert name in CODES, f"no such code: {name}"
    assert result.rc == 1, str(result)
    assert result.stdout == "", str(result)
    assert result.stderr.endswith("\n"), str(result)
    if "--output" in result.args:
        error = result.error
        assert os.path.isabs(error.get("file", "/")), str(result)
        assert (error["name"], error["code"]) == (name, CODES[name]), str(result)
        message = error["message"]
    else:
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("instar: "), str(result)
        message = lines[0]
        assert message.endswith(f" ({name})"), str(result)
    assert message.strip() and not CONTROL.search(result.stderr), str(result)
    for mention in mentions:
        assert os.fsdecode(mention) in message, f"{mention!r} is not named\n{result}"


def refuse(name: str, overlay, *options, files=(), mentions=(), cwd=None) -> None:
    """Both ways of asking for a commit that must be refused; nothing changes."""
    paths = [overlay, *files]
    for output in ([], ["--output", "json"]):
        with untouched(*paths):
            result = run_instar("commit", *options, *output, overlay, cwd=cwd)
        assert_refused(result, name, *mentions)


def commit(overlay, *options, cwd=None) -> Result:
    """A commit that must succeed."""
    result = run_instar("commit", *options, overlay, cwd=cwd)
    assert result.rc == 0, str(result)
    return result


def copy(path, to) -> Path:
    """Copies a file, holes and all."""
    shutil.copyfile(path, to)
    return Path(to)


@contextlib.contextmanager
def cargo_of_plugin(source, goal, *options):
    """Builds or tests a plugin outside of the workspace, without a warning; the value is the folder of what was built. They all
    are built in one folder, so that what they have in common is compiled once; whoever comes later waits for the end of the
    block."""
    target = REPO / "target" / "examples"
    target.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CARGO_PROFILE_")}
    environment["CARGO_TARGET_DIR"] = str(target)
    with (target / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = subprocess.run(
            ["cargo", goal, "--release", *options], cwd=source, env=environment, capture_output=True, text=True, check=False
        )
        assert built.returncode == 0, built.stdout + built.stderr
        assert "warning" not in built.stderr, built.stderr
        yield target / "release"


def build_plugin(source, library, directory, *options) -> Path:
    """Builds a plugin outside of the workspace, and copies its library into a directory."""
    with cargo_of_plugin(source, "build", *options) as built:
        return Path(shutil.copy(built / library, directory))


def run_plugin_tests(source, *options) -> None:
    """Runs the tests of a plugin outside of the workspace."""
    with cargo_of_plugin(source, "test", *options):
        pass


class Holder:
    """qemu-io with an image open, until the block ends."""

    def __init__(self, path, *options):
        self.process = subprocess.Popen(
            ["qemu-io", *options, "-f", "qcow2", path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )

    def __enter__(self):
        # The answer to a command shows that the image is open and locked.
        self.process.stdin.write("length\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert "MiB" in line, line
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=TIMEOUT)
        self.process.stdout.close()
