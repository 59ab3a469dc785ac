"""The workloads of the benchmark: pairs and chains of images, the same bytes every time."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from demo_fill import Image  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclasses.dataclass
class Workload:
    """A base and an overlay, and sometimes layers between them; sizes in bytes."""

    name: str
    title: str
    disk: int
    cluster: int = 64 * KIB
    sequential: int = 0
    scattered: int = 0
    full_base: bool = False
    base_format: str = "qcow2"
    overlay_format: str = "qcow2"
    compress: str = ""
    layers: int = 1
    # instar / qemu-img that is aimed at, at most; 0: none.
    goal: float = 0
    # The kind of file system that it is measured on; none: that of the directory.
    file_system: str = ""

    @property
    def base(self):
        """Name of the image that is committed into."""
        return f"base.{self.base_format}"

    @property
    def overlay(self):
        """Name of the image that is committed."""
        return f"overlay.{self.overlay_format}"

    @property
    def options(self):
        """What both programs are given besides the overlay."""
        return ["-b", self.base, "-d"] if self.layers > 1 else []

    def build(self, directory):
        """Make the images; the same bytes every time."""
        if (self.base_format, self.overlay_format, self.compress, self.layers) == ("qcow2", "qcow2", "", 1):
            self.build_qcow2(directory)
        else:
            self.build_with_qemu_io(directory)

    def build_with_qemu_io(self, directory):
        """Other formats than one qcow2 over another: layers with one pattern of bytes to a MiB, one after the other."""
        call(["qemu-img", "create", "-q", "-f", self.base_format, self.base, str(self.disk)], cwd=directory)
        below, below_format = self.base, self.base_format
        share = self.sequential // self.layers
        for layer in range(self.layers):
            name = self.overlay if layer == self.layers - 1 else f"layer{layer}.{self.overlay_format}"
            options = ["-o", f"compression_type={self.compress}"] if self.compress else []
            call(["qemu-img", "create", "-q", "-f", self.overlay_format, *options, "-b", below, "-F", below_format, name],
                 cwd=directory)
            writes = []
            for at in range(layer * share, (layer + 1) * share, MIB):
                writes += ["-c", f"write {'-c ' if self.compress else ''}-P {1 + at // MIB % 255} {at} 1M"]
            for start in range(0, len(writes), 400):
                call(["qemu-io", "-f", self.overlay_format, *writes[start : start + 400], name], cwd=directory)
            below, below_format = name, self.overlay_format

    def build_qcow2(self, directory):
        """One qcow2 over another, with random bytes."""
        base, overlay = directory / self.base, directory / self.overlay
        options = ["-q", "-f", "qcow2", "-o", f"cluster_size={self.cluster}"]
        call(["qemu-img", "create", *options, str(base), str(self.disk)])
        call(["qemu-img", "create", *options, "-b", base.name, "-F", "qcow2", str(overlay)])
        rng = random.Random(20240229)
        if self.full_base:
            fill(base, 0, self.disk, rng)
        if self.sequential:
            fill(overlay, 0, self.sequential, rng)
        if self.scattered:
            image = Image(str(overlay), writable=True)
            for cluster in sorted(rng.sample(range(self.disk // self.cluster), self.scattered)):
                image.write(cluster * self.cluster, rng.randbytes(self.cluster))
            image.file.close()


def workloads(quick):
    """The workloads; the quick ones are smaller, not other ones."""
    large, scattered, small = (64 * MIB, 256, 1024) if quick else (GIB, 4096, 16384)
    return [
        Workload("empty", "empty overlay (start-up)", GIB, goal=1.0),
        Workload("sequential-new", f"{text(large)} sequential, into new clusters", large, sequential=large,
                 goal=0.5),
        Workload("sequential-over", f"{text(large)} sequential, over existing clusters", large, sequential=large,
                 full_base=True, goal=0.5),
        Workload("scattered-64k", f"{text(scattered * 64 * KIB)} in {scattered:,} scattered 64 KiB clusters of 64 GiB",
                 64 * GIB, scattered=scattered, goal=0.6),
        Workload("scattered-4k", f"{text(small * 4 * KIB)} in {small:,} scattered 4 KiB clusters of 16 GiB",
                 16 * GIB, cluster=4 * KIB, scattered=small, goal=0.6),
        Workload("zlib", f"{text(large)} of compressed clusters (zlib)", large, sequential=large, compress="zlib",
                 goal=0.9),
        Workload("zstd", f"{text(large)} of compressed clusters (zstd)", large, sequential=large, compress="zstd",
                 goal=0.9),
        Workload("raw", f"{text(large)} sequential, qcow2 into raw", large, sequential=large, base_format="raw",
                 goal=0.5),
        Workload("vmdk", f"{text(large // 4)} sequential, vmdk into vmdk", large, sequential=large // 4,
                 base_format="vmdk", overlay_format="vmdk", goal=0.2),
        Workload("chain", f"8 layers of {text(large // 16)}, into the lowest", large, sequential=large // 2, layers=8,
                 goal=0.5),
        *(Workload(f"reflink-{kind}", f"{text(4 * large)} sequential on {name}, which shares extents", 4 * large,
                   sequential=4 * large, goal=0.1, file_system=kind) for kind, name in (("xfs", "XFS"), ("btrfs", "btrfs"))),
        Workload("ext4-new", f"{text(large)} sequential on ext4 without discard, into new clusters", large, sequential=large,
                 goal=0.5, file_system="ext4"),
        Workload("ext4-over", f"{text(large)} sequential on ext4 without discard, over existing clusters", large,
                 sequential=large, full_base=True, goal=0.5, file_system="ext4"),
        Workload("tmpfs-new", f"{text(large)} sequential on tmpfs, into new clusters", large, sequential=large,
                 file_system="tmpfs"),
        Workload("tmpfs-over", f"{text(large)} sequential on tmpfs, over existing clusters", large, sequential=large,
                 full_base=True, file_system="tmpfs"),
    ]


def fill(path, offset, length, rng):
    """Write random bytes into an image, one MiB after the other."""
    image = Image(str(path), writable=True)
    for at in range(offset, offset + length, MIB):
        image.write(at, rng.randbytes(MIB))
    image.file.close()


def text(size):
    """A size for people."""
    if size % (GIB << 10) == 0:
        return f"{size // (GIB << 10)} TiB"
    return f"{size // GIB} GiB" if size % GIB == 0 else f"{size // MIB} MiB"


def call(command, **options):
    """Run a command that must succeed; returns what it said."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(map(str, command))}: exit {done.returncode}: {done.stderr.strip()}")
    return done
