"""`instar rebase`: an image reads what it read over another backing file, or over none; beside `qemu-img rebase` where that can."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import support
import test_mixed_chains
from test_devices import Loop
from support import KIB, MIB, Holder, assert_clean, content_hash, create, qemu_img, qemu_io, run_instar

SIZE = 6 * MIB


def writes(rng, size, fmt, count):
    """Commands of qemu-io; images of some formats know neither zero clusters nor discarded ones."""
    kinds = ["write -P 5", "write -P 5", "write -P 6"] + (["write -z", "write -zu", "write -c -P 7"] if fmt == "qcow2" else [])
    for _ in range(count):
        kind = rng.choice(kinds)
        unit = 64 * KIB if "-c" in kind else 4 * KIB
        at = rng.randrange(max(size // unit, 1)) * unit
        length = unit if "-c" in kind else min(rng.choice([4, 64, 300]) * KIB, size - at)
        if length > 0 and at + length <= size:
            yield f"{kind} {at} {length}"


def drawn(path, rng, size, below=None, below_fmt="qcow2", fmt="qcow2", **options):
    """A drawn image, over another one if it is given."""
    backing = {"backing": below.name, "backing_fmt": below_fmt} if below else {}
    create(path, size, fmt=fmt, **backing, **options)
    commands = list(writes(rng, size, fmt, rng.randrange(1, 14)))
    for command in commands:
        try:
            qemu_io(path, command, fmt=fmt)
        except AssertionError:
            # A compressed cluster is not written over another one in every version.
            continue
    return path


def rebase(image, backing, fmt="qcow2", *options, rc=0):
    named = ["-b", backing] if backing == "" else ["-b", backing, "-F", fmt]
    result = run_instar("rebase", "--output", "json", *named, *options, image)
    assert result.rc == rc, str(result)
    return result.json if rc == 0 else result


def named(path):
    said = support.info(path)
    return said.get("backing-filename"), said.get("backing-filename-format")


OVERLAYS = [{}, {"cluster_size": 4096}, {"cluster_size": 2 * MIB}, {"extended_l2": "on"}, {"compat": "0.10"},
            {"lazy_refcounts": "on"}, {"refcount_bits": 1}]


@pytest.mark.parametrize("seed", range(24))
def test_drawn_chains_read_the_same_over_another_backing(seed, tmp_path):
    rng = random.Random(seed)
    sizes = [rng.choice([SIZE, SIZE, SIZE // 2, SIZE + 700 * KIB, 64 * KIB]) for _ in range(3)]
    fmts = [rng.choice(["qcow2", "raw", "qcow2", "qcow", "vmdk"]) for _ in range(2)]
    root = drawn(tmp_path / "root", rng, sizes[0], fmt=fmts[0])
    old = drawn(tmp_path / "old", rng, sizes[1], root, fmts[0])
    other = drawn(tmp_path / "other", rng, sizes[2], fmt=fmts[1])
    top = drawn(tmp_path / "top", rng, SIZE, old, **OVERLAYS[seed % len(OVERLAYS)])
    for backing, fmt in [("other", fmts[1]), ("root", fmts[0]), ("", None)]:
        image, theirs = tmp_path / f"image-{fmt}-{backing}", tmp_path / f"theirs-{fmt}-{backing}"
        shutil.copy(top, image), shutil.copy(top, theirs)
        before = content_hash(image)
        with support.untouched(root, old, other):
            dry = rebase(image, backing, fmt, "--dry-run")
            assert dry["dry-run"] and content_hash(image) == before and named(image) == named(top)
            said = rebase(image, backing, fmt)
        assert (dry["clusters-written"], dry["bytes-written"]) == (said["clusters-written"], said["bytes-written"])
        assert content_hash(image) == before
        assert named(image) == ((backing, fmt) if backing else (None, None))
        assert_clean(image)
        qemu_img("rebase", "-b", backing, *(["-F", fmt] if fmt else []), theirs)
        # Zeroes take no space where they are a whole cluster; a piece of it that differs is no reason to allocate one.
        room = 2 * max(OVERLAYS[seed % len(OVERLAYS)].get("cluster_size", 65536), 65536)
        assert image.stat().st_size <= theirs.stat().st_size + room


@pytest.fixture
def chain(tmp_path):
    """base <- mid <- top, and `other`, which holds something else."""
    create(tmp_path / "base", SIZE)
    qemu_io(tmp_path / "base", "write -P 1 0 3M")
    create(tmp_path / "mid", SIZE, backing="base")
    qemu_io(tmp_path / "mid", "write -P 2 1M 640k", "write -z 2M 64k")
    create(tmp_path / "top", SIZE, backing="mid")
    qemu_io(tmp_path / "top", "write -P 3 512k 64k", "write -z 0 64k")
    create(tmp_path / "other", SIZE * 2)
    qemu_io(tmp_path / "other", "write -P 9 0 12M")
    return tmp_path


def test_dropping_a_layer_reads_and_writes_only_what_it_held(chain):
    before = content_hash(chain / "top")
    said = rebase(chain / "top", "base")
    assert said["bytes-written"] == 704 * KIB and said["clusters-written"] == 11
    assert content_hash(chain / "top") == before
    (chain / "mid").unlink()
    assert content_hash(chain / "top") == before
    assert_clean(chain / "top")


def test_a_layer_is_put_in_between(chain):
    """What both views have of the same file is not read, so that nothing is written."""
    create(chain / "empty", SIZE, backing="mid")
    before = content_hash(chain / "top")
    assert rebase(chain / "top", "empty")["bytes-written"] == 0
    assert content_hash(chain / "top") == before and named(chain / "top") == ("empty", "qcow2")


def test_zeroes_hide_a_longer_and_a_fuller_backing(chain):
    before = content_hash(chain / "top")
    rebase(chain / "top", "other")
    assert content_hash(chain / "top") == before
    assert_clean(chain / "top")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_an_image_without_a_backing_does_not_show_the_new_one(compat, chain):
    create(chain / "alone", SIZE, compat=compat)
    qemu_io(chain / "alone", "write -P 4 1M 64k")
    before = content_hash(chain / "alone")
    rebase(chain / "alone", "other")
    assert content_hash(chain / "alone") == before and named(chain / "alone") == ("other", "qcow2")
    assert_clean(chain / "alone")


def test_an_image_that_gets_no_backing_stands_alone(chain):
    before = content_hash(chain / "top")
    said = rebase(chain / "top", "")
    assert said["backing"] is None and said["backing-format"] is None
    for name in ("base", "mid"):
        (chain / name).unlink()
    assert content_hash(chain / "top") == before and named(chain / "top") == (None, None)
    assert_clean(chain / "top")


def test_only_the_record_is_changed_without_a_look(chain):
    result = run_instar("rebase", "-u", "-b", "later", "-F", "raw", chain / "top")
    assert result.rc == 0 and "could not be looked at" in result.stderr, str(result)
    said = support.run("qemu-img", "info", "-U", "--output", "json", chain / "top").json
    assert (said["backing-filename"], said["backing-filename-format"]) == ("later", "raw")
    result = run_instar("rebase", "-u", "-b", "other", "-F", "qcow2", chain / "top")
    assert "nothing was compared" in result.stderr and named(chain / "top") == ("other", "qcow2")
    shutil.copy(chain / "top", chain / "theirs")
    qemu_img("rebase", "-u", "-b", "other", "-F", "qcow2", chain / "theirs")
    support.assert_same_content(chain / "top", chain / "theirs")
    assert rebase(chain / "top", "", None, "-u")["unsafe"] and named(chain / "top") == (None, None)


def test_a_name_with_a_colon_is_told_how_to_be_written(chain):
    """QEMU takes it for a protocol."""
    shutil.copy(chain / "mid", chain / "a:b.qcow2")
    result = run_instar("rebase", "-u", "-b", "a:b.qcow2", "-F", "qcow2", chain / "top")
    assert result.rc == 0 and "'./a:b.qcow2'" in result.stderr, str(result)
    result = run_instar("rebase", "-u", "-b", "nbd:localhost:1", "-F", "raw", chain / "top")
    assert result.rc == 0 and "is no file" in result.stderr and "./" not in result.stderr, str(result)
    # The advice works.
    result = run_instar("rebase", "-u", "-b", "./a:b.qcow2", "-F", "qcow2", chain / "top")
    assert result.rc == 0 and "nothing was compared" in result.stderr, str(result)
    assert named(chain / "top")[0] == "./a:b.qcow2"
    qemu_img("check", chain / "top")


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices take root")
def test_a_device_without_room_is_refused(chain):
    """On a device that ends with the image, there is no place for what differs; on a longer one there is."""
    create(chain / "small", SIZE, backing=str(chain / "mid"))
    for room, rc in [(0, 1), (8 * MIB, 0)]:
        length = -(-(chain / "small").stat().st_size // (64 * KIB)) * 64 * KIB
        with Loop(chain / "disk", length + room) as device:
            with open(device, "r+b") as file:
                file.write((chain / "small").read_bytes())
            before, bytes_before = content_hash(chain / "small"), support.digest(chain / "disk")
            options = ["-b", chain / "other", "-F", "qcow2", "--allow-backing-dir", chain]
            result = run_instar("rebase", *options, device)
            assert result.rc == rc, str(result)
            if rc:
                assert "NO_SPACE" in result.stderr and result.stderr.count("\n") == 1, str(result)
                assert support.digest(chain / "disk") == bytes_before
            else:
                flat = chain / "flat"
                qemu_img("convert", "-f", "qcow2", "-O", "raw", device, flat)
                qemu_img("compare", "-f", "raw", "-F", "qcow2", flat, chain / "small")
                assert before == content_hash(chain / "small")


def test_a_moved_backing_is_named_where_it_is(chain):
    before = content_hash(chain / "top")
    (chain / "sub").mkdir()
    (chain / "mid").rename(chain / "sub/mid")
    qemu_img("rebase", "-u", "-b", "../base", "-F", "qcow2", chain / "sub/mid")
    refused(chain, "-b", "base", "-F", "qcow2", mentions=["mid", "-u"])
    rebase(chain / "top", "sub/mid", "qcow2", "-u")
    assert content_hash(chain / "top") == before


def refused(chain, *options, mentions, image="top"):
    files = [path for path in chain.iterdir() if path.is_file()]
    with support.untouched(*files):
        result = run_instar("rebase", *options, chain / image)
    assert result.rc != 0 and result.stdout == "", str(result)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and all(mention in lines[0] for mention in mentions), str(result)
    return result


def test_a_refusal_changes_nothing(chain):
    refused(chain, "-b", "top", "-F", "qcow2", mentions=["top", "itself"])
    refused(chain, "-u", "-b", "top", "-F", "qcow2", mentions=["top", "itself"])
    refused(chain, "-b", "top", "-F", "qcow2", image="mid", mentions=["mid", "back to itself"])
    refused(chain, "-u", "-b", "top", "-F", "qcow2", image="base", mentions=["base", "back to itself"])
    refused(chain, "-b", "other", mentions=["-F"])
    refused(chain, "-b", "", "-F", "qcow2", mentions=["-F"])
    refused(chain, "-b", "nowhere", "-F", "qcow2", mentions=["nowhere", "-u"])
    refused(chain, "-b", "other", "-F", "vmdk", mentions=["other"])
    refused(chain, "-b", "other", "-F", "nonsense", mentions=["nonsense"])
    refused(chain, "-u", "-b", "other", "-F", "nonsense", mentions=["nonsense"])
    refused(chain, "-b", "nbd:localhost:1", "-F", "raw", mentions=["nbd:", "-u"])
    refused(chain, "-b", "n" * 1024, "-F", "qcow2", "-u", mentions=["top"])
    refused(chain, "-c", "-b", "other", "-F", "qcow2", mentions=["-c"])
    refused(chain, "-U", "-b", "other", "-F", "qcow2", mentions=["-U"])
    (chain / "mid").rename(chain / "gone")
    refused(chain, "-b", "base", "-F", "qcow2", mentions=["mid", "-u"])


def test_a_raw_image_has_no_backing(chain):
    (chain / "raw").write_bytes(bytes(MIB))
    refused(chain, "-b", "base", "-F", "qcow2", image="raw", mentions=["raw"])
    refused(chain, "-f", "raw", "-b", "base", "-F", "qcow2", image="raw", mentions=["raw"])


def test_internal_snapshots_keep_what_they_read(chain):
    qemu_img("snapshot", "-c", "one", chain / "top")
    refused(chain, "-b", "other", "-F", "qcow2", mentions=["internal snapshots", "-u"])
    qemu_img("snapshot", "-d", "one", chain / "top")
    rebase(chain / "top", "other")


@pytest.mark.parametrize("name", ["top", "mid", "base", "other"])
def test_an_image_in_use_is_left_alone(name, chain):
    with Holder(chain / name):
        refused(chain, "-b", "other", "-F", "qcow2", mentions=[name, "process"])


def test_a_corrupt_or_encrypted_image_is_named(chain):
    qemu_img("create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o",
             "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", chain / "secret", "1M")
    refused(chain, "-b", "other", "-F", "qcow2", image="secret", mentions=["secret", "encrypt"])


def test_bitmaps_stay(chain):
    qemu_img("bitmap", "--add", chain / "top", "one")
    before = content_hash(chain / "top")
    rebase(chain / "top", "other")
    assert content_hash(chain / "top") == before
    bitmaps = support.info(chain / "top")["format-specific"]["data"]["bitmaps"]
    assert [(bitmap["name"], bitmap["flags"]) for bitmap in bitmaps] == [("one", ["auto"])]
    assert_clean(chain / "top")


@pytest.mark.parametrize("mode", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_cache_modes(mode, chain):
    before = content_hash(chain / "top")
    result = run_instar("rebase", "-t", mode, "-T", mode, "-q", "-p", "-b", "other", "-F", "qcow2", chain / "top")
    if mode in ("none", "directsync") and result.rc:
        assert "O_DIRECT" in result.stderr
        return
    assert result.rc == 0 and result.stdout == "" and result.stderr == "", str(result)
    assert content_hash(chain / "top") == before


@pytest.mark.parametrize("seed", range(12))
def test_killed_at_any_time_it_reads_the_same_and_a_second_run_finishes(seed, tmp_path):
    rng = random.Random(seed)
    create(tmp_path / "old", 64 * MIB, fmt="raw")
    qemu_io(tmp_path / "old", "write -P 1 0 64M", fmt="raw")
    create(tmp_path / "new", 64 * MIB, fmt="raw")
    create(tmp_path / "top", 64 * MIB, backing="old", backing_fmt="raw")
    qemu_io(tmp_path / "top", *(f"write -P 2 {at}M 64k" for at in range(0, 64, 3)))
    before = content_hash(tmp_path / "top")
    command = [support.instar_binary(), "rebase", "-q", "-b", "new", "-F", "raw", tmp_path / "top"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(rng.random() * 0.15)
    process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
    process.wait()
    assert content_hash(tmp_path / "top") == before
    rebase(tmp_path / "top", "new", "raw")
    assert content_hash(tmp_path / "top") == before and named(tmp_path / "top") == ("new", "raw")


def test_names_begin_at_the_directory_of_the_image(chain):
    (chain / "far").mkdir()
    shutil.copy(chain / "other", chain / "far/other")
    before = content_hash(chain / "top")
    result = run_instar("rebase", "-b", "far/other", "-F", "qcow2", "top", cwd=chain)
    assert result.rc == 0, str(result)
    result = run_instar("rebase", "-b", os.fspath(chain / "far/other"), "-F", "qcow2", "../top", cwd=chain / "far")
    assert result.rc == 0 and named(chain / "top")[0] == os.fspath(chain / "far/other"), str(result)
    assert content_hash(chain / "top") == before


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["vpc", "vhdx", "vdi"])
def test_images_that_record_identities(kind, seed, tmp_path, monkeypatch):
    """What reads something else over another one is written; and what is above the image still knows it."""
    monkeypatch.setattr(test_mixed_chains, "KINDS", (kind,))
    for drawn in range(100 * seed, 100 * seed + 100):
        folder = tmp_path / str(drawn)
        folder.mkdir()
        chain = test_mixed_chains.Chain(folder, random.Random(drawn), 3)
        if set(chain.kinds) == {kind}:
            break
    assert set(chain.kinds) == {kind}, "of a hundred chains, one is of this format alone"
    paths = [chain.path(number) for number in range(4)]
    held = chain.disks[3]
    wanted = chain.read_over(3, chain.disks[0])
    with support.untouched(*paths[:3]):
        outcome = rebase(chain.path(3), chain.names[0], kind)
        assert (outcome["bytes-written"] > 0) == (held != wanted)
    for path in paths[1:3]:
        path.unlink()
    flat = tmp_path / "flat.raw"
    flat.write_bytes(held)
    assert run_instar("compare", "-F", "raw", chain.path(3), flat).rc == 0
    assert run_instar("check", "-q", chain.path(3)).rc in (0, 3)


@pytest.mark.parametrize("zeroed", ["on", "off"])
def test_a_vmdk_gets_what_differs_and_its_child_still_knows_it(tmp_path, zeroed):
    rng = random.Random(zeroed)
    size = 40 * MIB + 512
    for name, below in (("base", None), ("other", None), ("mid", "base"), ("top", "mid"), ("child", "top")):
        backing = {} if below is None else {"backing": f"{below}.vmdk", "backing_fmt": "vmdk"}
        create(tmp_path / f"{name}.vmdk", size, fmt="vmdk", cwd=tmp_path, zeroed_grain=zeroed, **backing)
        writes = [f"write -P {rng.randrange(1, 200)} {rng.randrange(size // 512 - 700) * 512} {rng.randrange(1, 700) * 512}"
                  for _ in range(6)]
        qemu_io(tmp_path / f"{name}.vmdk", *writes, fmt="vmdk")
    before = [content_hash(tmp_path / f"{name}.vmdk", "vmdk") for name in ("top", "child")]
    for new in ("other.vmdk", "base.vmdk", "other.vmdk"):
        with support.untouched(*(tmp_path / f"{name}.vmdk" for name in ("base", "mid", "other", "child"))):
            rebase(tmp_path / "top.vmdk", new, "vmdk")
        # QEMU compares content IDs, too.
        assert [content_hash(tmp_path / f"{name}.vmdk", "vmdk") for name in ("top", "child")] == before
        support.assert_clean(tmp_path / "top.vmdk", "vmdk")
    (tmp_path / "mid.vmdk").unlink()
    assert run_instar("commit", "-f", "vmdk", tmp_path / "child.vmdk").rc == 0
    assert content_hash(tmp_path / "top.vmdk", "vmdk") == before[1]


def test_persistent_bitmaps_stay(chain):
    """What they call dirty stays dirty; the image that they are in gets data, another backing file, and loses it."""
    qemu_img("bitmap", "--add", chain / "top", "one")
    qemu_img("bitmap", "--add", "--disable", chain / "top", "two")
    qemu_io(chain / "top", "write -P 9 1M 64k")
    names = lambda: {(each["name"], tuple(each["flags"])) for each in support.info(chain / "top")["format-specific"]["data"]["bitmaps"]}
    had = names()
    before = content_hash(chain / "top")
    assert rebase(chain / "top", "other")["bytes-written"] > 0
    assert names() == had and content_hash(chain / "top") == before
    assert rebase(chain / "top", "base")["bytes-written"] >= 0
    assert names() == had and content_hash(chain / "top") == before
    support.assert_clean(chain / "top")


def test_a_qcow_of_version_1_grows_and_names_the_new_backing(chain):
    create(chain / "first", None, fmt="qcow", backing="mid")
    before = content_hash(chain / "first", "qcow")
    assert rebase(chain / "first", "base")["bytes-written"] > 0
    assert content_hash(chain / "first", "qcow") == before
    assert support.info(chain / "first")["backing-filename"] == "base"


@pytest.fixture
def siblings(tmp_path):
    """Three overlays of `old`, and `new`, which differs from that in its second MiB."""
    create(tmp_path / "old", SIZE)
    qemu_io(tmp_path / "old", "write -P 1 0 5M")
    support.copy(tmp_path / "old", tmp_path / "new")
    qemu_io(tmp_path / "new", "write -P 2 1M 1M")
    for number, name in enumerate("abc"):
        create(tmp_path / name, SIZE, backing="old", cwd=tmp_path)
        qemu_io(tmp_path / name, f"write -P {10 + number} {1024 + 64 * number}k 64k")
    return tmp_path


def several(folder, *options, images="abc"):
    return run_instar("rebase", "-b", "new", "-F", "qcow2", *options, *images, cwd=folder)


def statuses(result):
    return [entry["status"] for entry in result.json["images"]]


@pytest.mark.parametrize("sandbox", support.SANDBOXES)
def test_several_images_get_a_new_backing_in_one_call(sandbox, siblings):
    before = {name: content_hash(siblings / name) for name in "abc"}
    with support.untouched(*(siblings / name for name in "abc")):
        result = several(siblings, "--dry-run", "--output", "json", "--sandbox", sandbox)
    assert statuses(result) == ["possible"] * 3
    result = several(siblings, "--output", "json", "--sandbox", sandbox)
    assert result.rc == 0 and statuses(result) == ["rebased"] * 3
    assert [entry["result"]["bytes-written"] for entry in result.json["images"]] == [MIB - 64 * KIB] * 3
    (siblings / "old").unlink()
    for name in "abc":
        assert content_hash(siblings / name) == before[name] and named(siblings / name) == ("new", "qcow2")
        assert_clean(siblings / name)


def test_a_call_takes_64_images(siblings):
    names = [f"c{number}" for number in range(65)]
    for name in names:
        support.copy(siblings / "c", siblings / name)
    with support.untouched(*(siblings / name for name in names)):
        result = several(siblings, images=names)
    assert result.rc == 2 and "65 images are more than the 64 of one call" in result.stderr
    result = several(siblings, "--dry-run", "--output", "json", images=names[:64])
    assert result.rc == 0 and statuses(result) == ["possible"] * 64


def test_several_images_have_one_progress(siblings):
    result = several(siblings, "--progress=json")
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [lines[0]["status"], lines[-1]["status"]] == ["created", "concluded"]
    total = 3 * (MIB - 64 * KIB)
    assert {line["total-progress"] for line in lines if line.get("stage") == "writing"} == {total}
    done = [line["current-progress"] for line in lines]
    assert done == sorted(done) and done[-1] == total
    assert [entry["status"] for entry in lines[-1]["result"]["images"]] == ["rebased"] * 3
    assert result.stdout.count("rebased onto 'new'") == 3


def test_one_that_is_refused_keeps_all_of_several_as_they_are(siblings):
    qemu_img("snapshot", "-c", "s", siblings / "c")
    files = [siblings / name for name in ("a", "b", "c", "old", "new")]
    with support.untouched(*files), Holder(siblings / "b"):
        result = several(siblings, "--output", "json")
        assert result.rc == 1 and statuses(result) == ["untouched", "failed", "failed"]
        assert result.error["name"] == "ERROR_IMAGE_IN_USE" and "none of the 3 images" in result.error["message"]
        assert "snapshots" in result.json["images"][2]["error"]["message"]
        result = several(siblings)
        assert result.stdout == "" and len(result.stderr.splitlines()) == 2, str(result)
    for images, words in [(["a", "./a"], "same file"), (["a", "none"], "'none'"), (["a", "new"], "itself"), (["a"] * 65, "65 images")]:
        with support.untouched(*files):
            result = several(siblings, images=images)
        assert result.rc in (1, 2) and words in result.stderr, str(result)


def test_a_name_that_is_no_text_is_refused_by_its_reason(siblings):
    missing = os.fsdecode(b"d\xff")
    with support.untouched(siblings / "a"):
        result = several(siblings, images=["a", missing])
    assert result.rc == 1 and "d\\xff" in result.stderr and "does not exist" in result.stderr, str(result)


def test_an_image_below_another_one_of_the_call_is_named(siblings):
    create(siblings / "upper", backing="a", cwd=siblings)
    with support.untouched(siblings / "a", siblings / "upper"):
        result = several(siblings, images=["a", "upper"])
        other = several(siblings, images=["upper", "a"])
    assert result.rc == 1 and "'upper': has 'a' below it" in result.stderr, str(result)
    assert other.rc == 1 and "'a': shares an image with 'upper'" in other.stderr and "stop" not in other.stderr, str(other)
    for name in ["a", "upper"]:
        assert several(siblings, images=[name]).rc == 0


def test_where_one_of_several_fails_the_ones_before_it_are_done_and_a_second_run_finishes(siblings):
    create(siblings / "long", 256 * MIB, backing="old", cwd=siblings)
    qemu_io(siblings / "long", f"write -P 7 8M {support.FILE_LIMIT}")
    images = ["a", "long", "c"]
    before = {name: content_hash(siblings / name) for name in images}
    limit = ["prlimit", f"--fsize={support.FILE_LIMIT}", str(support.instar_binary())]
    with support.untouched(siblings / "c"):
        result = support.run(*limit, "rebase", "--output", "json", "-b", "new", "-F", "qcow2", *images, cwd=siblings)
    assert result.rc == 1 and statuses(result) == ["rebased", "failed", "untouched"], str(result)
    assert "1 of the 3 images are rebased, and 1 untouched" in result.error["message"]
    assert {name: content_hash(siblings / name) for name in images} == before
    result = several(siblings, "--output", "json", images=images)
    assert statuses(result) == ["rebased"] * 3
    assert [entry["result"]["bytes-written"] > 0 for entry in result.json["images"]] == [False, True, True]
    assert {name: content_hash(siblings / name) for name in images} == before


@pytest.mark.parametrize("seed", range(6))
def test_several_that_are_killed_read_the_same_and_a_second_run_finishes(seed, siblings):
    rng = random.Random(seed)
    before = {name: content_hash(siblings / name) for name in "abc"}
    command = [support.instar_binary(), "rebase", "-q", "-b", "new", "-F", "qcow2", *"abc"]
    process = subprocess.Popen(command, cwd=siblings, stderr=subprocess.DEVNULL)
    time.sleep(rng.random() * 0.1)
    process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    process.wait()
    # Those that it has started end with it, at a safe point.
    assert several(siblings, "--wait", "10").rc == 0
    assert {name: content_hash(siblings / name) for name in "abc"} == before


@pytest.mark.parametrize("fmt", ["vmdk", "vhdx"])
def test_a_missing_parent_whose_identity_is_recorded_has_to_be_put_there(fmt, tmp_path):
    """`-u` cannot record it either, so it is not what the message advises."""
    for name, options in (("old", []), ("top", ["-b", tmp_path / "old", "-F", fmt])):
        assert run_instar("create", "-f", fmt, *options, tmp_path / name, *([] if options else ["8M"])).rc == 0
    for options in ([], ["-u"]):
        said = refused(tmp_path, *options, "-b", "nonesuch", "-F", fmt, mentions=["nonesuch", "put it there first"])
        assert "use -u" not in said.stderr


def test_an_unknown_format_is_the_options_fault(chain):
    for options in ([], ["-u"]):
        said = refused(chain, *options, "-b", "base", "-F", "qcow3", mentions=["unknown format 'qcow3'", "qcow2"])
        assert "base" not in said.stderr
