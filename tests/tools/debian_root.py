"""A minimal Debian in a folder, for programs that want to see what a fresh machine or container makes of something.

It is of the host's own suite, made by debootstrap from the host's own mirror, and kept as a tar archive in `target/debian-root`
for the next time. It needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / "target" / "debian-root"
#: What the tests need in the root besides a minimal Debian; what is tested must not.
INCLUDED = "man-db"


def fail(reason):
    sys.exit(f"{Path(sys.argv[0]).stem}: {reason}")


def run(*args, rc=0, **options):
    """Runs a program and insists on its exit status (`None`: any)."""
    argv = [os.fspath(arg) for arg in args]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **options)
    if rc is not None and done.returncode != rc:
        fail(f"{' '.join(argv)}: status {done.returncode} instead of {rc}\n{done.stdout}{done.stderr}")
    return done


def expect(condition, reason):
    if not condition:
        fail(reason)


def suite_and_mirror():
    """The host's suite and where its packages come from, as apt knows it."""
    lines = Path("/etc/os-release").read_text().splitlines()
    suite = dict(line.split("=", 1) for line in lines if "=" in line).get("VERSION_CODENAME", "").strip('"')
    targets = run("apt-get", "indextargets", "--format", "$(CODENAME)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)",
                  "Created-By: Packages").stdout
    for target in targets.splitlines():
        codename, release, component, uri = target.split("|", 3)
        # Without package lists apt knows no code name, only the word in the list of sources.
        if suite in (codename, release) and component == "main":
            return suite, uri
    return fail(f"apt knows no mirror with the suite '{suite}': run `apt-get update`")


def archive():
    """A minimal Debian, as a tar archive."""
    suite, mirror = suite_and_mirror()
    path = CACHE / f"{suite}.tar"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as root:
            os.chmod(root, 0o755)
            run("debootstrap", "--variant=minbase", f"--include={INCLUDED}", suite, root, mirror)
            run("chroot", root, "apt-get", "clean")
            run("tar", "-C", root, "--numeric-owner", "-cf", f"{path}.new", ".")
            os.rename(f"{path}.new", path)
    return path


class DebianRoot:
    """A fresh Debian in a folder, for as long as the block lasts."""

    def __enter__(self):
        # Not in /tmp, which may not take device nodes.
        self.path = Path(tempfile.mkdtemp(dir=CACHE))
        run("tar", "-C", self.path, "--numeric-owner", "-xpf", archive())
        os.chmod(self.path, 0o755)
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path)
