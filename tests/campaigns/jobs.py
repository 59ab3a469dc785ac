"""What must hold of the commands besides a plain commit, for the campaigns: each is run again and again from the same start.

What must hold whatever happens: the image reads what it read before, or what it reads afterwards; nobody else's file changes;
`qemu-img check` finds nothing that was not there before, but for leaks; and a second run finishes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from dataclasses import dataclass, field

import dirty_bitmaps
import support
from faults import Case
from support import MIB, qemu_img

# Formats that qemu-img has no check for; and one of which it calls a count damage that instar, and QEMU itself, survive.
UNCHECKED = ("raw", "vpc", "qcow", "vdi")


def named(path):
    """The backing file that an image records, and its format."""
    said = support.info(path)
    return said.get("backing-filename"), said.get("backing-filename-format")


def digest_of(flat, size=None):
    """Of the bytes of a raw image, as if it had this size: they depend on content, and not on holes."""
    if size is not None:
        os.truncate(flat, size)
    found = hashlib.sha256(str(flat.stat().st_size).encode())
    with flat.open("rb") as file:
        for offset in support.data_blocks(file, flat.stat().st_size):
            block = os.pread(file.fileno(), 4096, offset)
            if block.strip(b"\0"):
                found.update(offset.to_bytes(8, "big") + block)
    return found.hexdigest()


@dataclass
class Job(Case):
    """A command on the image `top`. The words are its arguments; `IMAGE` stands for the path of the image."""

    words: list[str] = field(default_factory=list)
    record: str | None = None

    def __post_init__(self):
        self.pristine = self.directory.with_name(self.directory.name + ".pristine")
        shutil.copytree(self.directory, self.pristine)
        self.kept = {name: support.digest(self.path(name)) for name in self.others}
        self.errors = self.corruptions()
        before, self.snapshots = self.reading(), self.read_snapshots()
        whole = self.flat().rename(self.directory / "before.raw")
        done = self.again()
        assert done.rc == 0, str(done)
        self.after = self.reading()
        # It changes nothing that is read, or the size, and nothing else.
        wanted = digest_of(whole, support.virtual_size(self.path(self.top), self.top_fmt))
        assert self.after == wanted and (self.words[0] == "resize") == (self.after != before), self.name
        whole.unlink()
        self.expected = {before, self.after}
        self.reset()

    def goes_on(self, sequel):
        return True

    def files(self):
        return [self.path(self.top), *(self.path(name) for name in self.others)]

    def reset(self):
        for path in self.files():
            shutil.copyfile(self.pristine / path.name, path)

    def command(self):
        return [self.path(self.top) if word == "IMAGE" else word for word in self.words]

    def flat(self):
        flat = self.directory / "flat.raw"
        qemu_img("convert", "-f", self.top_fmt, "-O", "raw", self.path(self.top), flat)
        return flat

    def reading(self):
        """What a guest reads, and of which size it is."""
        flat = self.flat()
        found = digest_of(flat)
        flat.unlink()
        return found

    def read_snapshots(self):
        """What the internal snapshots read as: the first MiB, as QEMU shows no more of them than the image has."""
        if self.top_fmt != "qcow2":
            return {}
        found = {}
        for snapshot in support.info(self.path(self.top)).get("snapshots", []):
            flat = self.directory / "flat.raw"
            qemu_img("convert", "-l", snapshot["name"], "-O", "raw", self.path(self.top), flat)
            found[snapshot["name"]] = flat.read_bytes()[:MIB]
            flat.unlink()
        return found

    def corruptions(self) -> int:
        if self.top_fmt in UNCHECKED:
            return 0
        check = qemu_img("check", "--output", "json", "-f", self.top_fmt, self.path(self.top), rc=None)
        assert check.rc in (0, 2, 3), str(check)
        return check.json.get("corruptions", 0)

    # --- what must hold ---------------------------------------------------------------------------

    def check_images(self, result, finished):
        for name, digest in self.kept.items():
            self.hold(support.digest(self.path(name)) == digest, f"{name} has changed", result)
        if self.top_fmt not in ("vhdx", "parallels"):
            self.check_files(result, finished)
            return
        # QEMU reads no image whose log is to be replayed, and calls one damaged that was not closed: it repairs a copy.
        whole = self.path(self.top).with_name("whole")
        shutil.copyfile(self.path(self.top), whole)
        qemu_img("check", "-q", "-r", "all", "-f", self.top_fmt, self.path(self.top), rc=None)
        self.check_files(result, finished)
        whole.replace(self.path(self.top))

    def check_files(self, result, finished):
        digest = self.reading()
        self.hold(digest in self.expected, "the image reads neither what it read nor what it is to read", result)
        self.hold(not finished or digest == self.after, "the image reads something else at the end", result)
        found = self.corruptions()
        self.hold(found <= (0 if finished else self.errors), f"{found} corruptions, {self.errors} before", result)
        self.hold(self.read_snapshots() == self.snapshots, "a snapshot reads differently", result)
        if self.record is not None and finished:
            self.hold((named(self.path(self.top))[0] or "") == self.record, "the new backing file is not recorded", result)


@dataclass
class Repairing(Job):
    """A repair that makes the image the one that it was before the damage, to the byte: the oracle of what QEMU does not look at."""

    #: The digest of the image before the damage.
    undamaged: tuple = ()

    def check_files(self, result, finished):
        super().check_files(result, finished)
        same = support.digest(self.path(self.top)) == self.undamaged
        self.hold(not finished or same, "the image is not the one that it was before the damage", result)


@dataclass
class Relinking(Case):
    """A commit that relinks children: what they read is looked at with every check of the case."""

    child_fmt: str = "qcow2"

    def __post_init__(self):
        super().__post_init__()
        self.children = {name: support.content_hash(self.path(name), self.child_fmt) for name in self.others}

    def check_files(self, result, finished):
        super().check_files(result, finished)
        for name, expected in self.children.items():
            path = self.path(name)
            fmt = self.child_fmt
            self.hold(support.content_hash(path, fmt) == expected, f"{name} reads differently", result)
            if fmt not in UNCHECKED:
                check = qemu_img("check", "-f", fmt, path, rc=None)
                self.hold(check.rc == 0, f"{name} is damaged", f"{result}\n{check}")
            # A whole path, where the relative one could not be followed.
            record = os.path.basename(named(path)[0])
            self.hold(record in (self.top, self.base), f"{name} names {record}", result)
            # What could not be looked at is told.
            told = "could not be looked at" in str(result)
            self.hold(not finished or record == self.base or told, f"{name} names {record} at the end", result)


@dataclass
class Merging(Case):
    """A commit that merges bitmaps: they call dirty at least what they did, and in the end what the overlay's did, too."""

    def __post_init__(self):
        super().__post_init__()
        self.dirty = {name: dirty_bitmaps.dirty(self.path(self.base), name) for name in dirty_bitmaps.names(self.path(self.base))}
        self.own = {name: dirty_bitmaps.dirty(self.path(self.top), name) for name in dirty_bitmaps.names(self.path(self.top))}

    def check_files(self, result, finished):
        super().check_files(result, finished)
        base = self.path(self.base)
        found = {name: dirty_bitmaps.dirty(base, name) for name in dirty_bitmaps.names(base)}
        wanted = [*self.dirty.items(), *(self.own.items() if finished else ())]
        for name, ranges in wanted:
            covered = name in found and dirty_bitmaps.within(ranges, found[name])
            self.hold(covered, f"the bitmap {name} says {found.get(name)}, and not {ranges}", result)


