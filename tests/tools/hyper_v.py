"""VHD and VHDX in the tests: what makes them, and what reads them besides this project."""

from __future__ import annotations

import os

import pyvhdi
from support import MIB, qemu_img, run_instar, untouched


def make(fmt, path, *options, size=None, rc=0):
    """Has instar create an image."""
    args = [path] if size is None else [path, str(size)]
    result = run_instar("create", "-q", "-f", fmt, *options, *args)
    assert result.rc == rc, str(result)
    return result


def check(path, rc=0):
    """What `instar check` says of an image."""
    result = run_instar("check", "--output", "json", path)
    assert result.rc == rc, str(result)
    return result.json


def by_qemu(fmt, path) -> bytes:
    """What qemu reads of an image without a parent."""
    raw = path.with_suffix(".asraw")
    qemu_img("convert", "-f", fmt, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def by_libvhdi(*chain) -> bytes:
    """What libvhdi reads of a chain, the top-most first."""
    files = []
    for path in chain:
        files.append(pyvhdi.file())
        files[-1].open(os.fspath(path))
    for child, parent in zip(files, files[1:], strict=False):
        child.set_parent(parent)
    data = files[0].read_buffer(files[0].get_media_size())
    for file in files:
        file.close()
    return data


def check_what_is_left_of_a_cut_file(image, content, new):
    """A file of eight blocks of 2 MiB that is cut off, as `docs/check.md` says of it: a repair makes nothing up, and once the file is
    longer again, what is left of it can be converted to `new`."""
    whole, length = content(image), image.stat().st_size
    os.truncate(image, length - 5 * MIB)
    for options in ([], ["-r", "all"]):
        with untouched(image):
            result = run_instar("check", *options, image)
        assert result.rc == 2 and "past the end of the file" in result.stdout + result.stderr, str(result)
        assert not options or "every repair of that would give up data" in result.stdout + result.stderr, str(result)
    with untouched(image):
        assert run_instar("convert", "-O", "raw", image, new).rc == 1
    os.truncate(image, length + 4 * MIB)
    result = run_instar("convert", "-O", "raw", image, new)
    assert result.rc == 0, str(result)
    found = new.read_bytes()
    kept = sum(found[at : at + 512] == whole[at : at + 512] for at in range(0, 16 * MIB, 2 * MIB))
    assert 5 <= kept < 8 and all(read in (old, 0) for read, old in zip(found, whole, strict=True))
