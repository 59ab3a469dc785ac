"""What this version does not do, refused by name and before any change.

A row that starts to work belongs into another file, with content as its oracle.
"""

from __future__ import annotations

import re
import shlex

import pytest
import qcow2_bytes
import support
from support import KIB, MIB, refuse

TOP = ["write -P 1 0 1M", "write -z 2M 256k"]
SECRET = ["--object", "secret,id=key,data=words"]




def luks_overlay(pair):
    pair.make()
    support.qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o",
                     "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", pair.top)


def luks_backing(pair):
    pair.make(top=TOP)
    support.qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-o",
                     "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", pair.base, "4M")


def data_file_overlay(pair):
    """It does not say which one it has."""
    pair.make(top=TOP)
    image = qcow2_bytes.Image(pair.top)
    image.set("incompatible", image.get("incompatible") | 4)


def data_file_backing(pair):
    pair.make(base=["write -P 9 0 2M"], top=TOP)
    image = qcow2_bytes.Image(pair.base)
    image.set("incompatible", image.get("incompatible") | 4)


def bit(side, field, value):
    """A feature bit that is set by hand."""

    def spoil(pair):
        pair.make(base=["write -P 9 0 2M"], top=TOP)
        image = qcow2_bytes.Image(getattr(pair, side))
        image.set(field, image.get(field) | value)

    spoil.__name__ = f"{field}_{value:#x}_{side}"
    return spoil


UNSUPPORTED, EXTERNAL, LUKS = "ERROR_UNSUPPORTED_FORMAT", "ERROR_EXTERNAL_DATA_FILE", "ERROR_LUKS_UNSUPPORTED"

#: how the pair is made, the side that is named, the code, a word of the message
TABLE = [
    (luks_overlay, "top", LUKS, "encrypt"),
    (luks_backing, "base", LUKS, "encrypt"),
    (data_file_overlay, "top", EXTERNAL, "data file"),
    (data_file_backing, "base", EXTERNAL, "data file"),
    (bit("top", "incompatible", 1 << 20), "top", UNSUPPORTED, "feature"),
    (bit("base", "incompatible", 1 << 63), "base", UNSUPPORTED, "feature"),
]


@pytest.mark.parametrize(("make", "side", "name", "word"), TABLE, ids=lambda v: getattr(v, "__name__", None))
def test_refused_by_name(pair, make, side, name, word):
    make(pair)
    others = [path for path in pair.dir.iterdir() if path != pair.top]
    refuse(name, pair.top, files=others, mentions=[getattr(pair, side), word])


# --- what looks like a refusal and is none ----------------------------------------------------------


@pytest.mark.parametrize("side", ["top", "base"])
def test_unknown_compatible_bit_is_kept(pair, side):
    pair.make(base=["write -P 9 0 2M"], top=TOP)
    image = qcow2_bytes.Image(getattr(pair, side))
    image.set("compatible", 1 << 40)
    pair.check_commit()
    assert image.get("compatible") & 1 << 40


@pytest.mark.parametrize("side", ["top", "base"])
def test_lazy_refcounts_without_the_dirty_bit(pair, side):
    pair.make(top_options={"lazy_refcounts": "on"} if side == "top" else None,
              base_options={"lazy_refcounts": "on"} if side == "base" else None,
              base=["write -P 9 0 2M"], top=TOP)
    pair.check_commit()
    for path in (pair.top, pair.base):
        assert qcow2_bytes.Image(path).get("incompatible") & 1 == 0


def test_compressed_clusters_that_the_commit_does_not_touch(pair):
    pair.make(base=["write -c -P 5 3M 64k", f"write -c -P 6 {3 * MIB + 64 * KIB} 64k"], top=TOP)
    pair.check_commit()


ENCRYPTED = [("qcow2", "luks"), ("qcow2", "aes"), ("qcow", "AES")]


@pytest.mark.parametrize("fmt, method", ENCRYPTED)
def test_every_command_advises_the_same_about_encryption(tmp_path, fmt, method):
    """And what it advises works."""
    image, secret = tmp_path / "image", tmp_path / "passphrase"
    secret.write_text("0123456789abcdef")
    keys = ["--object", f"secret,id=s,file={secret}"]
    if method == "luks":
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
        support.qemu_img("create", "-f", fmt, *keys, "-o", options, image, "4M")
        given = f"driver={fmt},encrypt.key-secret=s,file.filename={image}"
        assert support.run("qemu-io", *keys, "--image-opts", given, "-c", "write -P 7 0 64k").rc == 0
    else:
        # QEMU makes no such images any more.
        support.qemu_img("create", "-f", fmt, image, "4M")
        data = bytearray(image.read_bytes())
        at = 32 if fmt == "qcow2" else 36
        data[at:at + 4] = (1).to_bytes(4, "big")
        image.write_bytes(data)
    new = tmp_path / "new"
    messages = set()
    for args in (["check", image], ["map", image], ["measure", "-O", "raw", image], ["compare", image, image],
                 ["convert", "-O", "raw", image, new], ["resize", image, "8M"]):
        with support.untouched(image):
            refused = support.run_instar(*args)
        assert refused.rc == (2 if args[0] == "compare" else 1), str(refused)
        assert f"encryption ({method}) is not supported" in refused.stderr and "(ERROR_LUKS_UNSUPPORTED)" in refused.stderr
        messages.add(re.search(r"`(qemu-img convert .*)`", refused.stderr)[1])
    (advice,) = messages
    words = [word.replace("PASSPHRASE", str(secret)).replace("IMAGE", str(image)).replace("NEW", str(new)) for word in shlex.split(advice)]
    done = support.run(*words)
    assert done.rc == 0, str(done)
    assert support.run_instar("check", new).rc == 0
    if method == "luks":
        assert new.exists() and b"\x07" * 4096 in new.read_bytes()