@dataclass
class Adopting(Case):
    """A commit in which the overlay takes the base's place: the base is what it was, or all that it is to be."""

    deleted: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.args = ["-q", "--by-adoption", "-b", self.base]
        self.before = support.digest(self.path(self.base))
        self.kept = {name: support.digest(self.path(name)) for name in self.others}

    def traced(self):
        return [self.directory]

    def check_files(self, result, finished):
        for name, digest in self.kept.items():
            self.hold(support.digest(self.path(name)) == digest, f"{name} has changed", result)
        if not self.is_removed():
            self.hold(support.digest(self.path(self.base)) == self.before, "the base has changed", result)
            self.hold(support.content_hash(self.path(self.top)) == self.expected, "the overlay reads differently", result)
            check = qemu_img("check", self.path(self.top), rc=None)
            self.hold(check.rc in (0, 3), "the overlay is damaged", f"{result}\n{check}")
            return
        self.hold(support.content_hash(self.path(self.base)) == self.expected, "the base is not whole", result)
        self.check_metadata(self.path(self.base), "qcow2", result)


@dataclass
class Converting(Job):
    """A chain becomes a new image, which is there whole or not at all; what stood at its name stays until then."""

    old: str = ""
    target: str = "new"
    target_fmt: str = "qcow2"
    #: The other files of the new image, which are not overwritten: what a kill left of them is removed, as the refusal says.
    parts: tuple = ()

    def run(self, *args):
        self.remove_parts()
        return super().run(*args)

    def again(self):
        self.remove_parts()
        return super().again()

    def remove_parts(self):
        for name in self.parts:
            self.path(name).unlink(missing_ok=True)

    def __post_init__(self):
        self.kept = {name: support.digest(self.path(name)) for name in self.files_of_source()}
        self.pristine = self.directory.with_name(self.directory.name + ".pristine")
        shutil.copytree(self.directory, self.pristine)
        self.before = support.digest(self.path(self.old)) if self.old else None
        self.wanted = support.content_hash(self.path(self.top), self.top_fmt)

    def files_of_source(self):
        return [self.top, *self.others]

    def files(self):
        return [self.path(name) for name in (self.target, *self.parts, *self.files_of_source())]

    def traced(self):
        return [self.directory]

    def command(self):
        return [*super().command(), self.path(self.target)]

    def reset(self):
        for path in self.directory.iterdir():
            path.unlink()
        for path in self.pristine.iterdir():
            shutil.copyfile(path, self.directory / path.name)

    def check_images(self, result, finished):
        for name, digest in self.kept.items():
            self.hold(support.digest(self.path(name)) == digest, f"{name} has changed", result)
        target = self.path(self.target)
        now = support.digest(target) if target.exists() else None
        self.hold(not finished or now != self.before, "there is no new image", result)
        if now != self.before:
            self.hold(support.content_hash(target, self.target_fmt) == self.wanted, "the new image is not whole", result)
            if self.target_fmt not in UNCHECKED:
                check = qemu_img("check", "-f", self.target_fmt, target, rc=None)
                self.hold(check.rc == 0, "the new image is damaged", f"{result}\n{check}")
        more = {path.name for path in self.directory.iterdir()} - {path.name for path in self.pristine.iterdir()}
        # What is killed leaves the new image under a temporary name.
        left = {name for name in more if name.startswith(f".{self.target}.instar-") and "KILL" in str(result)}
        # Its parts get their names before it does.
        left |= set(self.parts) if now != self.before or "KILL" in str(result) else set()
        self.hold(more <= {self.target, *left}, f"there are {more}", result)
