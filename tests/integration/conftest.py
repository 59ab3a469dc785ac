"""Shared fixtures. A missing program is a failure, never a skip."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "tools"), str(TESTS / "campaigns")]

import support  # noqa: E402

# What a user's environment adds must not reach the tests.
os.environ.pop("INSTAR_PLUGIN_PATH", None)
support.configure()
os.environ["LC_ALL"] = "C.UTF-8"

# Neither must the signals that a run in the background of a script, or under nohup, ignores: a program that a test starts would
# ignore them as well. A handler that does nothing goes on ignoring them here, and no new program inherits it.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_sessionstart(session):
    binary = support.instar_binary()
    missing = [tool for tool in ("qemu-img", "qemu-io", "qemu-nbd") if shutil.which(tool) is None]
    if not os.access(binary, os.X_OK) or not binary.is_file():
        missing.append(f"{binary} (run `make instar`, or set INSTAR_BIN)")
    if missing:
        pytest.exit(f"these tests need: {', '.join(missing)}", returncode=1)


class Pair:
    """A base and an overlay in a directory of their own, with copies for qemu-img beside it."""

    def __init__(self, directory: Path):
        self.dir = directory / "images"
        self.dir.mkdir()
        self.copies = directory / "copies"
        self.base = self.dir / "base.qcow2"
        self.top = self.dir / "top.qcow2"

    def make(self, size=4 * support.MIB, *, top_size=None, base_options=None, top_options=None,
             base=(), top=(), base_fmt="qcow2"):
        """Creates both and runs qemu-io commands on each."""
        support.create(self.base, size, fmt=base_fmt, **(base_options or {}))
        if base:
            support.qemu_io(self.base, *base, fmt=base_fmt)
        support.create(self.top, top_size, backing=self.base.name, backing_fmt=base_fmt, **(top_options or {}))
        if top:
            support.qemu_io(self.top, *top)
        return self

    def check_commit(self, *options, cwd=None, overlay=None, backing=None, backing_fmt="qcow2",
                     cleared=True, qemu_options=(), repair=()):
        """Commits, and holds the result against qemu-img's on copies of the whole directory. Of the copies, those in
        `repair` are repaired first: `qemu-img commit` does not do that for a backing."""
        backing = Path(backing or self.base)
        top = self.top
        before = support.flatten(top, self.dir.parent / "before.qcow2")
        shutil.rmtree(self.copies, ignore_errors=True)
        shutil.copytree(self.dir, self.copies, symlinks=True)
        for path in repair:
            support.repair(self.copies / path.name)
        support.qemu_img("commit", "-q", *qemu_options, self.copies / top.name)

        result = support.commit(overlay or top, *options, cwd=cwd)

        support.assert_same_content(
            backing, self.copies / backing.name, backing_fmt, backing_fmt
        )
        support.assert_same_content(top, before)
        support.assert_clean(top)
        if backing_fmt == "qcow2":
            support.assert_clean(backing)
        if cleared:
            assert support.holds_no_clusters(top), f"{top} still holds clusters\n{result}"
        return result


def pytest_collection_modifyitems(items):
    """Tests that are tried in each sandbox need a KVM for one of them: without, the other one counts."""
    if support.KVM:
        return
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("sandbox") == "kvm":
            item.add_marker(pytest.mark.skip(reason="this machine has no /dev/kvm"))


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)
