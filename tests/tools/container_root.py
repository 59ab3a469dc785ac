"""`make container-root`: the image of the Dockerfile, without a container engine: its steps in a fresh Debian, and a commit in it.

The steps are read from the Dockerfile. What is built in its first stage is built here by the same commands, with the tool chain
of this machine; the second stage is a minimal Debian of debootstrap. The commit runs as the image says, as its user, in a
container without /dev/kvm and under Docker's default list of system calls, and qemu-img reads what came of it. It needs root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

import container
import dockerfile
from debian_root import CACHE, REPO, DebianRoot, archive, expect, fail, run, suite_and_mirror

MIB = 1 << 20


def build(stage, folder):
    """The commands of the first stage, with this machine's tool chain; where they name its root, `folder` is meant."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    for step in stage.steps:
        if isinstance(step, dockerfile.Copy):
            expect((step.stage, step.sources, step.target) == (None, ["."], "."), f"the whole folder is built: {step}")
        elif step.command.startswith("apt-get "):
            words = shlex.split(step.command)
            for tool in words[words.index("--no-install-recommends") + 1:]:
                expect(shutil.which(tool), f"{tool} is missing")
        else:
            run("sh", "-euc", step.command.replace("/stage", str(folder / "stage")), cwd=REPO, env=environment)


def source(stages, folder, copy, name):
    """Where a `COPY` takes a file from."""
    if copy.stage is None:
        return REPO / name
    expect(copy.stage == stages[0].name and name.startswith("/stage/"), f"only what was installed is taken: {copy}")
    return folder / name.lstrip("/")


def copy_into(path, target):
    """As `COPY`: of a folder its content; what is made is root's."""
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for made in [target, *target.rglob("*")]:
        os.chown(made, 0, 0)


def try_out(root, settings):
    """A commit as the user of the image, in its folder."""
    user = int(settings["USER"].partition(":")[0])
    work = settings["WORKDIR"].lstrip("/")
    images = root / work
    images.mkdir(exist_ok=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M", cwd=images)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 8M", "base.qcow2", cwd=images)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=images)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 0xa5 1M 3M", "-c", "write -z 7M 64k", "top.qcow2", cwd=images)
    for path in [images, *images.iterdir()]:
        os.chown(path, user, user)

    def inside(*arguments, rc=0):
        program = shutil.which(settings["ENTRYPOINT"][0], path=f"{root}/usr/bin")
        expect(program, f"{settings['ENTRYPOINT']} is not in the image")
        options = ["--user", str(user), "--writable", work, "--cwd", f"/{work}", "--proc"]
        return run(*container.command(root, "/usr/bin/instar", *arguments, options=options), rc=rc)

    expect("Usage" in inside(*settings["CMD"]).stdout, "what the image says by itself is no help")
    refused = inside("commit", "--sandbox", "kvm", "top.qcow2", rc=1)
    expect("/dev/kvm" in refused.stderr, f"there should be no KVM: {refused.stderr}")
    done = inside("commit", "--output", "json", "top.qcow2")
    expect('"sandbox": "process"' in done.stdout, f"instar commit: {done.stdout}")
    expect("Commits work here" in inside("doctor").stdout, "instar doctor does not like the image")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", images / "base.qcow2", images / "flat")
    wanted = b"\1" * MIB + b"\xa5" * (3 * MIB) + b"\1" * (3 * MIB) + bytes(64 << 10) + b"\1" * (MIB - (64 << 10))
    expect((images / "flat").read_bytes() == wanted, "the base does not read what the overlay held")


def main():
    if os.geteuid() != 0:
        fail("needs root, for the fresh Debian")
    suite, _ = suite_and_mirror()
    stages = dockerfile.read(REPO / "Dockerfile", SUITE=suite)
    archive()
    with tempfile.TemporaryDirectory(dir=CACHE) as folder, DebianRoot() as debian:
        folder = Path(folder)
        build(stages[0], folder)
        for step in stages[1].steps:
            expect(isinstance(step, dockerfile.Copy), f"the image is made of copies alone: {step}")
            for name in step.sources:
                copy_into(source(stages, folder, step, name), debian.path / step.target.lstrip("/"))
        size = sum(path.stat().st_size for path in debian.path.glob("usr/lib/x86_64-linux-gnu/instar/**/*") if path.is_file())
        size += (debian.path / "usr/bin/instar").stat().st_size
        try_out(debian.path, stages[1].settings)
    print(f"the image of the Dockerfile: {size / MIB:.1f} MiB besides Debian {suite}; a commit in it, without KVM")


if __name__ == "__main__":
    main()
