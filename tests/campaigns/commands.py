"""The commands besides a plain commit, for the campaigns: each on images of its own. `jobs` says what must hold of them."""

from __future__ import annotations

import random
import shutil

import dirty_bitmaps
import qcow2_bytes
from faults import Case, scribble
from jobs import Adopting, Converting, Job, Merging, Relinking, Repairing
from support import MIB, create, digest, qemu_img, qemu_io


def case(name, directory, words, *others, fmt="qcow2", **more) -> Job:
    if fmt == "qcow2":
        more.setdefault("sequels", [["check", "-q", "-r", "leaks", "IMAGE"]])
    return Job(name, directory, "top", "top", top_fmt=fmt, others=list(others), words=words, **more)


FLATTEN = ["rebase", "-q", "-b", "", "IMAGE"]

# --- rebase ---------------------------------------------------------------------------------------


def family(directory, size=4 * MIB, **options):
    """base <- mid <- top, and `other`, which is longer and reads something else."""
    create(directory / "base", size, cluster_size="16k")
    scribble(directory / "base", 21, "qcow2", size)
    create(directory / "mid", size, backing="base", cwd=directory)
    scribble(directory / "mid", 22, "qcow2", size)
    create(directory / "other", 2 * size)
    scribble(directory / "other", 23, "qcow2", 2 * size)
    create(directory / "top", size, backing="mid", cwd=directory, **options)
    scribble(directory / "top", 24, "qcow2", size)


def rebase_onto_another(directory):
    """New clusters, parts of clusters with what is below, then another name."""
    family(directory, cluster_size="16k")
    return case("a rebase onto another image", directory, ["rebase", "-b", "other", "-F", "qcow2", "IMAGE"],
                "base", "mid", "other", record="other", sequels=[FLATTEN, ["rebase", "-q", "-b", "base", "-F", "qcow2", "IMAGE"]])


def rebase_drops_a_layer(directory):
    """Into subclusters; the bitmap that is enabled records what is written."""
    family(directory, extended_l2="on", cluster_size="16k")
    qemu_img("bitmap", "--add", directory / "top", "one")
    return case("a rebase that drops a layer", directory, ["rebase", "-b", "base", "-F", "qcow2", "IMAGE"],
                "base", "mid", record="base")


def rebase_flattens(directory):
    """One without zero clusters, which then stands alone."""
    family(directory, compat="0.10")
    return case("a rebase onto nothing", directory, ["rebase", "-b", "", "IMAGE"], "base", "mid", record="")


def rebase_names_only(directory):
    """`mid` and `copy` hold the same; the name is longer than the old one."""
    family(directory)
    shutil.copy(directory / "mid", directory / "a-copy-with-a-long-name")
    return case("rebase -u", directory, ["rebase", "-q", "-u", "-b", "a-copy-with-a-long-name", "-F", "qcow2", "IMAGE"],
                "base", "mid", "a-copy-with-a-long-name", record="a-copy-with-a-long-name")


def rebase_qcow(directory):
    """Old tables and no refcounts."""
    create(directory / "base", 2 * MIB, fmt="qcow")
    scribble(directory / "base", 25, "qcow", 2 * MIB)
    create(directory / "other", 2 * MIB, fmt="qcow")
    scribble(directory / "other", 26, "qcow", 2 * MIB)
    create(directory / "top", 2 * MIB, fmt="qcow", backing="base", backing_fmt="qcow", cwd=directory)
    scribble(directory / "top", 27, "qcow", 2 * MIB)
    return case("a rebase of a qcow", directory, ["rebase", "-b", "other", "-F", "qcow", "IMAGE"], "base", "other", fmt="qcow",
                record="other")


def rebase_vmdk(directory):
    """New grains; then what is recorded of the new parent is its content ID."""
    for name, seed in (("base", 28), ("other", 30)):
        create(directory / name, 4 * MIB, fmt="vmdk")
        scribble(directory / name, seed, "vmdk", 4 * MIB, count=2)
    create(directory / "top", backing="base", backing_fmt="vmdk", fmt="vmdk", cwd=directory)
    scribble(directory / "top", 29, "vmdk", 4 * MIB)
    return case("a rebase of a vmdk", directory, ["rebase", "-b", "other", "-F", "vmdk", "IMAGE"], "base", "other", fmt="vmdk",
                record="other")


