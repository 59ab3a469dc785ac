"""`make test-installed`: the Debian package in a fresh root, used by an ordinary user, and purged again.

It needs root, `/dev/kvm`, and qemu-utils on the host.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from debian_root import DebianRoot, archive, expect, fail, run

USER = "someone"
IMAGES = f"home/{USER}/images"
MIB = 1 << 20


class Root(DebianRoot):
    """A fresh Debian in a folder, with /proc and the devices that are needed, for as long as the block lasts."""

    def __enter__(self):
        super().__enter__()
        run("mount", "-t", "proc", "proc", self.path / "proc")
        return self

    def __exit__(self, *exception):
        subprocess.run(["umount", self.path / "proc"], check=False)
        if os.path.ismount(self.path / "proc"):
            print(f"test-installed: {self.path / 'proc'} could not be unmounted", file=sys.stderr)
            return
        super().__exit__(*exception)

    def root(self, *args, rc=0):
        """Runs a program in it as root."""
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8",
                       "DEBIAN_FRONTEND": "noninteractive"}
        return run("chroot", self.path, *args, rc=rc, env=environment)

    def user(self, *args, groups=(), rc=0):
        """Runs a program in it as the ordinary user, in the folder with images."""
        listed = f"--groups={','.join(groups)}" if groups else "--clear-groups"
        command = ["setpriv", f"--reuid={USER}", f"--regid={USER}", listed, "--no-new-privs", "env", "-i", "PATH=/usr/bin:/bin",
                   f"HOME=/home/{USER}", "LC_ALL=C.UTF-8", "sh", "-c", f'cd "/{IMAGES}" && exec "$@"', "sh", *args]
        return run("chroot", self.path, *command, rc=rc)

    def files(self):
        """Names of all files but those that keep records and caches."""
        skipped = {"proc", "sys", "dev", "var/log", "var/cache", "var/lib/apt"}
        found = set()
        for folder, folders, names in os.walk(self.path):
            here = os.path.relpath(folder, self.path)
            folders[:] = [name for name in folders if os.path.normpath(f"{here}/{name}") not in skipped]
            found |= {os.path.normpath(f"{here}/{name}") for name in (*folders, *names)}
        # What dpkg keeps of the state before, and apt's lock.
        return {name for name in found if not name.endswith(("-old", "/lock", "/lock-frontend"))}


def prepare(root):
    """What an administrator has: the user, and /dev/kvm for the group kvm, which udev or a virtual machine manager makes."""
    device = os.stat("/dev/kvm")
    expect(stat.S_ISCHR(device.st_mode), "/dev/kvm is no device")
    root.root("groupadd", "--system", "kvm")
    root.root("useradd", "--create-home", "--user-group", USER)
    os.mknod(root.path / "dev/kvm", stat.S_IFCHR, device.st_rdev)
    root.root("chgrp", "kvm", "/dev/kvm")
    root.root("chmod", "0660", "/dev/kvm")
    root.root("install", "-d", "-o", USER, "-g", USER, f"/{IMAGES}")


def use(root):
    """Everything that the user does."""
    member = {"groups": ["kvm"]}
    images = root.path / IMAGES
    healthy = root.user("instar", "doctor", **member)
    expect("Commits work here" in healthy.stdout, f"instar doctor: {healthy.stdout}")
    sick = root.user("instar", "doctor", rc=1)
    expect("usermod -aG kvm" in sick.stdout, f"without the group, doctor does not name it: {sick.stdout}")
    listed = root.user("instar", "plugins").stdout
    for plugin in ("parallels", "qcow", "qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc"):
        library = f"/usr/lib/x86_64-linux-gnu/instar/plugins/libinstar_plugin_{plugin}.so"
        expect(library in listed and "Skipped" not in listed, f"instar plugins: {listed}")

    for base, base_format, overlay, overlay_format in [
        ("base.qcow2", "qcow2", "top.qcow2", "qcow2"),
        ("base.raw", "raw", "other.qcow2", "qcow2"),
        ("base.vmdk", "vmdk", "top.vmdk", "vmdk"),
    ]:
        root.user("instar", "create", "-q", "-f", base_format, base, "8M")
        root.user("instar", "create", "-q", "-f", overlay_format, "-b", base, "-F", base_format, overlay)
        writes = ["-c", "write -P 0xa5 1M 3M", "-c", "write -P 0x5a 7M 512"]
        run("qemu-io", "-f", overlay_format, *writes, overlay, cwd=images)
        for name in (base, overlay):
            shutil.chown(images / name, *[os.stat(images).st_uid] * 2)
        without = root.user("instar", "commit", overlay, rc=1)
        expect("/dev/kvm" in without.stderr and len(without.stderr.splitlines()) == 1, f"without the group: {without.stderr}")
        done = root.user("instar", "commit", overlay, **member)
        expect(done.stdout == "Image committed.\n", f"instar commit: {done.stdout}{done.stderr}")
        flat = images.parent / f"{base}.flat"
        run("qemu-img", "convert", "-f", base_format, "-O", "raw", images / base, flat)
        wanted = bytes(MIB) + b"\xa5" * (3 * MIB) + bytes(3 * MIB) + b"\x5a" * 512 + bytes(MIB - 512)
        expect(flat.read_bytes() == wanted, f"{base} does not read what {overlay} held")
        root.user("instar", "check", "-f", base_format, base, rc=63 if base_format == "raw" else 0, **member)

    for page in ("instar", "instar-commit", "instar-plugin-qcow2"):
        where = root.user("man", "-w", page).stdout.strip()
        expect(where.startswith("/usr/share/man/man"), f"man -w {page}: {where}")
    words = root.user("bash", "-c", 'source /usr/share/bash-completion/completions/instar; complete -p instar; '
                      'COMP_WORDS=(instar comm) COMP_CWORD=1; _instar instar comm instar; echo "${COMPREPLY[@]}"').stdout
    expect("complete" in words and words.splitlines()[-1] == "commit", f"completion: {words}")
    for path in ("usr/share/zsh/vendor-completions/_instar", "usr/share/fish/vendor_completions.d/instar.fish"):
        expect((root.path / path).stat().st_size > 1000, f"{path} is empty")


def main():
    package = Path(sys.argv[1]).resolve() if len(sys.argv) == 2 else fail("usage: installed.py PACKAGE.deb")
    expect(os.geteuid() == 0, "needs root, for the fresh Debian")
    for tool in ("debootstrap", "qemu-io", "qemu-img", "setpriv"):
        expect(shutil.which(tool), f"{tool} is missing")
    archive()
    with Root() as root:
        prepare(root)
        before = root.files()
        shutil.copy(package, root.path / "tmp/instar.deb")
        root.root("apt-get", "install", "-q", "-y", "--no-install-recommends", "/tmp/instar.deb")
        (root.path / "tmp/instar.deb").unlink()
        configuration = root.root("dpkg-query", "-W", "-f", "${Conffiles}", "instar").stdout
        expect("/etc/instar/config.toml" in configuration, f"conffiles: {configuration}")
        use(root)
        shutil.rmtree(root.path / IMAGES)
        for flat in (root.path / IMAGES).parent.glob("*.flat"):
            flat.unlink()
        # An operator's change survives removal, but not a purge.
        with (root.path / "etc/instar/config.toml").open("a") as file:
            file.write("plugin-dirs = []\n")
        root.root("dpkg", "--remove", "instar")
        expect((root.path / "etc/instar/config.toml").exists(), "dpkg --remove took the configuration")
        expect(not (root.path / "usr/bin/instar").exists(), "dpkg --remove left the program")
        root.root("dpkg", "--purge", "instar")
        (root.path / IMAGES).mkdir()
        left = sorted(root.files() ^ before)
        expect(not left, f"dpkg --purge: files that were not there before, or are missing now: {left[:20]}")
    print(f"{package.name}: installed, used by an ordinary user, purged without a trace")


if __name__ == "__main__":
    main()
