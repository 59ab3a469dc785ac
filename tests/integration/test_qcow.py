"""qcow version 1: as overlay, backing and ancestor. Oracles: `qemu-img`, which reads, writes and commits all of it, and the reader
of `qcow_bytes`. What QEMU cannot make (other sizes of clusters and tables) the maker there does."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import struct

import pytest
import support
from qcow_bytes import Image, content, make
from support import KIB, MIB, create, qemu_img, qemu_io, refuse, run_instar

SEEDS = 96 if os.environ.get("INSTAR_DEEP") else 6


def raw(path, fmt="qcow"):
    """The bytes that a guest reads, by qemu."""
    to = path.parent / "read.tmp"
    qemu_img("convert", "-f", fmt, "-O", "raw", path, to)
    data = to.read_bytes()
    to.unlink()
    return data


def writes(rng, size, count, fmt, cluster=0):
    """Commands for qemu-io. A qcow has no zeroes; with `cluster`, some of its clusters are compressed, each by a command."""
    for _ in range(count):
        at = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 3 * KIB, 64 * KIB, 200 * KIB]), size - at)
        fill = f"-P {rng.randrange(1, 255)}"
        first = at // cluster * cluster if cluster else 0
        if cluster and rng.random() < 0.4:
            ends = range(first, min(first + rng.randrange(1, 9) * cluster, size // cluster * cluster), cluster)
            yield from (f"write -c {fill} {place} {cluster}" for place in ends)
        elif fmt == "qcow2" and rng.random() < 0.3:
            yield f"write -z {at} {length}"
        else:
            yield f"write {fill} {at} {length}"


def check(path):
    """Nothing is wrong with an image, by `instar check` and by the reader; qemu-img has no check for it."""
    result = run_instar("check", "--output", "json", path)
    assert result.rc == 0, str(result)
    Image(path).assert_consistent()


def assert_empty(path):
    image = Image(path)
    assert not image.mapped and len(image.bytes) == image.l1_end


@pytest.mark.parametrize("top_fmt,base_fmt", [("qcow", "qcow"), ("qcow2", "qcow"), ("qcow", "qcow2"), ("qcow", "raw")])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_commit_as_qemu_does_it(tmp_path, seed, top_fmt, base_fmt):
    rng = random.Random(f"{seed} {top_fmt} {base_fmt}")
    size = rng.randrange(1, 9) * MIB - rng.choice([0, 512, 300 * KIB])
    base, top = tmp_path / "base", tmp_path / "top"
    create(base, size, fmt=base_fmt)
    qemu_io(base, *writes(rng, size, 8, base_fmt, 4096 * (base_fmt == "qcow")), fmt=base_fmt)
    create(top, size, fmt=top_fmt, backing="base", backing_fmt=base_fmt)
    qemu_io(top, *writes(rng, size, 8, top_fmt, 512 * (top_fmt == "qcow")), fmt=top_fmt)
    wanted = raw(top, top_fmt)
    options = ["-F", base_fmt] if top_fmt == "qcow" else []
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in (base, top):
        shutil.copy(path, theirs)
    qemu_img("commit", "-q", "-f", top_fmt, top.name, cwd=theirs)
    support.commit(top, *options)
    assert raw(base, base_fmt) == wanted == raw(theirs / "base", base_fmt)
    assert raw(top, top_fmt) == wanted
    if base_fmt == "qcow":
        check(base)
        assert content(base) == wanted
    if top_fmt == "qcow":
        check(top)
        assert_empty(top)
    # qemu writes to both, and they are committed once more.
    qemu_io(base, *writes(rng, size, 3, base_fmt), fmt=base_fmt)
    qemu_io(top, *writes(rng, size, 5, top_fmt), fmt=top_fmt)
    wanted = raw(top, top_fmt)
    support.commit(top, *options)
    assert raw(base, base_fmt) == wanted == raw(top, top_fmt)
    if base_fmt == "qcow":
        check(base)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_clusters_and_tables_of_other_sizes(tmp_path, seed):
    rng = random.Random(1000 + seed)
    size = rng.randrange(1, 6) * MIB - rng.choice([0, 512, 300 * KIB])

    def image(name, backing):
        bits = rng.randrange(9, 17)
        count = -(-size >> bits)
        numbers = rng.sample(range(count), rng.randrange(min(count, 60) + 1))
        data = {number: rng.randbytes(64).ljust(1 << bits, b"\7") for number in numbers}
        packed = rng.sample(numbers, len(numbers) // 2)
        where = rng.choice([None, 512, 4096])
        shape = {"cluster_bits": bits, "l2_bits": rng.randrange(6, 14), "l1_at": where}
        return make(tmp_path / name, size, data, backing=backing, packed=packed, **shape)

    root, base, top = image("root", ""), image("base", "root"), image("top", "base")
    wanted = content(top, base, root)
    assert raw(top) == wanted, "the maker and qemu"
    with support.untouched(root):
        support.commit(top)
    assert raw(base) == wanted == content(base, root) == raw(top)
    check(base)
    assert_empty(top)
    if rng.random() < 0.5:
        # All of a longer chain into its lowest image.
        upper = image("top", "base")
        wanted = content(upper, base, root)
        support.commit(upper, "-b", root)
        assert raw(root) == wanted == content(upper, base, root)
        check(root)


@pytest.mark.parametrize("was,new", [("1M", "2M"), ("3M", "100M"), ("3583K", "1G"), ("130M", "3G")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_base_grows(tmp_path, was, new, packed):
    """QEMU cannot resize it. The L1 table becomes longer where it has to, and moves behind the data."""
    base, top = tmp_path / "base", tmp_path / "top.qcow2"
    create(base, was, fmt="qcow")
    old = Image(base)
    last = old.size // 4096 * 4096
    qemu_io(base, "write -P 1 0 300k", f"write -P 2 {old.size - 8192} 8192", fmt="qcow")
    if packed:
        at = last if last < old.size else 4096
        qemu_io(base, f"write -c -P 3 {at} {min(4096, old.size - at)}", fmt="qcow")
    create(top, new, backing="base", backing_fmt="qcow")
    end = support.virtual_size(top)
    qemu_io(top, "write -P 3 100k 1k", f"write -P 4 {end - 70 * KIB} 64k")
    flat = support.flatten(top, tmp_path / "flat.qcow2")
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, files=[base])
    support.commit(top, "--resize-backing")
    support.assert_same_content(base, flat, "qcow")
    check(base)
    now = Image(base)
    assert now.size == end and (now.l1 != old.l1) == (-(-end // (2 * MIB)) > -(-old.size // (2 * MIB)))
    qemu_io(base, f"write -P 6 {end - MIB + 512} 1k", f"write -P 7 {old.size} 512", fmt="qcow")
    check(base)


def test_what_lies_below_keeps_it_from_growing(tmp_path):
    root, base, top = tmp_path / "root", tmp_path / "base", tmp_path / "top"
    create(root, "3M", fmt="qcow")
    create(base, "1M", fmt="qcow", backing="root", backing_fmt="qcow")
    create(top, "4M", fmt="qcow", backing="base", backing_fmt="qcow")
    qemu_io(top, "write -P 3 2M 1k", fmt="qcow")
    mentions = ["what lies below it is longer"]
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "--resize-backing", files=[base, root], mentions=mentions)


def test_in_a_chain_with_other_formats(tmp_path):
    """Below the target it fills clusters up, and above it is merged with others."""
    root, base = tmp_path / "root.vmdk", tmp_path / "base.qcow"
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow"
    create(root, "6M", fmt="vmdk")
    qemu_io(root, "write -P 1 0 6M", fmt="vmdk")
    create(base, fmt="qcow", backing="root.vmdk", backing_fmt="vmdk")
    qemu_io(base, "write -P 2 1M 300k", "write -c -P 3 2M 512", fmt="qcow")
    create(middle, backing="base.qcow", backing_fmt="qcow", cluster_size=2 * MIB)
    qemu_io(middle, "write -P 4 2560k 64k", "write -z 3M 64k")
    create(top, fmt="qcow", backing="middle.qcow2", backing_fmt="qcow2")
    qemu_io(top, "write -P 5 2561k 1k", "write -P 6 5M 512", fmt="qcow")
    wanted = raw(top)
    with support.untouched(root, base):
        support.commit(top)
    assert raw(middle, "qcow2") == wanted == raw(top)
    qemu_io(top, "write -P 7 100k 3k", fmt="qcow")
    wanted = raw(top)
    with support.untouched(root):
        support.commit(top, "-b", base)
    assert raw(base) == wanted
    check(base)
    assert run_instar("compare", top, base).rc == 0
    mapped = run_instar("map", "--output", "json", base)
    assert mapped.rc == 0 and {entry["depth"] for entry in mapped.json} == {0, 1}, str(mapped)


def test_create_as_qemu_does(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
        create(directory / "base", "5M")
    for name, options in [("single", ["3583k"]), ("large", ["3T"]), ("child", ["-b", "base", "-F", "qcow2"])]:
        args = [*options, name] if name == "child" else [name, *options]
        result = run_instar("create", "-q", "-f", "qcow", *args, cwd=ours)
        assert result.rc == 0, str(result)
        qemu_img("create", "-q", "-f", "qcow", *args, cwd=theirs)
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    info = run_instar("info", "--output", "json", ours / "child").json
    assert (info["format"], info["virtual-size"], info["backing-filename"]) == ("qcow", 5 * MIB, "base")
    qemu_io(ours / "child", "write -P 1 1M 3k", fmt="qcow")
    wanted = raw(ours / "child")
    support.commit(ours / "child")
    assert raw(ours / "base", "qcow2") == wanted
    create(ours / "disk.raw", MIB, fmt="raw")
    result = run_instar("create", "-f", "qcow", "-b", "disk.raw", "-F", "raw", "refused", cwd=ours)
    assert result.rc == 1 and "cannot record that its backing file is raw" in result.stderr, str(result)
    assert not (ours / "refused").exists()


def test_what_is_measured_is_enough(tmp_path):
    create(tmp_path / "src", "9M")
    qemu_io(tmp_path / "src", "write -P 1 0 3M", "write -P 2 7M 512")
    measured = run_instar("measure", "--output", "json", "-O", "qcow", tmp_path / "src").json
    qemu_img("convert", "-O", "qcow", tmp_path / "src", tmp_path / "made")
    assert (tmp_path / "made").stat().st_size <= measured["required"] <= measured["fully-allocated"]


def test_what_is_refused_by_name(tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"

    def fresh(path, *changes):
        make(base, 3 * MIB, {0: b"\1" * 4096, 300: b"\2" * 4096}, packed=[300])
        make(top, 3 * MIB, {1: b"\3" * 512, 9: b"\4" * 512}, cluster_bits=9, l2_bits=12, backing="base", packed=[9])
        data = bytearray(path.read_bytes())
        for fmt, at, number in changes:
            struct.pack_into(fmt, data, at, number)
        path.write_bytes(data)

    for path in (base, top):
        fresh(path, (">I", 36, 1))
        refuse("ERROR_LUKS_UNSUPPORTED", top, files=[base], mentions=["encryption (AES)"])
        corrupt = "ERROR_OVERLAY_CORRUPT" if path == top else "ERROR_BACKING_CORRUPT"
        fresh(path)
        image = Image(path)
        table = image.tables[0]
        for change, mention in [
            ((">Q", table + 80, 1 << 40), "past the end of the file"),
            ((">Q", table + 80, 100), "not the start of a cluster"),
            ((">Q", table + 80, table), "something else uses"),
            ((">Q", table + 80, 1 << 63 | 5 << (63 - image.cluster_bits)), "the header or the L1 table"),
            ((">Q", image.l1, 7), "not the start of a cluster"),
        ]:
            fresh(path, change)
            refuse(corrupt, top, files=[base], mentions=[mention])
        assert run_instar("check", path).rc == 2
    # A raw backing has to be named: nothing records it.
    fresh(top)
    base.write_bytes(bytes(3 * MIB))
    refuse("ERROR_UNSUPPORTED_FORMAT", top, files=[base], mentions=["begins like no known format"])
    wanted = content(top)
    support.commit(top, "-F", "raw")
    assert base.read_bytes() == wanted and b"\3" * 512 in wanted


def test_a_raw_base_can_be_recorded_in_another_format(tmp_path):
    """A QCOW records no format, so that its chain cannot be read without -F: what is advised makes one that can be."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow"
    base.write_bytes(b"\1" * 3 * MIB)
    create(top, None, fmt="qcow", backing=base.name, backing_fmt="raw")
    qemu_io(top, "write -P 2 1M 64k", fmt="qcow")
    result = run_instar("map", top)
    advised = re.search(r"`instar (convert .*) NEW`", result.stderr)
    assert result.rc == 1 and advised, str(result)
    new = tmp_path / "new.qcow2"
    assert run_instar(*shlex.split(advised[1]), new, cwd=tmp_path).rc == 0
    assert run_instar("map", new).rc == 0
    # It takes the place of the other one.
    top.unlink()
    support.commit(new)
    assert base.read_bytes() == b"\1" * MIB + b"\2" * 64 * KIB + b"\1" * (2 * MIB - 64 * KIB)


