"""The workloads of the benchmark: images as a guest leaves them, written in place and never copied.

A copy has other extents than the image that it was made of: `cp` makes it smooth. So each run gets images of its own, written by
`qemu-io` in the order of the workload, and those of both programs grow side by side: a few MiB of the one, then of the other,
as on a machine on which more than one guest runs.
"""

import contextlib
import dataclasses
import pathlib
import random
import subprocess

import children

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# Writes of a pair before it is the other's turn, and the bytes of them at most.
TURN_WRITES, TURN_BYTES = 512, 64 * MIB


@dataclasses.dataclass
class Workload:
    """A base and an overlay, and sometimes layers between them; sizes in bytes."""

    name: str
    title: str
    disk: int
    cluster: int = 64 * KIB
    # So much from end to end, in writes of 1 MiB …
    sequential: int = 0
    # … and so many writes of `unit` bytes in random order, at multiples of `align` within the disk.
    scattered: int = 0
    unit: int = 64 * KIB
    align: int = 0
    # What the base holds before: nothing, or as much as the overlay's sequential writes, or the scattered ones' clusters.
    full_base: bool = False
    # Writes of zeroes.
    zeroes: bool = False
    base_format: str = "qcow2"
    overlay_format: str = "qcow2"
    overlay_options: tuple = ()
    compress: str = ""
    layers: int = 1
    # The base has a snapshot, so that what is overwritten has to be kept.
    snapshot: bool = False
    # The base is a block device (a raw one, of a file on a loop device).
    device: bool = False
    # instar / qemu-img that is aimed at, at most; 0: none.
    goal: float = 0
    # The overlay becomes a child of the base once it is written: a differencing VHD or VHDX, which qemu-img does not commit.
    differencing: bool = False
    # instar / the kernel alone that is aimed at, at most; 0: none.
    kernel_goal: float = 0
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
        return ["-b", self.base, "-d"] if self.layers > 1 or self.device else []

    def chain(self):
        """Names and formats of the layers above the base, the lowest first."""
        between = [f"layer{layer}.{self.overlay_format}" for layer in range(self.layers - 1)]
        return [(name, self.overlay_format) for name in [*between, self.overlay]]

    def create(self, directory):
        """Make the images, empty."""
        options = [f"cluster_size={self.cluster}"] if self.cluster != 64 * KIB else []
        base = ["-o", ",".join(options)] if options and self.base_format == "qcow2" else []
        # Otherwise the size would be that of a geometry.
        sized = {"vpc": ["-o", "force_size=on"]}
        base += sized.get(self.base_format, [])
        call(["qemu-img", "create", "-q", "-f", self.base_format, *base, self.base, str(self.disk)], cwd=directory)
        if self.device:
            device = call(["losetup", "-f", "--show", self.base], cwd=directory).stdout.strip()
            (directory / self.base).rename(directory / "device.img")
            (directory / self.base).symlink_to(device)
        options += [f"compression_type={self.compress}"] if self.compress else []
        options += self.overlay_options
        below = (self.base, self.base_format)
        for name, kind in self.chain():
            if self.differencing:
                call(["qemu-img", "create", "-q", "-f", kind, *sized.get(kind, []), name, str(self.disk)], cwd=directory)
                continue
            extra = ["-o", ",".join(options)] if options and kind == "qcow2" else []
            call(["qemu-img", "create", "-q", "-f", kind, *extra, "-b", below[0], "-F", below[1], name], cwd=directory)
            below = (name, kind)

    def places(self):
        """The guest's writes: offset and length, in their order."""
        rng = random.Random(20240229)
        places = [(at, MIB) for at in range(0, self.sequential, MIB)]
        align = self.align or self.unit
        return places + [(at * align, self.unit) for at in rng.sample(range(self.disk // align), self.scattered)]

    def writes(self):
        """What is written, in order: the image, its format, and commands of `qemu-io` with the bytes that each writes."""
        places = self.places()
        if self.full_base:
            step = max(self.cluster, 64 * KIB)
            held = sorted({at // step * step for at, _ in places}) if self.scattered else [at for at, _ in places]
            length = step if self.scattered else MIB
            yield from self.turns(self.base, self.base_format, [(at, length) for at in held], "")
        if self.snapshot:
            yield self.base, self.base_format, None
        share = -(-len(places) // self.layers)
        for layer, (name, kind) in enumerate(self.chain()):
            flag = "-c " if self.compress else "-z " if self.zeroes else ""
            yield from self.turns(name, kind, places[layer * share : (layer + 1) * share], flag)

    @staticmethod
    def turns(name, kind, places, flag):
        """Writes of one image, cut to turns."""
        commands, size = [], 0
        for at, length in places:
            pattern = "" if flag == "-z " else f"-P {1 + at // length % 255} "
            commands.append(f"write -q {flag}{pattern}{at} {length}\n")
            size += length
            if len(commands) == TURN_WRITES or size >= TURN_BYTES:
                yield name, kind, commands
                commands, size = [], 0
        if commands:
            yield name, kind, commands

    def build(self, directories):
        """Make the images in each of these directories, side by side; all are on disk then."""
        for directory in directories:
            directory.mkdir()
            self.create(directory)
        for name, kind, commands in self.writes():
            for directory in directories:
                if commands is None:
                    call(["qemu-img", "snapshot", "-c", "before", name], cwd=directory)
                else:
                    write(directory, name, kind, commands)
        for directory in directories if self.differencing else ():
            children.adopt(self.overlay_format, directory / self.overlay, directory / self.base, self.places())
        call(["sync"])

    def twin(self):
        """The same writes in images that `qemu-img` commits, too."""
        return dataclasses.replace(self, overlay_format="qcow2", base_format="qcow2", differencing=False)

    def remove(self, directory):
        """Detach and delete what `build` made."""
        if self.device and (directory / self.base).is_symlink():
            call(["losetup", "-d", str((directory / self.base).readlink())])
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def write(directory, name, kind, commands):
    """Have `qemu-io` write, past the page cache as a guest's disk is, where the file system can."""
    for mode in (["-t", "none"], []):
        done = subprocess.run(["qemu-io", "-f", kind, *mode, name], input="".join(commands), text=True, capture_output=True,
                              check=False, cwd=directory)
        if done.returncode == 0 and "failed" not in done.stdout + done.stderr:
            return
    raise SystemExit(f"bench: qemu-io {name}: {done.stdout}{done.stderr}")


@contextlib.contextmanager
def built(workload, directory, names):
    """The images of a workload in a directory for each of these names; gone afterwards."""
    places = {name: pathlib.Path(directory) / name for name in names}
    try:
        workload.build(list(places.values()))
        yield places
    finally:
        for place in places.values():
            if place.exists():
                workload.remove(place)


def workloads(quick):
    """The workloads; the quick ones are smaller, not other ones."""
    large, scattered, small = (64 * MIB, 256, 1024) if quick else (GIB, 4096, 12000)
    found = [
        Workload("empty", "empty overlay (start-up)", GIB, goal=1.0),
        Workload("sequential-new", f"{text(large)} sequential, into new clusters", large, sequential=large, goal=0.5),
        Workload("sequential-over", f"{text(large)} sequential, over existing clusters", large, sequential=large,
                 full_base=True, goal=0.5),
        Workload("clusters-4k", f"{text(small * 4 * KIB)} in {small:,} scattered 4 KiB clusters of 16 GiB", 16 * GIB,
                 cluster=4 * KIB, scattered=small, unit=4 * KIB, goal=0.6),
        Workload("subclusters", f"{small:,} scattered writes of 4 KiB, extended L2", 8 * GIB, scattered=small, unit=4 * KIB,
                 overlay_options=("extended_l2=on",), goal=1.0),
        Workload("lazy", f"{scattered:,} scattered writes of 64 KiB, lazy refcounts", 8 * GIB, scattered=scattered,
                 overlay_options=("lazy_refcounts=on",), goal=1.0),
        Workload("snapshot", f"{scattered:,} scattered writes of 64 KiB over a base with a snapshot", 2 * large,
                 scattered=scattered // 4, full_base=True, snapshot=True, goal=1.0),
        Workload("zlib", f"{text(large)} of compressed clusters (zlib)", large, sequential=large, compress="zlib", goal=0.9),
        Workload("zstd", f"{text(large)} of compressed clusters (zstd)", large, sequential=large, compress="zstd", goal=0.9),
        Workload("vmdk", f"{text(large // 4)} sequential, vmdk into vmdk", large, sequential=large // 4, base_format="vmdk",
                 overlay_format="vmdk", goal=0.2),
        Workload("chain", f"8 layers of {text(large // 16)}, into the lowest", large, sequential=large // 2, layers=8, goal=0.5),
        Workload("device", f"{small:,} scattered writes of 4 KiB into a block device", 2 * large, scattered=small // 2,
                 unit=4 * KIB, base_format="raw", device=True, goal=1.0),
    ]
    for kind, name in (("vpc", "VHD"), ("vhdx", "VHDX")):
        scatter = {"scattered": scattered, "base_format": kind}
        found += [
            Workload(f"{kind}-new", f"{text(large)} sequential, qcow2 into {name}", large, sequential=large, base_format=kind,
                     goal=0.6),
            Workload(f"{kind}-64k", f"{scattered:,} scattered writes of 64 KiB, qcow2 into {name}", 8 * GIB, **scatter, goal=0.6),
            Workload(f"{kind}-child-new", f"{text(large)} sequential, {name} into {name}, into new blocks", large,
                     sequential=large, base_format=kind, overlay_format=kind, differencing=True, kernel_goal=1.2),
            Workload(f"{kind}-child-over", f"{text(large)} sequential, {name} into {name}, over existing blocks", large,
                     sequential=large, full_base=True, base_format=kind, overlay_format=kind, differencing=True, kernel_goal=1.2),
            Workload(f"{kind}-child-64k", f"{scattered:,} scattered writes of 64 KiB, {name} into {name}", 8 * GIB, **scatter,
                     overlay_format=kind, differencing=True, kernel_goal=1.2),
        ]
    # Into qcow 1, qemu-img takes a third of a second for each MiB: that needs no number.
    found += [
        Workload("vdi-new", f"{text(large)} sequential, qcow2 into VDI", large, sequential=large, base_format="vdi", goal=0.6),
        Workload("vdi-64k", f"{scattered:,} scattered writes of 64 KiB, qcow2 into VDI", 8 * GIB, scattered=scattered,
                 base_format="vdi", goal=0.6),
    ]
    for kind, name in (("ext4", "ext4 without discard"), ("xfs", "XFS"), ("btrfs", "btrfs"), ("tmpfs", "tmpfs")):
        shares = kind in ("xfs", "btrfs")
        each = {"file_system": kind, "goal": 1.0}
        found += [
            Workload(f"{kind}-new", f"{text(large)} sequential, into new clusters, on {name}", large, sequential=large,
                     file_system=kind, goal=0.1 if shares else 1.0 if kind == "tmpfs" else 0.5),
            Workload(f"{kind}-over", f"{text(large)} sequential, over existing clusters, on {name}", large, sequential=large,
                     full_base=True, file_system=kind, goal=0.1 if shares else 1.0 if kind == "tmpfs" else 0.5),
            Workload(f"{kind}-64k", f"{scattered:,} scattered writes of 64 KiB, on {name}", 64 * GIB, scattered=scattered, **each),
            Workload(f"{kind}-4k", f"{small:,} scattered writes of 4 KiB, on {name}", 8 * GIB, scattered=small, unit=4 * KIB,
                     **each),
            Workload(f"{kind}-4k-over", f"{small:,} scattered writes of 4 KiB over existing clusters, on {name}", large,
                     scattered=small, unit=4 * KIB, full_base=True, **each),
            Workload(f"{kind}-raw", f"{small:,} scattered writes of 4 KiB into raw, on {name}", 8 * GIB, scattered=small,
                     unit=4 * KIB, base_format="raw", **each),
            Workload(f"{kind}-zeroes", f"{text(large)} of zeroes over raw data, on {name}", large, sequential=large,
                     full_base=True, zeroes=True, base_format="raw", **each),
        ]
    return found


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