# --- resize ---------------------------------------------------------------------------------------


def resize_grows(directory):
    """A larger L1 table and longer bitmaps, over a backing file that is longer than the image."""
    create(directory / "base", 9 * MIB)
    scribble(directory / "base", 31, "qcow2", 9 * MIB)
    create(directory / "top", MIB + 512, backing="base", cwd=directory, cluster_size="512")
    scribble(directory / "top", 32, "qcow2", MIB)
    qemu_img("bitmap", "--add", directory / "top", "one")
    qemu_img("snapshot", "-c", "one", directory / "top")
    qemu_io(directory / "top", "write -P 33 512k 64k")
    return case("an overlay that grows", directory, ["resize", "IMAGE", "6M"], "base")


def resize_grows_backwards(directory):
    """A backing that is shorter, and clusters that end past the end."""
    create(directory / "base", MIB)
    scribble(directory / "base", 34, "qcow2", MIB)
    create(directory / "top", 2 * MIB + 512, backing="base", cwd=directory, extended_l2="on")
    qemu_io(directory / "top", f"write -P 35 {2 * MIB} 512", "write -P 36 1M 100k")
    return case("an overlay over a shorter one that grows", directory, ["resize", "IMAGE", "5M"], "base")


def resize_shrinks(directory):
    """The end falls into an L2 table that a snapshot has, too."""
    create(directory / "top", 4 * MIB, cluster_size="4k")
    scribble(directory / "top", 37, "qcow2", 4 * MIB, count=9)
    qemu_img("snapshot", "-c", "one", directory / "top")
    scribble(directory / "top", 38, "qcow2", 4 * MIB)
    return case("an image with a snapshot that shrinks", directory, ["resize", "--shrink", "IMAGE", str(MIB + 1536)])


def resize_shrinks_alone(directory):
    """The clusters that are given back are cut off or become holes."""
    create(directory / "top", 4 * MIB, cluster_size="512", refcount_bits=1)
    qemu_io(directory / "top", "write -P 39 3M 1M", "write -P 40 0 1M")
    return case("an image that shrinks", directory, ["resize", "--shrink", "IMAGE", str(MIB + 512)])


#: What was reserved behind the end of the file, and is not needed, is given back by the last call.
GIVES_BACK = frozenset({"ftruncate"})


def resize_fills(directory):
    """Zeroes take their space."""
    create(directory / "top", MIB)
    scribble(directory / "top", 41, "qcow2", MIB)
    return case("an image that grows and takes its space", directory, ["resize", "--preallocation=full", "IMAGE", "3M"],
                hints=GIVES_BACK)


def resize_reserves(directory):
    """The file system keeps the space of the new clusters."""
    create(directory / "top", MIB)
    scribble(directory / "top", 41, "qcow2", MIB)
    return case("an image that grows and has space reserved", directory, ["resize", "--preallocation=falloc", "IMAGE", "3M"],
                hints=GIVES_BACK)


def resize_of(directory, fmt, *sizes, **options):
    create(directory / "top", sizes[0], fmt=fmt, **options)
    scribble(directory / "top", 42, fmt, min(sizes[0], 2 * MIB), count=3)
    shrink = ["--shrink"] if sizes[1] < sizes[0] else []
    return case(f"a {fmt} that gets another size", directory, ["resize", "-f", fmt, *shrink, "IMAGE", str(sizes[1])], fmt=fmt)


def resize_raw(directory):
    return resize_of(directory, "raw", 2 * MIB, MIB + 512)


def resize_qcow(directory):
    return resize_of(directory, "qcow", 2 * MIB, 40 * MIB)


def resize_vdi(directory):
    """The map needs so much more room that a block moves."""
    return resize_of(directory, "vdi", 2 * MIB, 300 * MIB)


