"""VHD and VHDX in the tests: what makes them, and what reads them besides this project."""

from __future__ import annotations

import os

import pyvhdi
from support import qemu_img, run_instar


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
