"""A root with nothing but the program, for tests of what it is like in a container."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import container
import support
from support import BUNDLED, MIB

#: Whether an ordinary user runs the tests: nobody else can be become then, and in a container the user is called 0.
ORDINARY = os.geteuid() != 0
TOP = ["write -P 9 1M 2M", "write -z 3M 512k", "write -P 7 3968k 64k"]


class Inside:
    """A root with the program, its plugins and the libraries that they need, and two images in /images."""

    def __init__(self, root: Path):
        self.root = root
        binary = support.instar_binary()
        plugins = [binary.parent / f"libinstar_plugin_{name}.so" for name in BUNDLED]
        self.add(binary, "usr/bin/instar")
        for path in plugins:
            self.add(path, f"usr/lib/x86_64-linux-gnu/instar/plugins/{path.name}")
        for path in [binary, *plugins]:
            listed = support.run("ldd", path).stdout
            for library in set(re.findall(r"(/\S+) \(0x", listed)):
                self.add(library, library.lstrip("/"))
        self.images = root / "images"
        self.images.mkdir()
        self.base, self.top = self.images / "base.qcow2", self.images / "top.qcow2"

    def add(self, source, target):
        """Copies a file; what is there already stays."""
        target = self.root / target
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(os.path.realpath(source), target)
            target.chmod(0o755)

    @classmethod
    @contextlib.contextmanager
    def make(cls):
        """A new one, where other users pass through its folders, for as long as the block lasts."""
        with tempfile.TemporaryDirectory(prefix="instar-container-") as folder:
            os.chmod(folder, 0o755)
            root = Path(folder) / "root"
            root.mkdir(mode=0o755)
            made = cls(root)
            made.make_images()
            yield made

    def make_images(self):
        """An overlay that hides some of its base, both of the container's user."""
        support.create(self.base, 4 * MIB)
        support.qemu_io(self.base, "write -P 1 0 4M")
        support.create(self.top, backing="base.qcow2")
        support.qemu_io(self.top, *TOP)
        self.own(container.USER)
        self.before = support.content_hash(self.top)
        assert support.content_hash(self.base) != self.before

    def own(self, user):
        """Makes the images a user's."""
        for path in [self.images, self.base, self.top]:
            if not ORDINARY:
                os.chown(path, user, user)

    def run(self, *arguments, options=()):
        """instar in a container; what it answers."""
        options = ["--writable", "images", "--cwd", "/images", *options]
        return support.run(*container.command(self.root, "/usr/bin/instar", *arguments, options=options))

    def assert_committed(self):
        """Both images read what the overlay read before, which holds nothing any more."""
        assert support.content_hash(self.base) == self.before
        assert support.content_hash(self.top) == self.before
        assert support.holds_no_clusters(self.top)
        support.assert_clean(self.base)
        support.assert_clean(self.top)
