"""Parallels: as overlay, backing and ancestor. Oracles: QEMU, which reads and writes single images, checks them, and reads chains
whose images are named to it one by one; and the reader of `parallels_bytes`. What QEMU cannot make (the older magic word, clusters
of other sizes, extensions) the maker there does."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest
import support
from parallels_bytes import CLOSED, DIRTY_BITMAP, NEW, OLD, OPEN, Image, bitmap, content, make, section
from support import KIB, MIB, assert_clean, create, qemu_img, qemu_io, refuse, run_instar

SEEDS = 64 if os.environ.get("INSTAR_DEEP") else 6


def node(path, fmt="parallels", below=None):
    """An image for QEMU's `json:`, with what is below it, which no Parallels image records."""
    image = {"driver": fmt, "file": {"driver": "file", "filename": str(path)}}
    return image if below is None else {**image, "backing": below}


def json_name(what):
    return "json:" + json.dumps(what)


def raw(path, what=None, fmt="parallels"):
    """The bytes that a guest reads, by qemu; `what` is the chain, if it is one that nothing records."""
    to = path.parent / "read.tmp"
    qemu_img("convert", "-O", "raw", *(["-f", fmt, path] if what is None else [json_name(what)]), to)
    data = to.read_bytes()
    to.unlink()
    return data


def writes(rng, size, count, fmt="parallels"):
    """Commands for qemu-io. A Parallels image has no zeroes."""
    for _ in range(count):
        at = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 3 * KIB, 64 * KIB, 200 * KIB]), size - at)
        if fmt == "qcow2" and rng.random() < 0.3:
            yield f"write -z {at} {length}"
        else:
            yield f"write -P {rng.randrange(1, 255)} {at} {length}"


def check(path, by_qemu=True):
    """Nothing is wrong with an image, by `instar check`, by the reader, and by QEMU."""
    result = run_instar("check", "--output", "json", path)
    assert result.rc == 0, str(result)
    Image(path).assert_consistent()
    if by_qemu:
        assert_clean(path, "parallels")


def write_on(path, *commands):
    """QEMU writes to an image, and has nothing to repair before."""
    arguments = [argument for command in commands for argument in ("-c", command)]
    result = support.run("qemu-io", "-f", "parallels", *arguments, path)
    assert result.rc == 0 and "Repairing" not in result.stderr and "failed" not in result.stdout, str(result)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_data_into_an_image_of_qemus(tmp_path, seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 9) * MIB - rng.choice([0, 512, 300 * KIB])
    base, top = tmp_path / "base.hds", tmp_path / "top.qcow2"
    create(base, size, fmt="parallels", cluster_size=rng.choice([512, 64 * KIB, MIB]))
    write_on(base, *writes(rng, size, 8))
    create(top, size, backing="base.hds", backing_fmt="parallels")
    for _ in range(2):
        qemu_io(top, *writes(rng, size, 8, "qcow2"))
        wanted = raw(top, fmt="qcow2")
        support.commit(top)
        assert raw(base) == wanted == raw(top, fmt="qcow2") == content(base)
        check(base)
        # Then QEMU goes on with both.
        write_on(base, *writes(rng, size, 3))
        check(base)