def resize_vpc(directory):
    """The table grows over the first blocks, which move behind the footer."""
    return resize_of(directory, "vpc", 4 * MIB, 600 * MIB, force_size="on")


def resize_vhdx(directory):
    return resize_of(directory, "vhdx", 4 * MIB, 9 * MIB, block_size="1M")


def resize_parallels(directory):
    return resize_of(directory, "parallels", 4 * MIB, 12 * MIB, cluster_size="4k")


def resize_vmdk(directory):
    """The directory has room for the tables; the last grain ends past the disk."""
    return resize_of(directory, "vmdk", 4 * MIB + 512, 70 * MIB)


# --- check -r -------------------------------------------------------------------------------------


def spoiled(directory, **options):
    create(directory / "top", 4 * MIB, **options)
    scribble(directory / "top", 51, "qcow2", 4 * MIB)
    qemu_img("snapshot", "-c", "one", directory / "top")
    scribble(directory / "top", 52, "qcow2", 4 * MIB)
    return qcow2_bytes.Image(directory / "top")


def repair_all(directory):
    """Refcounts and flags of any value, and a refcount block that is missing."""
    inner = spoiled(directory, cluster_size="4k")
    inner.spoil_refcounts(random.Random(53))
    inner.poke64(inner.get("refcount_table_offset"), 0)
    return case("check -r all", directory, ["check", "-r", "all", "IMAGE"])


def repair_leaks(directory):
    """Clusters that nothing refers to, and refcounts that are too high."""
    inner = spoiled(directory)
    with (directory / "top").open("ab") as file:
        file.write(bytes(-inner.file_size % inner.cluster_size + 9 * inner.cluster_size))
    for number in range(1, 9):
        inner.set_refcount(inner.file_size - number * inner.cluster_size, number)
    return case("check -r leaks", directory, ["check", "-r", "leaks", "IMAGE"])


def repair_mark(directory, fmt, seed, at, value):
    """A number of its header, at this byte, says what is not so."""
    create(directory / "top", 4 * MIB, fmt=fmt)
    scribble(directory / "top", seed, fmt, 4 * MIB)
    with (directory / "top").open("r+b") as file:
        file.seek(at)
        file.write(value.to_bytes(4, "little"))
    return case(f"check -r all of a {fmt}", directory, ["check", "-r", "all", "IMAGE"], fmt=fmt)


def repair_parallels(directory):
    return repair_mark(directory, "parallels", 54, 44, 0x746F6E59)


def repair_vdi(directory):
    return repair_mark(directory, "vdi", 55, 388, 7)


def repair_vmdk(directory):
    """Second copies of grain tables of which a power loss left the entries of before, and the mark of an open extent."""
    image = directory / "top"
    create(image, 70 * MIB, fmt="vmdk")
    scribble(image, 56, "vmdk", 4 * MIB)
    qemu_io(image, "write -P 57 40M 1M", fmt="vmdk")
    undamaged, whole = digest(image), image.read_bytes()
    number = lambda at, size: int.from_bytes(whole[at:at + size], "little")  # noqa: E731
    damaged = bytearray(whole)
    damaged[72] = 1
    for index in range(3):
        first, second = (number(number(copy, 8) * 512 + index * 4, 4) * 512 for copy in (56, 48))
        assert first != second and whole[first:first + 2048] == whole[second:second + 2048]
        damaged[second:second + 2048] = bytes(2048)
    assert damaged != whole
    image.write_bytes(damaged)
    return Repairing("check -r all of a vmdk", directory, "top", "top", top_fmt="vmdk",
                     words=["check", "-r", "all", "IMAGE"], undamaged=undamaged)


# --- commits with more than that ------------------------------------------------------------------


