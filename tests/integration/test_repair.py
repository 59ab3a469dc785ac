"""`instar check -r`: damaged images are mended where there is one right answer, and read as before; `qemu-img check` finds nothing
in them any more. `qemu-img check -r` on a copy is the peer where it is right."""

from __future__ import annotations

import json
import os
import random
import re
import shutil

import dirty_bitmaps
import faults
import pytest
import qcow2_bytes
import support
from qcow2_bytes import COPIED
from test_check import OFFSET, SPOILED, STRUCTURES, broken, filled
from test_devices import Loop


def repaired(image, what="all", *options, rc=0):
    """The result of a repair, with JSON. What the image and its snapshots read as does not change."""
    before = contents(image)
    result = support.run_instar("check", "-r", what, "--output", "json", *options, image)
    assert result.rc == rc, str(result)
    assert contents(image) == before
    return result


def contents(image):
    """What the active state reads as, and each snapshot."""
    names = [snapshot["name"] for snapshot in support.info(image).get("snapshots", [])]
    found = {None: support.content_hash(image)}
    for name in names:
        flat = image.with_name("flat.raw")
        support.qemu_img("convert", "-l", name, "-O", "raw", image, flat)
        found[name] = support.digest(flat)
        flat.unlink()
    return found


def host_of(inner, index):
    """Where the data of a cluster lies in the file: of the `index`-th that is there."""
    table, entry = divmod(inner.data_clusters()[index], inner.cluster_size // 8)
    return inner.peek64(inner.l2_at(entry, table)) & OFFSET


def is_clean(image):
    """qemu-img finds nothing, and another repair has nothing to do."""
    assert support.qemu_img("check", image, rc=None).rc == 0
    with support.untouched(image):
        again = support.run_instar("check", "-r", "all", "--output", "json", image)
    assert again.rc == 0 and not {"leaks-fixed", "corruptions-fixed", "not-repaired"} & again.json.keys(), str(again)


def test_how_far_it_is(tmp_path):
    """First nothing is changed, then something is; how much that is, nobody knows beforehand."""
    image = spoiled(tmp_path / "disk", 1, {})
    for options, stages in ((["--dry-run"], ["checking"]), ([], ["checking", "writing"])):
        done = support.run_instar("check", "-r", "all", "--progress=json", *options, image)
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        assert {line["type"] for line in lines} == {"check"} and lines[-1]["status"] == "concluded", done
        assert [line["stage"] for line in lines if "stage" in line and "finding" not in line] == stages, lines
    assert support.run_instar("check", "-p", image).stderr == "instar: done\n"


def test_findings_are_lines_of_progress_where_programs_read_those(tmp_path):
    image = spoiled(tmp_path / "disk", 1, {})
    plain = support.run_instar("check", image).stderr.splitlines()
    told = support.run_instar("check", "--progress=json", "--color=always", image)
    lines = [json.loads(line) for line in told.stderr.splitlines()]
    assert [line["finding"] for line in lines if "finding" in line] == plain != [], told
    assert lines[-1]["status"] == "concluded" and "finding" not in lines[-1] and told.rc == 2, told
    mended = support.run_instar("check", "-r", "all", "--progress=json", image)
    lines = [json.loads(line) for line in mended.stderr.splitlines()]
    assert [line["finding"] for line in lines if "finding" in line] == plain and lines[-1]["status"] == "concluded", mended


@pytest.mark.parametrize("missing", [1, 4096, 65535])
def test_a_file_that_ends_within_its_last_cluster(tmp_path, missing):
    """QEMU reads zeroes there, and says nothing; what a repair cannot bring back stays an error."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(1).randbytes(1 << 20))
    image = tmp_path / "image"
    support.run_instar("convert", "-f", "raw", "-O", "qcow2", disk, image)
    assert support.run_instar("check", image).rc == 0
    os.truncate(image, image.stat().st_size - missing)
    for options in ([], ["-r", "all"], ["-r", "leaks"]):
        with support.untouched(image):
            found = support.run_instar("check", *options, image)
        assert found.rc == 2 and "the file is cut off: the cluster of guest offset 983040" in found.stderr, found
        assert ("no repair brings that back" in found.stderr) == bool(options), found
    refused = support.run_instar("convert", "-O", "raw", image, tmp_path / "new")
    assert refused.rc == 1 and "983040" in refused.stderr, refused


def test_a_disk_may_end_within_its_last_cluster(tmp_path):
    """The guest sees nothing of the rest, so that the file need not have it."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(1).randbytes((1 << 20) - 60 * 1024))
    image = tmp_path / "image"
    support.run_instar("convert", "-f", "raw", "-O", "qcow2", disk, image)
    os.truncate(image, -(-image.stat().st_size // 65536) * 65536 - 60 * 1024)
    assert support.run_instar("check", image).rc == 0
    assert support.run_instar("compare", "-f", "raw", disk, image).rc == 0


def spoiled(path, seed, options, snapshot=True):
    """Anything for half of the refcounts and a third of the COPIED flags."""
    if options.get("refcount_bits") == 1:
        snapshot = False
    image = filled(path, seed, size="24M", **options)
    if snapshot:
        support.qemu_img("snapshot", "-c", "one", image)
        support.qemu_io(image, "write -P 9 1M 2M")
    qcow2_bytes.Image(image).spoil_refcounts(random.Random(seed))
    return image


@pytest.mark.parametrize("options", [*SPOILED, {"extended_l2": "on", "cluster_size": "16k"}, {"compat": "0.10"}],
                         ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("seed", range(2))
def test_wrong_refcounts_and_flags(tmp_path, options, seed):
    image = spoiled(tmp_path / "image", seed, options)
    found = support.qemu_img("check", "--output", "json", image, rc=None).json
    with support.untouched(image):
        dry = support.run_instar("check", "-r", "all", "--dry-run", "--output", "json", image)
    result = repaired(image)
    assert result.json.get("corruptions-fixed", 0) >= found["corruptions"] > 0
    assert result.json.get("leaks-fixed", 0) == found.get("leaks", 0)
    assert dry.json["corruptions-fixable"] == result.json["corruptions-fixed"]
    is_clean(image)
    # What is written now goes over nothing.
    before = support.content_hash(image)
    support.qemu_io(image, "write -P 77 23M 512k")
    support.qemu_io(image, "read -P 77 23M 512k")
    support.qemu_img("check", image)
    assert support.content_hash(image) != before


def test_leaks_alone_in_the_words_of_qemu(tmp_path):
    image = filled(tmp_path / "image")
    inner = qcow2_bytes.Image(image)
    with image.open("ab") as file:
        file.write(bytes(3 * inner.cluster_size))
    for number in range(1, 4):
        inner.set_refcount(inner.file_size - number * inner.cluster_size, number)
    theirs, again = support.copy(image, tmp_path / "theirs"), support.copy(image, tmp_path / "again")
    before = support.content_hash(image)
    peer = support.qemu_img("check", "-r", "leaks", theirs)
    ours = support.run_instar("check", "-r", "leaks", image)
    # qemu-img has a line for each cluster that it repairs on standard output, too.
    told = "".join(line for line in peer.stdout.splitlines(True) if not re.match("Repairing|Leaked", line))
    # The file stays as long as it is, which is our line.
    said = re.sub("Unused behind it: .*\n", "", ours.stdout)
    assert (ours.rc, said) == (0, told) and said != ours.stdout, f"{ours}\n{peer}"
    assert support.content_hash(image) == before
    is_clean(image)
    peer, ours = (tool("check", "-r", "all", "--output", "json", path)
                  for tool, path in ((support.qemu_img, support.copy(again, tmp_path / "t")), (support.run_instar, again)))
    said = {key: value for key, value in ours.json_of_sandbox.items() if key not in ("unused-tail", "filename")}
    assert said == {key: value for key, value in peer.json.items() if key != "filename"} and said["leaks-fixed"] == 3


def test_leaks_are_given_back_and_corruptions_stay(tmp_path):
    image = spoiled(tmp_path / "image", 3, {})
    found = support.qemu_img("check", "--output", "json", image, rc=None).json
    result = repaired(image, "leaks", rc=2)
    assert result.json["leaks-fixed"] == found["leaks"] and "leaks" not in result.json
    left = support.qemu_img("check", "--output", "json", image, rc=None).json
    assert left["corruptions"] == result.json["corruptions"] <= found["corruptions"]


@pytest.mark.parametrize("dropped", [[0], [1], [0, 1]])
def test_refcount_blocks_that_are_missing(tmp_path, dropped):
    """They go behind the end of the file: `qemu-img check -r` takes clusters that are in use for free."""
    image = filled(tmp_path / "image", cluster_size=512)
    inner = qcow2_bytes.Image(image)
    for index in dropped:
        inner.poke64(inner.get("refcount_table_offset") + 8 * index, 0)
    assert repaired(image).json["corruptions-fixed"] >= 256
    is_clean(image)


@pytest.mark.parametrize("how", STRUCTURES)
@pytest.mark.parametrize("what", ["leaks", "all"])
def test_what_has_no_right_answer_stays(tmp_path, how, what):
    """Leaks and low refcounts beside it, too: what the damaged entry names would be given away."""
    image = filled(tmp_path / "image", cluster_size="4k")
    inner = qcow2_bytes.Image(image)
    inner.set_refcount(host_of(inner, -1), 0)
    inner.set_refcount(host_of(inner, -2), 3)
    first = 0 if how.startswith("L2") else inner.data_clusters()[0] * inner.cluster_size
    broken(inner, how)
    with support.untouched(image):
        result = support.run_instar("check", "-r", what, "--output", "json", image)
    assert result.rc == 2 and len(result.json["not-repaired"]) == 1, str(result)
    assert "Not repaired: " in result.stderr and "losing what it leads to (" in result.stderr
    # What the guest would lose is named, where it is anything.
    of_disk = how.startswith(("data", "reserved", "L2 table past", "L2 table off"))
    assert (f"at guest offset {first})" in result.stderr) == of_disk, result.stderr
    human = support.run_instar("check", "-r", what, image)
    assert human.rc == 2 and "repaired:" not in human.stdout and "errors were found" in human.stdout


@pytest.mark.parametrize("marks", [1, 2, 3])
def test_marks(tmp_path, marks):
    """An image that QEMU opens no more for writing is open again."""
    image = filled(tmp_path / "image")
    inner = qcow2_bytes.Image(image)
    inner.set("incompatible", inner.get("incompatible") | marks)
    inner.set_refcount(host_of(inner, 0), 0)
    assert repaired(image).json["corruptions-fixed"] == 3
    assert qcow2_bytes.Image(image).get("incompatible") & 3 == 0
    is_clean(image)


def test_snapshots_and_bitmaps_are_kept(tmp_path):
    """`qemu-img check -r` of 10.0.2 drops all snapshots of such an image."""
    image = filled(tmp_path / "image")
    for name in ("one", "two"):
        support.qemu_img("snapshot", "-c", name, image)
        support.qemu_io(image, "write -P 9 1M 2M")
    dirty_bitmaps.add(image, "kept")
    support.qemu_io(image, "write -P 5 5M 1M")
    before, bitmaps = support.info(image), dirty_bitmaps.names(image)
    assert len(before["snapshots"]) == 2 and list(bitmaps) == ["kept"]
    qcow2_bytes.Image(image).spoil_refcounts(random.Random(4))
    qcow2_bytes.Image(image).set("incompatible", 0)
    assert repaired(image).json["corruptions-fixed"] > 0
    assert support.info(image)["snapshots"] == before["snapshots"]
    assert dirty_bitmaps.names(image) == bitmaps
    is_clean(image)


def test_stale_bitmaps_are_kept(tmp_path):
    """Nothing refers to them, and they may be all that is left of an incremental backup. qemu-img gives them back."""
    image = filled(tmp_path / "image")
    dirty_bitmaps.add(image, "stale")
    support.qemu_io(image, "write 5M 1M")
    qcow2_bytes.Image(image).set("autoclear", 0)
    with support.untouched(image):
        result = support.run_instar("check", "-r", "leaks", "--output", "json", image)
    assert result.rc == 3 and result.json["leaks"] == 3 and "stale" in result.json["not-repaired"][0], str(result)
    support.qemu_img("check", "-r", "leaks", image)
    assert support.run_instar("check", image).rc == 0


def test_a_parent_need_not_be_there(tmp_path):
    support.create(tmp_path / "base", "4M")
    support.create(tmp_path / "top", backing="base", cwd=tmp_path)
    top = tmp_path / "top"
    support.qemu_io(top, "write -P 1 0 1M")
    before = support.content_hash(top)
    inner = qcow2_bytes.Image(top)
    inner.set_refcount(host_of(inner, 0), 7)
    kept = (tmp_path / "base").read_bytes()
    (tmp_path / "base").unlink()
    result = support.run_instar("check", "-r", "all", top)
    assert result.rc == 0 and "1 leaked clusters" in result.stdout, str(result)
    (tmp_path / "base").write_bytes(kept)
    assert support.content_hash(top) == before


# --- other formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["front", "end", "cut"])
def test_the_footers_of_a_vpc(tmp_path, which):
    image = tmp_path / "image.vhd"
    support.create(image, "20M", fmt="vpc", force_size="on")
    support.qemu_io(image, "write -P 1 3M 2M", "write -P 2 9M 100k", fmt="vpc")
    before, whole = support.content_hash(image, "vpc"), image.read_bytes()
    data = bytearray(whole)
    if which == "front":
        data[:512] = bytes(512)
    elif which == "end":
        data[-512:] = b"x" * 512
    else:
        del data[-512:]
    image.write_bytes(data)
    # A commit that loses power leaves none at the end, and then the one in front counts: that is no damage.
    found, what, fixed = (2, "all", "corruptions-fixed") if which == "front" else (3, "leaks", "leaks-fixed")
    assert support.run_instar("check", image).rc == found
    result = support.run_instar("check", "-r", what, "--output", "json", image)
    assert result.rc == 0 and result.json[fixed] == 1, str(result)
    assert image.read_bytes() == whole and support.content_hash(image, "vpc") == before


@pytest.mark.parametrize("place", [64 << 10, 128 << 10, 192 << 10, 256 << 10])
def test_a_header_or_region_table_of_a_vhdx(tmp_path, place):
    image = tmp_path / "image.vhdx"
    support.create(image, "20M", fmt="vhdx", block_size="1M")
    support.qemu_io(image, "write -P 1 3M 2M", fmt="vhdx")
    before, found = support.content_hash(image, "vhdx"), support.run_instar("check", image).rc
    with image.open("r+b") as file:
        file.seek(place + 20)
        file.write(b"damage")
    assert support.run_instar("check", image).rc == 2
    result = support.run_instar("check", "-r", "all", "--output", "json", image)
    # QEMU leaves room between blocks, which stays.
    assert result.rc == found == 3 and result.json["corruptions-fixed"] == 1, str(result)
    assert "room that no block uses" in result.json["not-repaired"][0]
    support.qemu_img("check", "-f", "vhdx", image)
    assert support.content_hash(image, "vhdx") == before


def test_a_vdi_that_counts_wrong(tmp_path):
    image = tmp_path / "image.vdi"
    support.create(image, "20M", fmt="vdi")
    support.qemu_io(image, "write -P 1 3M 2M", fmt="vdi")
    before, whole = support.content_hash(image, "vdi"), image.read_bytes()
    allocated = int.from_bytes(whole[388:392], "little")
    for wrong, key in ((allocated - 1, "corruptions-fixed"), (allocated + 2, "leaks-fixed")):
        image.write_bytes(whole[:388] + wrong.to_bytes(4, "little") + whole[392:])
        result = support.run_instar("check", "-r", "all", "--output", "json", image)
        assert result.rc == 0 and result.json[key] in (1, 2), str(result)
        assert image.read_bytes() == whole
    support.qemu_img("check", "-f", "vdi", image)
    assert support.content_hash(image, "vdi") == before


def test_a_parallels_image_that_was_not_closed(tmp_path):
    image = tmp_path / "image.hds"
    support.create(image, "20M", fmt="parallels")
    support.qemu_io(image, "write -P 1 3M 2M", fmt="parallels")
    before = support.content_hash(image, "parallels")
    with image.open("r+b") as file:
        file.seek(44)
        file.write((0x746F6E59).to_bytes(4, "little"))
    assert support.run_instar("check", image).rc == 2
    assert support.run_instar("check", "-r", "all", image).rc == 0
    support.qemu_img("check", "-f", "parallels", image)
    assert support.content_hash(image, "parallels") == before


def grain_entries(data, at, copy):
    """Where the entries of the first grain table are in the file, of the copy that the header names at this byte."""
    directory = at + int.from_bytes(data[at + copy : at + copy + 8], "little") * 512
    return at + int.from_bytes(data[directory : directory + 4], "little") * 512


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_a_vmdk_with_two_copies_of_its_tables(subformat, tmp_path):
    """Each copy says what the other one lacks; of what both say, and both can mean, nobody knows which is right."""
    image = tmp_path / "image.vmdk"
    support.create(image, "20M", fmt="vmdk", subformat=subformat)
    support.qemu_io(image, "write -P 1 0 1M", "write -P 2 3M 2M", fmt="vmdk")
    extent = image if subformat == "monolithicSparse" else tmp_path / "image-s001.vmdk"
    before, whole = support.content_hash(image, "vmdk"), extent.read_bytes()
    first, second = (grain_entries(whole, 0, copy) for copy in (56, 48))

    def damaged(*edits, mark=0):
        data = bytearray(whole)
        for at, value in edits:
            data[at : at + 4] = value.to_bytes(4, "little")
        data[72] = mark
        extent.write_bytes(data)

    damaged((first, 1 << 30), (second + 4, 0), mark=1)
    assert support.run_instar("check", image).rc == 2
    with support.untouched(extent):
        result = support.run_instar("check", "-r", "all", "--dry-run", "--output", "json", image)
        assert result.json["corruptions-fixable"] == 2, str(result)
        assert support.run_instar("check", "-r", "leaks", image).rc == 2
    result = support.run_instar("check", "-r", "all", "--output", "json", image)
    assert result.rc == 0 and result.json["corruptions-fixed"] == 2, str(result)
    assert extent.read_bytes() == whole and support.content_hash(image, "vmdk") == before
    support.qemu_img("check", "-f", "vmdk", image)

    # What a power loss in a commit leaves is no damage: the first copy counts, as for QEMU.
    damaged((second, 0), (second + 4, 0))
    found = support.run_instar("check", image)
    assert found.rc == 3 and "Leaked redundancy" in found.stderr, str(found)
    result = support.run_instar("check", "-r", "leaks", "--output", "json", image)
    assert result.rc == 0 and result.json["leaks-fixed"] == 1 and "corruptions-fixed" not in result.json, str(result)
    assert extent.read_bytes() == whole and support.content_hash(image, "vmdk") == before

    place = int.from_bytes(whole[first + 8 : first + 12], "little")
    for edits, words in (([(first, 1 << 30), (second, 1 << 30)], "past the end of the file"), ([(second, place)], "nothing says which"),
                         ([(first, 1 << 30), (second, place)], "overlaps")):
        damaged(*edits, mark=1)
        with support.untouched(extent):
            result = support.run_instar("check", "-r", "all", image)
        assert result.rc == 2 and "Not repaired:" in result.stderr and words in result.stderr, str(result)


# --- block devices ----------------------------------------------------------------------------------


def test_a_block_device(tmp_path):
    """What lies behind the image is not the image's; refcount blocks that are missing have no end to go to."""
    with Loop(tmp_path / "disk", 8 * support.MIB) as device:
        support.create(device, "6M", cluster_size="4k", refcount_bits=64)
        support.qemu_io(device, "write -P 1 1M 1M", "write -P 2 3M 300k")
        before = support.content_hash(device)
        qcow2_bytes.Image(device).spoil_refcounts(random.Random(1))
        result = support.run_instar("check", "-r", "all", "--output", "json", device)
        assert result.rc == 0 and result.json["corruptions-fixed"] > 0, str(result)
        assert support.qemu_img("check", device, rc=None).rc == 0 and support.content_hash(device) == before
        inner = qcow2_bytes.Image(device)
        inner.poke64(inner.get("refcount_table_offset"), 0)
        kept = support.digest(tmp_path / "disk")
        result = support.run_instar("check", "-r", "all", "--output", "json", device)
        assert result.rc == 2 and "a block device has no end" in result.json["not-repaired"][0], str(result)
        assert support.digest(tmp_path / "disk") == kept and support.content_hash(device) == before


# --- what is refused --------------------------------------------------------------------------------


def test_formats_that_cannot_be_repaired(tmp_path):
    image = tmp_path / "image"
    support.create(image, "4M", fmt="qcow")
    with support.untouched(image):
        result = support.run_instar("check", "-r", "all", image)
    assert result.rc == 63 and len(result.stderr.splitlines()) == 1 and "cannot be repaired" in result.stderr, str(result)


def test_an_image_in_use(tmp_path):
    image = filled(tmp_path / "image")
    inner = qcow2_bytes.Image(image)
    inner.set_refcount(host_of(inner, 0), 2)
    for options in ([], ["-r"]):
        with support.Holder(image, *options):
            result = support.run_instar("check", "-r", "all", image)
            assert result.rc == 1 and "another process" in result.stderr, str(result)
    before = support.digest(image)
    result = support.run_instar("check", "-r", "all", "-U", image)
    assert result.rc == 64 and "-U" in result.stderr and support.digest(image) == before
    assert support.run_instar("check", "--dry-run", image).rc == 64


def test_an_image_that_is_read_only(tmp_path):
    image = spoiled(tmp_path / "image", 1, {})
    image.chmod(0o400)
    with support.untouched(image):
        assert support.run_instar("check", "-r", "all", "--dry-run", image).rc == 2


# --- faults -----------------------------------------------------------------------------------------


def test_faults_at_system_calls(tmp_path):
    """Each call of each kind fails, or is where the program is killed: the image reads as before, and another repair finishes."""
    pristine = spoiled(tmp_path / "pristine", 1, {"cluster_size": "4k"})
    inner = qcow2_bytes.Image(pristine)
    inner.poke64(inner.get("refcount_table_offset") + 8, 0)
    image = tmp_path / "image"
    before = contents(pristine)

    def repair(fault="COUNT", nth=0, call="none"):
        shutil.copyfile(pristine, image)
        command = [support.instar_binary(), "check", "-r", "all", image]
        return support.run(faults.injector(), fault, str(nth), call, image, "--", *command)

    counted = repair()
    assert counted.rc == 0, str(counted)
    calls = re.findall(r"(\d+) of (\w+)", re.search(r"inject: not done \((.*)\)", counted.stderr)[1])
    changing = {name: int(count) for count, name in calls if name in ("pwritev", "pwrite64", "fdatasync", "ftruncate")}
    assert changing.keys() >= {"pwritev", "fdatasync"}, calls
    tried = 0
    for call, count in changing.items():
        for fault in ("KILL", "EIO", "ENOSPC"):
            for nth in range(1, count + 1):
                result = repair(fault, nth, call)
                assert "inject: done" in result.stderr, str(result)
                tried += 1
                if fault != "KILL":
                    lines = [line for line in result.stderr.splitlines() if faults.ERRNO[fault] in line]
                    assert result.rc == 1 and len(lines) == 1 and image.name in lines[0], str(result)
                    assert "running the repair again" in lines[0] or "nothing was changed" in lines[0], str(result)
                assert contents(image) == before, str(result)
                assert support.run_instar("check", "-q", "-r", "all", image).rc == 0
                assert support.qemu_img("check", image, rc=None).rc == 0
    assert tried > 20, tried


def test_one_that_is_damaged_in_passing_is_seen(tmp_path):
    """The checks of this file can fail: an image that reads differently is told from one that does not."""
    image = filled(tmp_path / "image")
    inner, before = qcow2_bytes.Image(image), contents(image)
    first = inner.l2_at(inner.data_clusters()[0])
    inner.poke64(first, inner.peek64(first) & COPIED)
    assert contents(image) != before