@pytest.mark.parametrize("base_fmt", ["parallels", "qcow2", "raw", "vmdk", "vdi"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_an_overlay_whose_parent_is_named(tmp_path, seed, base_fmt):
    rng = random.Random(f"{seed} {base_fmt}")
    size = rng.randrange(1, 9) * MIB - rng.choice([0, 512, 300 * KIB])
    size -= size % 65536 * (base_fmt == "vmdk")
    base, top = tmp_path / "base", tmp_path / "top.hds"
    create(base, size, fmt=base_fmt)
    qemu_io(base, *writes(rng, size, 8, base_fmt), fmt=base_fmt)
    create(top, size, fmt="parallels", cluster_size=rng.choice([MIB, 2 * MIB]))
    chain = node(top, below=node(base, base_fmt))
    for _ in range(2):
        # QEMU fills up what its clusters have besides from the parent.
        arguments = [argument for command in writes(rng, size, 6) for argument in ("-c", command)]
        result = support.run("qemu-io", *arguments, json_name(chain))
        assert result.rc == 0 and "Repairing" not in result.stderr, str(result)
        wanted = raw(top, chain)
        support.commit(top, "-b", base, *(["-F", "raw"] if base_fmt == "raw" else []))
        assert raw(base, fmt=base_fmt) == wanted == raw(top, chain)
        check(top)
        Image(top).assert_empty()
        if base_fmt == "parallels":
            check(base)
            assert content(base) == wanted


@pytest.mark.parametrize("seed", range(SEEDS * 2))
def test_images_that_qemu_does_not_make(tmp_path, seed):
    """Both magic words, clusters of any number of sectors, data that begins right behind the BAT, gaps, entries past the end."""
    rng = random.Random(1000 + seed)
    size = rng.randrange(1, 5) * MIB - rng.choice([0, 512, 300 * KIB])
    tracks = rng.choice([1, 8, 63, 63, 504, 512, 2048])

    def image(name, tracks):
        magic = rng.choice([OLD, NEW])
        count = -(-size // (tracks * 512))
        numbers = rng.sample(range(count), min(count, rng.randrange(1, 40)))
        data = {number: rng.randbytes(64).ljust(tracks * 512, b"\7") for number in numbers}
        gaps = rng.sample(range(len(numbers)), len(numbers) // 3)
        shape = {"room": rng.choice([None, 0, 7]), "entries": count + rng.randrange(9), "gaps": gaps}
        return make(tmp_path / name, size, data, tracks=tracks, magic=magic, **shape)

    def usual(path):
        # QEMU rounds with a mask where clusters of the newer word are no power of two, and so finds their start wrong.
        return Image(path).magic == OLD or tracks & (tracks - 1) == 0

    base, top = image("base", tracks), image("top", tracks * rng.choice([1, 1, 2]))
    chain = node(top, below=node(base))
    wanted = content(top, base)
    assert raw(top, chain) == wanted, "the maker and qemu"
    before = raw(base)
    with support.untouched(top):
        # Looking changes nothing.
        assert run_instar("map", top).rc == 0 and run_instar("info", top).rc == 0
    support.commit(top, "-b", base)
    assert raw(base) == wanted == content(base) == raw(top, chain) and before != wanted
    check(base, usual(base))
    Image(top).assert_empty()
    # A qcow2 over it, whose clusters fill up those that are there.
    upper = tmp_path / "upper.qcow2"
    create(upper, size, backing="base", backing_fmt="parallels", cluster_size=512)
    qemu_io(upper, *writes(rng, size, 9, "qcow2"))
    wanted = raw(upper, fmt="qcow2")
    support.commit(upper)
    assert raw(base) == wanted == content(base)
    check(base, usual(base))
    if usual(base):
        write_on(base, *writes(rng, size, 4))
        check(base)


def test_snapshots_one_after_the_other(tmp_path):
    """A chain as Parallels leaves it: three layers of the same clusters, none of which records anything of another."""
    size, tracks = 3 * MIB + 512, 252
    base, middle, top = (tmp_path / name for name in ("0.hds", "1.hds", "2.hds"))

    def fresh():
        for path, seed, numbers in [(base, 1, (0, 1, 2, 3, 24)), (middle, 2, (1, 5, 24)), (top, 3, (2, 5, 7))]:
            data = {number: bytes([seed, number + 1]) * (tracks * 256) for number in numbers}
            make(path, size, data, tracks=tracks, magic=OLD, room=3)
        return content(top, middle, base)

    # From below.
    wanted = fresh()
    with support.untouched(top):
        support.commit(middle, "-b", base)
    assert content(top, base) == wanted
    support.commit(top, "-b", base)
    assert content(base) == wanted == raw(base)
    # Into an image that has a parent, which nobody names: whole clusters need nothing from there.
    assert fresh() == wanted
    with support.untouched(base):
        support.commit(top, "-b", middle)
    assert content(middle, base) == wanted == raw(middle, node(middle, below=node(base)))
    for path in (base, middle, top):
        check(path)


def test_a_parent_has_to_be_named(tmp_path):
    base, top = tmp_path / "base.hds", tmp_path / "top.hds"
    for path in (base, top):
        create(path, "3M", fmt="parallels")
    write_on(top, "write -P 3 1M 512")
    refuse("ERROR_NO_BACKING", top, files=[base], mentions=["name the parent with `instar commit -b`"])
    refuse("ERROR_BACKING_NOT_FOUND", top, "-b", tmp_path / "gone", files=[base])
    refuse("ERROR_CHAIN_LOOP", top, "-b", top, files=[base])
    notes = run_instar("info", "--output", "json", top).json["notes"]
    assert any("records no parent" in note for note in notes), notes
    # Parts of clusters would need what is below a parent that may be a snapshot, too.
    make(top, 3 * MIB, {0: b"x"}, tracks=63)
    refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", base, files=[base], mentions=["clusters of 32256 bytes", "1048576"])


def test_layers_of_different_sizes(tmp_path):
    """The parent may be a snapshot: where the disks differ, what lies below it would show, or be hidden."""
    base, top = tmp_path / "base.hds", tmp_path / "top.hds"
    for own, parents in [(4 * KIB + 512, 64 * KIB), (64 * KIB, 32 * KIB)]:
        make(base, parents, {}, tracks=8)
        make(top, own, {1: b"t" * 512}, tracks=8)
        for options in ([], ["--resize-backing"]):
            refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", base, *options, files=[base], mentions=["the same size"])
    make(base, 64 * KIB, {3: b"b" * 4096}, tracks=8)
    make(top, 8 * KIB, {1: b"t" * 4096}, tracks=8)
    support.commit(top, "-b", base)
    assert raw(base) == bytes(4096) + b"t" * 4096 + bytes(4096) + b"b" * 4096 + bytes(48 * KIB)


def test_nothing_to_commit_closes_what_was_left_open(tmp_path):
    """A commit was killed when only the mark was left to be taken away: running it again does that."""
    base, top = tmp_path / "base.hds", tmp_path / "top.qcow2"
    make(base, MIB, {0: b"b" * 4096}, tracks=8, in_use=OPEN)
    create(top, MIB, backing=base.name, backing_fmt="parallels")
    before = base.read_bytes()
    assert run_instar("commit", "--dry-run", top).rc == 0 and base.read_bytes() == before
    support.commit(top)
    assert Image(base).in_use == CLOSED and len(before) == base.stat().st_size
    check(base)
    wrong = [at for at, byte in enumerate(base.read_bytes()) if byte != before[at]]
    assert 44 <= min(wrong) and max(wrong) < 48, wrong


def test_an_image_that_was_not_closed(tmp_path):
    base, top = tmp_path / "base.hds", tmp_path / "top.hds"
    size = MIB
    for in_use, after in [(OPEN, CLOSED), (CLOSED, CLOSED), (0, 0)]:
        make(base, size, {0: b"b" * 4096, 9: b"c"}, tracks=8, in_use=in_use)
        make(top, size, {0: b"t" * 4096, 3: b"u"}, tracks=8, magic=NEW, in_use=in_use)
        wanted = content(top, base)
        assert run_instar("check", base).rc == (2 if in_use == OPEN else 0)
        result = support.commit(top, "-b", base)
        assert ("was not closed" in result.stderr) == (in_use == OPEN), str(result)
        assert f"only -b says that it is '{base}'" in result.stderr, str(result)
        assert raw(base) == wanted
        for path in (base, top):
            assert Image(path).in_use == after
            check(path)


def test_dirty_bitmaps_go_before_they_are_wrong(tmp_path):
    size, tracks = MIB, 16
    shape = {"tracks": tracks, "magic": NEW}
    base, top = tmp_path / "base.hds", tmp_path / "top.hds"
    sections = [section(DIRTY_BITMAP, 0, bitmap(size))]
    make(base, size, {0: b"b"}, **shape, sections=sections)
    make(top, size, {5: b"t"}, **shape, sections=[*sections, section(0x77, 0, b"anything")])
    # QEMU loads the bitmap, which it would not if the maker were wrong.
    assert support.info(base, "-f", "parallels")["format"] == "parallels"
    info = run_instar("info", "--output", "json", base).json
    assert info["format-specific"]["data"]["dirty-bitmaps"] == 1
    check(base, by_qemu=False)
    wanted = content(top, base)
    result = support.commit(top, "-b", base)
    assert result.stderr.count("loses its format extension") == 2, str(result)
    assert raw(base) == wanted
    for path in (base, top):
        assert Image(path).ext_off == 0
        check(path, by_qemu=path == top)
    # What must not go keeps the file as it is.
    for flags, magic, mention in [(1, DIRTY_BITMAP, "must not be changed"), (1, 0x77, "must not"), (2, 0x77, "to be kept")]:
        data = bitmap(size) if magic == DIRTY_BITMAP else b"x"
        extended = {**shape, "sections": [section(magic, flags, data)]}
        make(base, size, {0: b"b"}, **extended)
        make(top, size, {5: b"t"}, **shape)
        refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", base, files=[base], mentions=[mention])
        make(base, size, {0: b"b"}, **shape)
        make(top, size, {5: b"t"}, **extended)
        refuse("ERROR_UNSUPPORTED_FORMAT", top, "-b", base, files=[base], mentions=[mention])
        wanted = content(top, base)
        with support.untouched(top):
            support.commit(top, "-b", base, "-d")
        assert raw(base) == wanted


@pytest.mark.parametrize("was,new,cluster", [("1M", "2M", 512), ("3583K", "1G", 4096), ("100M", "6G", 64 * KIB), ("64M", "65M", 512)])
def test_a_base_grows(tmp_path, was, new, cluster):
    """QEMU cannot resize it. Clusters in the way of a longer BAT move."""
    base, top = tmp_path / "base", tmp_path / "top.qcow2"
    create(base, was, fmt="parallels", cluster_size=cluster)
    old = Image(base)
    write_on(base, f"write -P 2 {old.size - 8192} 8192", "write -P 1 0 300k")
    create(top, new, backing="base", backing_fmt="parallels")
    end = support.virtual_size(top)
    qemu_io(top, "write -P 3 100k 1k", f"write -P 4 {end - 70 * KIB} 64k")
    flat = support.flatten(top, tmp_path / "flat.qcow2")
    refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", top, files=[base])
    support.commit(top, "--resize-backing")
    check(base)
    support.assert_same_content(base, flat, "parallels")
    now = Image(base)
    assert now.size == end and now.entries == -(-end // cluster) and now.data >= now.bat_end
    write_on(base, f"write -P 6 {end - MIB + 512} 1k", f"write -P 7 {old.size} 512")
    check(base)


def test_in_a_chain_with_other_formats(tmp_path):
    """Below the target it fills clusters up, and above it is merged with others."""
    base, lower = tmp_path / "base.hds", tmp_path / "lower.vmdk"
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    size = 6 * MIB
    make(base, size, {number: bytes([number + 1]) * 32256 for number in range(0, 195, 3)}, tracks=63)
    create(lower, fmt="qcow2", backing="base.hds", backing_fmt="parallels")
    create(middle, backing=lower.name, backing_fmt="qcow2", cluster_size=2 * MIB)
    qemu_io(middle, "write -P 4 2560k 64k", "write -z 3M 64k")
    create(top, backing="middle.qcow2", backing_fmt="qcow2", cluster_size=512)
    qemu_io(top, "write -P 5 2561k 1k", "write -P 6 5M 512", "write -z 33k 3k")
    wanted = raw(top, fmt="qcow2")
    with support.untouched(base, lower):
        support.commit(top)
    assert raw(middle, fmt="qcow2") == wanted
    qemu_io(top, "write -P 7 100k 3k")
    wanted = raw(top, fmt="qcow2")
    support.commit(top, "-b", base)
    assert raw(base) == wanted == content(base)
    check(base)
    assert run_instar("compare", top, base).rc == 0
    mapped = run_instar("map", "--output", "json", lower)
    assert mapped.rc == 0 and {entry["depth"] for entry in mapped.json} == {1}, str(mapped)


def test_create_as_qemu_does(tmp_path):
    for name, options in [("a", ["3583k"]), ("b", ["3T"]), ("c", ["-o", "cluster_size=4096", "5M"]), ("d", ["1000"])]:
        ours, theirs = tmp_path / f"ours-{name}", tmp_path / f"theirs-{name}"
        *options, size = options
        result = run_instar("create", "-q", "-f", "parallels", *options, ours, size)
        assert result.rc == 0, str(result)
        qemu_img("create", "-q", "-f", "parallels", *options, theirs, size)
        assert ours.read_bytes() == theirs.read_bytes(), name
    result = run_instar("create", "-f", "parallels", "-b", "ours-a", "-F", "parallels", tmp_path / "refused")
    assert result.rc == 1 and "records no parent" in result.stderr, str(result)
    assert not (tmp_path / "refused").exists()
    info = run_instar("info", "--output", "json", tmp_path / "ours-c").json
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("parallels", 5 * MIB, 4096)
    assert "backing-filename" not in info and "full-backing-filename" not in info, info


def test_what_is_measured_is_enough(tmp_path):
    create(tmp_path / "src", "9M")
    qemu_io(tmp_path / "src", "write -P 1 0 3M", "write -P 2 7M 512")
    measured = run_instar("measure", "--output", "json", "-O", "parallels", tmp_path / "src").json
    qemu_img("convert", "-O", "parallels", tmp_path / "src", tmp_path / "made")
    assert (tmp_path / "made").stat().st_size <= measured["required"] <= measured["fully-allocated"]


def test_a_check_finds_what_qemus_finds(tmp_path):
    """Both count the same, but for what they do not look at: QEMU at the start of a cluster, we at space behind the last one."""
    path = tmp_path / "image"
    data = {0: b"1", 1: b"2", 5: b"3", 4: b"4"}
    place = Image(make(path, 256 * KIB, data, tracks=16, magic=NEW)).mapped
    entry = {number: 64 + number * 4 for number in range(32)}
    cases = [
        ([], 0),
        ([(entry[9], 99)], 1),
        ([(entry[9], place[0] // 8192)], 1),
        ([(entry[9], place[0] // 8192), (entry[10], place[1] // 8192), (44, OPEN)], 3),
        ([(44, OPEN)], 1),
    ]
    for changes, corruptions in cases:
        make(path, 256 * KIB, data, tracks=16, magic=NEW)
        image = bytearray(path.read_bytes())
        for at, number in changes:
            struct.pack_into("<I", image, at, number)
        path.write_bytes(image)
        ours = run_instar("check", "--output", "json", path)
        assert ours.rc == (2 if corruptions else 0), str(ours)
        assert ours.json.get("corruptions", 0) == corruptions, str(ours)
        # It names each of them; at some it ends before it has counted them.
        theirs = qemu_img("check", "--output", "json", "-f", "parallels", path, rc=None)
        assert theirs.stderr.count("ERROR ") == corruptions, str(theirs)
        if not corruptions:
            names = ["allocated-clusters", "total-clusters", "fragmented-clusters", "image-end-offset"]
            assert [ours.json.get(name) for name in names] == [theirs.json.get(name) for name in names]


def test_what_is_refused_by_name(tmp_path):
    base, top = tmp_path / "base.hds", tmp_path / "top.hds"

    def fresh(path, *changes, magic=OLD):
        for each, seed in ((base, b"b"), (top, b"t")):
            make(each, 3 * MIB, {0: seed * 4096, 300: seed}, tracks=8, magic=magic)
        data = bytearray(path.read_bytes())
        for fmt, at, number in changes:
            struct.pack_into(fmt, data, at, number)
        path.write_bytes(data)

    for path in (base, top):
        corrupt = "ERROR_OVERLAY_CORRUPT" if path == top else "ERROR_BACKING_CORRUPT"
        fresh(path)
        start = Image(path).mapped[0] // 512
        for change, mention in [
            (("<I", 64 + 80, start + 8 * 1000), "past the end of the file"),
            (("<I", 64 + 80, 1), "in front of the data"),
            (("<I", 64 + 80, start + 1), "not the start of a cluster"),
            (("<I", 64 + 80, start), "the same place"),
            (("<I", 52, 1), "flags say that the image is empty"),
        ]:
            fresh(path, change)
            refuse(corrupt, top, "-b", base, files=[base], mentions=[mention])
        for change, mention in [
            (("<I", 28, 0), "a cluster has 0 sectors"),
            (("<I", 28, 1 << 31), "a cluster has 2147483648 sectors"),
            (("<I", 32, 1 << 30), "the BAT has 1073741824 entries"),
            (("<I", 32, 9), "the BAT has 9 entries"),
            (("<I", 44, 1), "in_use is 0x1"),
            (("<I", 48, 1), "data_off is sector 1"),
        ]:
            fresh(path, change)
            refuse("ERROR_PARSE_FAILED", top, "-b", base, files=[base], mentions=[mention])
    # A BAT of two billion bytes costs nothing if nobody has written to it.
    make(top, 512 * 1000, {}, tracks=1, magic=NEW)
    with top.open("r+b") as file:
        entries = (1 << 29) - 1
        file.seek(32)
        file.write(struct.pack("<IQII", entries, entries, CLOSED, (64 + entries * 4 + 511) // 512))
        file.truncate(64 + entries * 4 + 1024)
    with support.untouched(base):
        result = run_instar("check", "--output", "json", top)
    assert result.rc == 0 and result.json["total-clusters"] == entries, str(result)
    assert run_instar("map", top).rc == 0


def shot(guid, parent):
    return f"<Shot><GUID>{{{guid}}}</GUID><ParentGUID>{{{parent}}}</ParentGUID></Shot>"


def test_a_bundle_is_told(tmp_path):
    """A disk with its snapshots is a directory with a description: neither is an image, but both say which files are."""
    bundle = tmp_path / "disk.hdd"
    bundle.mkdir()
    description = bundle / "DiskDescriptor.xml"
    start = "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version=\"1.0\">\n"
    description.write_text(start)

    def told(*mentions):
        for command in ("commit", "info", "map", "check"):
            for path, code in [(bundle, "ERROR_OPEN_FAILED"), (description, "ERROR_UNSUPPORTED_FORMAT")]:
                result = run_instar(command, path)
                assert result.rc == 1 and code in result.stderr and len(result.stderr.splitlines()) == 1, str(result)
                for mention in mentions:
                    assert mention in result.stderr, str(result)

    told("name the .hds file with the newest changes", "-b and the .hds file that is its parent")
    none, top, one = "00000000-0000-0000-0000-000000000000", "5fbaabe3-6958-40ff-92a7-860e329aab41", "11111111-2222-3333-4444-555555555555"
    files = {one: f"disk.hdd.0.{{{one}}}.hds", top: f"/Users/me/disk.hdd/disk.hdd.0.{{{top}}}.hds"}
    images = [f"<Image><GUID>{{{guid}}}</GUID><Type>Compressed</Type><File>{file}</File></Image>" for guid, file in files.items()]
    storage = "<StorageData><Storage><Start>0</Start><End>8192</End>" + "".join(images) + "</Storage></StorageData>"
    description.write_text(f"{start}{storage}<Snapshots>{shot(one, none)}{shot(top, one)}</Snapshots></Parallels_disk_image>")
    newest, below = (f"disk.hdd.0.{{{guid}}}.hds" for guid in (top, one))
    told("2 layers", f"'{newest}'", f"-b '{below}'")
    # What it says works.
    make(bundle / below, 4 * MIB, {0: b"\1" * 512})
    make(bundle / newest, 4 * MIB, {1: b"\2" * 512})
    wanted = content(bundle / newest, bundle / below)
    result = run_instar("commit", "-b", below, bundle / newest)
    assert result.rc == 0 and content(bundle / below) == wanted, str(result)
    description.write_text(start + "<StorageData><Storage>1</Storage><Storage>2</Storage></StorageData>")
    told("split into several images")