def relink(directory):
    """Two children, by name and by directory."""
    create(directory / "base", MIB, fmt="raw")
    qemu_io(directory / "base", "write -P 1 0 512k", fmt="raw")
    create(directory / "mid", MIB, backing="base", backing_fmt="raw", cwd=directory)
    qemu_io(directory / "mid", "write -P 2 64k 128k")
    for name in ("one", "two"):
        create(directory / name, MIB, backing="mid", cwd=directory)
        qemu_io(directory / name, "write -P 3 512k 64k")
    return Relinking("children of a merged overlay", directory, "mid", "base", base_fmt="raw",
                     args=["--relink", str(directory / "one"), "--relink-in", str(directory)], others=["one", "two"])


def merge_bitmaps(directory):
    """One that both have, and one that is made."""
    create(directory / "base", 4 * MIB, cluster_size="512")
    dirty_bitmaps.add(directory / "base", "both", "-g", "512")
    scribble(directory / "base", 61, "qcow2", 4 * MIB, count=2)
    create(directory / "top", backing="base", cwd=directory)
    dirty_bitmaps.add(directory / "top", "both")
    scribble(directory / "top", 62, "qcow2", 4 * MIB, count=2)
    dirty_bitmaps.add(directory / "top", "late")
    scribble(directory / "top", 63, "qcow2", 4 * MIB, count=2)
    return Merging("a commit with bitmaps", directory, "top", "base", args=["--bitmaps"])


def wipe(directory):
    """What is given back is overwritten first."""
    create(directory / "base", 4 * MIB)
    create(directory / "top", backing="base", cwd=directory, cluster_size="4k")
    scribble(directory / "top", 64, "qcow2", 4 * MIB, count=3)
    return Case("a commit that wipes", directory, "top", "base", args=["--wipe"])


def adopt(directory):
    """A layer between them, and one below; other clusters than the base's."""
    family(directory)
    return Adopting("a commit by adoption", directory, "top", "mid", others=["base"])


def adopt_flattens(directory):
    """Over two layers, to stand alone."""
    family(directory, cluster_size="4k")
    return Adopting("a commit by adoption of all layers", directory, "top", "base", others=["mid"])


# --- convert --------------------------------------------------------------------------------------


def convert(directory):
    """A chain into a new file."""
    family(directory)
    return Converting("a conversion", directory, "top", "top", others=["base", "mid"],
                      words=["convert", "-q", "-O", "qcow2", "IMAGE"])


def convert_replaces(directory):
    """The new image takes the name of an older one."""
    family(directory)
    create(directory / "new", MIB)
    return Converting("a conversion over an older image", directory, "top", "top", others=["base", "mid"], old="new",
                      target_fmt="vmdk", words=["convert", "-q", "-O", "vmdk", "IMAGE"])


def convert_compresses(directory):
    """Streams that share clusters, and some clusters that do not shrink."""
    family(directory)
    return Converting("a conversion that compresses", directory, "top", "top", others=["base", "mid"],
                      words=["convert", "-q", "-c", "-O", "qcow2", "-o", "cluster_size=4k", "IMAGE"])


def convert_into_parts(directory):
    """The new image is two files, the one that names the other last."""
    family(directory)
    return Converting("a conversion into several files", directory, "top", "top", others=["base", "mid"], target="new.vmdk",
                      parts=("new-flat.vmdk",), target_fmt="vmdk",
                      words=["convert", "-q", "-O", "vmdk", "-o", "subformat=monolithicFlat", "IMAGE"])


REBASES = [rebase_onto_another, rebase_drops_a_layer, rebase_flattens, rebase_names_only, rebase_qcow, rebase_vmdk]
RESIZES = [resize_grows, resize_grows_backwards, resize_shrinks, resize_shrinks_alone, resize_fills, resize_reserves, resize_raw,
           resize_qcow, resize_vdi, resize_vpc, resize_vhdx, resize_parallels, resize_vmdk]
REPAIRS = [repair_all, repair_leaks, repair_parallels, repair_vdi, repair_vmdk]
COMMITS = [relink, merge_bitmaps, wipe, adopt, adopt_flattens]
CONVERSIONS = [convert, convert_replaces, convert_compresses, convert_into_parts]
ALL = [*REBASES, *RESIZES, *REPAIRS, *COMMITS, *CONVERSIONS]