def test_an_image_that_is_said_to_be_raw(tmp_path):
    """Nothing records the format of the base. Its mark and its length say that `-F raw` is wrong; its mark alone may be the
    guest's."""
    base, top = tmp_path / "base.qcow", tmp_path / "top.qcow"
    create(base, 4 * MIB, fmt="qcow")
    qemu_io(base, "write -P 1 0 2M", fmt="qcow")
    create(top, None, fmt="qcow", backing=base.name, backing_fmt="qcow")
    qemu_io(top, "write -P 2 1M 64k", fmt="qcow")
    for options in (["-F", "raw"], ["-F", "raw", "--resize-backing"], ["-F", "raw", "-b", base]):
        refuse("ERROR_FORMAT_MISMATCH", top, *options, files=[base], mentions=["base.qcow", "leave out -F raw"])
    support.commit(top)
    assert raw(base) == b"\1" * MIB + b"\2" * 64 * KIB + b"\1" * (960 * KIB) + bytes(2 * MIB)


def test_a_raw_disk_that_holds_an_image(tmp_path):
    """A guest may have written that; what the refusal advises works, and a warning stays."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow"
    create(base, 4 * MIB, fmt="qcow")
    held = base.read_bytes()
    create(top, 4 * MIB, fmt="qcow")
    qemu_io(top, "write -P 2 1M 64k", fmt="qcow")
    image = bytearray(top.read_bytes())
    name = base.name.encode()
    # Behind everything else: the header has no room for a name.
    struct.pack_into(">QI", image, 8, len(image), len(name))
    top.write_bytes(image + name)
    result = run_instar("commit", "-F", "raw", top)
    assert result.rc == 1 and f"`truncate -s {4 * MIB} '{base}'`" in result.stderr, str(result)
    os.truncate(base, 4 * MIB)
    result = support.commit(top, "-F", "raw")
    assert "has the mark of a qcow image" in result.stderr, str(result)
    expected = held.ljust(4 * MIB, b"\0")
    assert base.read_bytes() == expected[:MIB] + b"\2" * 64 * KIB + expected[MIB + 64 * KIB:]


def test_an_image_that_was_cut_off(tmp_path):
    """A part of the last cluster is missing: what it held would arrive as zeroes, and a backing would grow over the place."""
    base, top, plain = tmp_path / "base.qcow", tmp_path / "top.qcow", tmp_path / "plain"
    for path, data, backing in [(base, b"\1" * MIB, ()), (top, b"\1" * 900 * KIB + b"\2" * 124 * KIB, ("-B", base, "-F", "qcow"))]:
        plain.write_bytes(data)
        qemu_img("convert", "-f", "raw", "-O", "qcow", *backing, plain, path)
    for path, code in [(top, "ERROR_OVERLAY_CORRUPT"), (base, "ERROR_BACKING_CORRUPT")]:
        whole = path.read_bytes()
        for missing in (1, 511):
            os.truncate(path, len(whole) - missing)
            refuse(code, top, files=[base], mentions=[path.name, "may have been cut off"])
            assert run_instar("check", path).rc == 2
        path.write_bytes(whole)
    support.commit(top)
    assert raw(base) == plain.read_bytes()


def test_the_advice_about_a_raw_disk_below_it_works(tmp_path):
    """qcow has no place for the format of its backing file: a qcow2 that records it takes its place."""
    base, top, new = tmp_path / "base.img", tmp_path / "top.qcow", tmp_path / "new.qcow2"
    support.create(base, MIB, fmt="raw")
    support.qemu_io(base, "write -P 1 0 64k", fmt="raw")
    support.create(top, MIB, fmt="qcow", backing="base.img", backing_fmt="raw")
    support.qemu_io(top, "write -P 2 32k 64k", fmt="qcow")
    result = run_instar("convert", "-O", "qcow2", top, new)
    advice = re.search(r"`(instar convert [^`]*)`", result.stderr)[1]
    assert result.rc == 1 and advice == f"instar convert -O qcow2 -B 'base.img' -F raw '{top}' NEW", str(result)
    command = [str(new) if word == "NEW" else word for word in shlex.split(advice)[1:]]
    done = run_instar(*command, cwd=tmp_path)
    assert done.rc == 0 and support.info(new)["backing-filename-format"] == "raw", str(done)
    assert raw(new, "qcow2") == bytes([1]) * (32 * KIB) + bytes([2]) * (64 * KIB) + bytes(MIB - 96 * KIB)
    committed = run_instar("commit", "--ignore-siblings", new)
    assert committed.rc == 0, str(committed)
    support.qemu_io(base, "read -P 1 0 32k", "read -P 2 32k 64k", fmt="raw")
    # What the operator says of a file that looks like something else is not believed.
    support.create(base, MIB)
    for fmt, code in (("vmdk", "ERROR_FORMAT_MISMATCH"), ("qcow2", None)):
        result = run_instar("convert", "-O", "qcow2", "-B", "base.img", "-F", fmt, top, tmp_path / fmt, cwd=tmp_path)
        assert (result.rc == 0) == (code is None) and (code or "") in result.stderr, str(result)
