"""`instar commit --bitmaps`: the bitmaps of the overlay are merged into those of the target. qemu makes and reads them."""

import json
import random
import subprocess
import time

import dirty_bitmaps
import pytest
import qcow2_bytes
import support
from dirty_bitmaps import add, dirty, merge, rounded, within
from support import KIB, MIB, refuse


def commit(pair, *options):
    result = support.run_instar("commit", "--bitmaps", "--output", "json", *options, pair.top)
    assert result.rc == 0, str(result)
    support.assert_clean(pair.base)
    support.assert_clean(pair.top)
    return {bitmap["name"]: bitmap["result"] for bitmap in json.loads(result.stdout)["bitmaps"]}


@pytest.mark.parametrize("granularities", [(4 * KIB, 2 * MIB), (2 * MIB, 4 * KIB), (64 * KIB, 64 * KIB)])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_merged_and_made(pair, cluster_size, granularities):
    size = 20 * MIB + 1536
    pair.make(size, base_options={"cluster_size": cluster_size}, base=["write -P 1 0 6M"])
    add(pair.base, "both", "-g", str(granularities[0]))
    support.qemu_io(pair.base, "write -P 2 7M 64k")
    add(pair.top, "both", "-g", str(granularities[1]))
    support.qemu_io(pair.top, "write -P 9 1M 300k")
    add(pair.top, "late", "-g", str(granularities[1]))
    support.qemu_io(pair.top, "write -P 8 12M 100k", f"write -P 5 {20 * MIB} 1536")
    before = {name: dirty(pair.base, name) for name in dirty_bitmaps.names(pair.base)}
    own = {name: dirty(pair.top, name) for name in ("both", "late")}
    assert commit(pair) == {"both": "merged", "late": "made"}
    both = dirty(pair.base, "both")
    assert within([*before["both"], *rounded(own["both"], granularities[0], size)], both)
    # One that is made says what the overlay's says, and not all that arrived.
    assert dirty(pair.base, "late") == own["late"]
    made = dirty_bitmaps.names(pair.base)["late"]
    assert made["granularity"] == granularities[1] and made["flags"] == ["auto"]
    # qemu goes on with it, and the overlay keeps its own.
    support.qemu_io(pair.base, "write -P 3 5M 64k")
    assert within([(5 * MIB, 5 * MIB + 64 * KIB)], dirty(pair.base, "late"))
    assert dirty(pair.top, "late") == own["late"]


def test_what_is_not_merged_is_named(pair):
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 512k 1M"])
    for name in ("off", "theirs-off"):
        add(pair.top, name)
    support.qemu_img("bitmap", "--disable", pair.top, "off")
    add(pair.base, "theirs-off")
    support.qemu_img("bitmap", "--disable", pair.base, "theirs-off")
    result = support.run_instar("commit", "--bitmaps", pair.top)
    assert result.rc == 0, str(result)
    assert "'off' is not merged, because it is disabled" in result.stderr
    assert "'theirs-off' is not merged, because that of" in result.stderr
    assert "0 bitmaps were merged, 0 made, and 2 skipped" in result.stdout
    assert set(dirty_bitmaps.names(pair.base)) == {"theirs-off"}


def test_a_dry_run_changes_nothing(pair):
    pair.make(top=["write -P 2 512k 1M"])
    add(pair.top, "new")
    before = pair.base.read_bytes(), pair.top.read_bytes()
    assert commit(pair, "--dry-run") == {"new": "made"}
    assert before == (pair.base.read_bytes(), pair.top.read_bytes())


def test_a_hundred_bitmaps(pair):
    pair.make(top=["write -P 2 0 64k"])
    names = [f"{n:03}-é ü" for n in range(100)]
    for name in names:
        add(pair.top, name)
    add(pair.base, "own")
    support.qemu_io(pair.top, "write -P 7 1M 64k")
    assert set(commit(pair).values()) == {"made"}
    assert set(dirty_bitmaps.names(pair.base)) == {"own", *names}
    assert dirty(pair.base, names[57]) == [(MIB, MIB + 64 * KIB)]


def test_a_chain_of_three(tmp_path):
    paths = [tmp_path / name for name in ("base.qcow2", "mid.qcow2", "top.qcow2")]
    support.qemu_img("create", "-q", "-f", "qcow2", paths[0], "4M")
    for below, path in zip(paths, paths[1:]):
        support.qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", path)
    base, mid, top = paths
    for path in paths:
        add(path, "all")
    for path in (mid, top):
        add(path, "since-mid")
    for path in (base, top):
        add(path, "gap")
    support.qemu_io(mid, "write -P 1 1M 64k")
    support.qemu_io(top, "write -P 2 2M 64k")
    result = support.run_instar("commit", "--bitmaps", "--output", "json", "-b", "base.qcow2", top)
    assert result.rc == 0, str(result)
    found = {bitmap["name"]: bitmap["result"] for bitmap in json.loads(result.stdout)["bitmaps"]}
    assert found == {"all": "merged", "since-mid": "made", "gap": "interrupted"}
    both = merge([(MIB, MIB + 64 * KIB), (2 * MIB, 2 * MIB + 64 * KIB)])
    assert dirty(base, "all") == dirty(base, "since-mid") == both
    support.assert_clean(base)


def test_raw_cannot_have_them(tmp_path):
    support.qemu_img("create", "-q", "-f", "raw", tmp_path / "base.raw", "4M")
    support.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "top.qcow2")
    top = tmp_path / "top.qcow2"
    add(top, "one")
    support.qemu_io(top, "write -P 2 0 64k")
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    result = support.run_instar("commit", "--bitmaps", top)
    assert result.rc == 1 and "cannot have bitmaps" in result.stderr and "leave out --bitmaps" in result.stderr, str(result)
    assert before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]


def test_without_the_option_a_line_says_so(pair):
    pair.make(top=["write -P 2 0 64k"])
    add(pair.top, "one")
    result = support.run_instar("commit", pair.top)
    assert result.rc == 0 and "--bitmaps does so" in result.stderr, str(result)


def test_the_larger_overlay(pair):
    pair.make(64 * MIB, top=["write -P 2 60M 64k"])
    support.qemu_img("resize", pair.top, "96M")
    add(pair.base, "both", "-g", "512")
    add(pair.top, "both", "-g", "512")
    add(pair.top, "new", "-g", "512")
    support.qemu_io(pair.top, "write -P 3 90M 64k")
    assert commit(pair, "--resize-backing") == {"both": "merged", "new": "made"}
    assert dirty(pair.base, "new") == [(90 * MIB, 90 * MIB + 64 * KIB)]
    assert within([(90 * MIB, 90 * MIB + 64 * KIB)], dirty(pair.base, "both"))


FLAGS, GRANULARITY = 12, 17
LONG = "b" * 200 + ".qcow2"
SMALL = {"cluster_size": 512}
#: The base's name, how the middle is made, and whether its header has room for the name twice.
CASES = [("base.qcow2", {}, True), (LONG, {}, True), ("b.qcow2", SMALL, True), (LONG, SMALL, False)]


def chain(tmp_path, *, mid_options=None, base_name="base.qcow2"):
    """Base, mid and top; what lies in each shows through the others."""
    base, mid, top = (tmp_path / name for name in (base_name, "mid.qcow2", "top.qcow2"))
    support.create(base, 4 * MIB)
    support.create(mid, backing=base.name, **(mid_options or {}))
    support.create(top, backing=mid.name)
    support.qemu_io(base, "write -P 1 0 4M")
    support.qemu_io(mid, "write -P 2 1M 256k")
    support.qemu_io(top, "write -P 3 64k 64k")
    add(top, "one")
    support.qemu_io(top, "write -P 4 3M 64k")
    return base, mid, top


def test_made_where_the_name_of_the_backing_stands(tmp_path):
    for number, (name, options, fits) in enumerate(CASES):
        directory = tmp_path / str(number)
        directory.mkdir()
        base, mid, top = chain(directory, mid_options=options, base_name=name)
        if not fits:
            refuse("ERROR_UNSUPPORTED_FORMAT", top, "--bitmaps", files=[base, mid], mentions=["no room to refer"])
            continue
        content, own = support.content_hash(top), dirty(top, "one")
        result = support.run_instar("commit", "--bitmaps", top)
        assert result.rc == 0, str(result)
        assert (dirty(mid, "one"), own) == (own, [(3 * MIB, 3 * MIB + 64 * KIB)])
        assert support.content_hash(top) == support.content_hash(mid) == content
        for path in (base, mid, top):
            support.assert_clean(path)
        found = support.info(mid)
        assert (found["backing-filename"], found["backing-filename-format"]) == (name, "qcow2")
        whole = support.qemu_img("info", "--output=json", "--backing-chain", top).json
        assert [image["filename"] for image in whole] == [str(top), str(mid), str(base)]
        # qemu writes the header anew, and goes on with all of it.
        add(mid, "two")
        support.qemu_io(mid, "write -P 5 2M 64k")
        assert within([(2 * MIB, 2 * MIB + 64 * KIB)], dirty(mid, "one"))
        assert support.info(mid)["backing-filename"] == name
        support.assert_clean(mid)


def test_an_extension_that_does_not_count(tmp_path):
    _, mid, top = chain(tmp_path)
    add(mid, "one")
    add(mid, "old")
    # A program that does not know bitmaps changed the image.
    qcow2_bytes.Image(mid).set("autoclear", 0)
    content = support.content_hash(top)
    result = support.run_instar("commit", "--bitmaps", "--output", "json", top)
    assert result.rc == 0, str(result)
    assert [bitmap["result"] for bitmap in json.loads(result.stdout)["bitmaps"]] == ["made"]
    assert set(dirty_bitmaps.names(mid)) == {"one"} and dirty(mid, "one") == [(3 * MIB, 3 * MIB + 64 * KIB)]
    assert support.content_hash(top) == support.content_hash(mid) == content
    # The clusters of the bitmaps of before were leaked when they ceased to count.
    assert support.qemu_img("check", "-q", mid, rc=None).rc in (0, 3)
    support.repair(mid)
    assert dirty(mid, "one") == [(3 * MIB, 3 * MIB + 64 * KIB)]


def test_a_table_that_crosses_a_sector(pair):
    """No write of a sector could change it. The advice is taken: no bitmap is lost, and the table is elsewhere."""
    pair.make(top=["write -P 1 0 64k"])
    add(pair.base, "kept")
    add(pair.top, "new")
    header = bytearray(pair.base.read_bytes()[:4096])
    length = int.from_bytes(header[100:104], "big")
    extension = header.index(0x23852875.to_bytes(4, "big"), length)
    # Something unknown in front of it has it begin 16 bytes before a sector's end.
    moved = 0x12345678.to_bytes(4, "big") + (512 - 16 - 8 - length).to_bytes(4, "big") + bytes(512 - 16 - 8 - length)
    header[length:] = (moved + header[extension:extension + 32]).ljust(4096 - length, b"\0")
    with pair.base.open("r+b") as file:
        file.write(header)
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, "--bitmaps", files=[pair.base], mentions=["crosses a sector", "bitmap --add"])
    for change in ("--add", "--remove"):
        support.qemu_img("bitmap", change, pair.base, "again")
    commit(pair)
    assert {"kept", "new"} <= {each["name"] for each in support.info(pair.base)["format-specific"]["data"]["bitmaps"]}


def test_in_use(pair):
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 512k 64k"])
    for name in ("own", "theirs", "good"):
        add(pair.top, name)
    add(pair.base, "theirs")
    for path, name in ((pair.top, "own"), (pair.base, "theirs")):
        image = qcow2_bytes.Image(path)
        image.poke(image.bitmaps()[name].at + FLAGS, (3).to_bytes(4, "big"))
    support.qemu_img("bitmap", "--clear", pair.top, "good")
    result = support.run_instar("commit", "--bitmaps", "--output", "json", pair.top)
    assert result.rc == 0, str(result)
    found = {bitmap["name"]: bitmap["result"] for bitmap in json.loads(result.stdout)["bitmaps"]}
    assert found == {"own": "inconsistent", "theirs": "target-inconsistent", "good": "made"}
    flags = {name: bitmap["flags"] for name, bitmap in dirty_bitmaps.names(pair.base).items()}
    assert flags == {"theirs": ["in-use", "auto"], "good": ["auto"]}
    support.assert_clean(pair.base)


def test_targets_of_version_2_and_dirty_ones(pair):
    pair.make(base_options={"compat": "0.10"}, top=["write -P 2 512k 64k"])
    add(pair.top, "one")
    refuse("ERROR_UNSUPPORTED_FORMAT", pair.top, "--bitmaps", files=[pair.base], mentions=["compat=1.1"])
    # The message says what to do.
    support.qemu_img("amend", "-o", "compat=1.1,lazy_refcounts=on", pair.base)
    raw = qcow2_bytes.Image(pair.base)
    raw.set("incompatible", 1)
    raw.spoil_refcounts(random.Random(5))
    content = support.content_hash(pair.top)
    assert commit(pair) == {"one": "made"}
    assert support.content_hash(pair.top) == support.content_hash(pair.base) == content
    assert not qcow2_bytes.Image(pair.base).dirty


@pytest.mark.parametrize("where", ["top", "base"])
@pytest.mark.parametrize("damage", [
    "directory past the end", "directory unaligned", "no length", "huge length", "wrong length", "no bitmaps", "too many",
    "granularity", "type", "table past the end", "table unaligned", "table too short", "bits past the end", "name too long",
])
def test_a_damaged_directory_is_refused(pair, where, damage):
    pair.make(base=["write -P 1 0 1M"], top=["write -P 2 512k 64k"])
    for path in (pair.base, pair.top):
        add(path, "one")
        add(path, "two")
        support.qemu_io(path, "write -P 3 2M 64k")
    image = qcow2_bytes.Image(getattr(pair, where))
    extension, one = image.extension(0x2385_2875), image.bitmaps()["one"]
    past = 1 << 40
    at, data = {
        "directory past the end": (extension + 16, past.to_bytes(8, "big")),
        "directory unaligned": (extension + 16, (image.peek64(extension + 16) + 8).to_bytes(8, "big")),
        "no length": (extension + 8, bytes(8)),
        "huge length": (extension + 8, (1 << 62).to_bytes(8, "big")),
        "wrong length": (extension + 8, (image.peek64(extension + 8) - 8).to_bytes(8, "big")),
        "no bitmaps": (extension, bytes(4)),
        "too many": (extension, (3).to_bytes(4, "big")),
        "granularity": (one.at + GRANULARITY, bytes([63])),
        "type": (one.at + 16, bytes([9])),
        "table past the end": (one.at, past.to_bytes(8, "big")),
        "table unaligned": (one.at, (one.table + 8).to_bytes(8, "big")),
        "table too short": (one.at + 8, bytes(4)),
        "bits past the end": (one.table, past.to_bytes(8, "big")),
        "name too long": (one.at + 18, (1024).to_bytes(2, "big")),
    }[damage]
    image.poke(at, data)
    with support.untouched(pair.base, pair.top):
        result = support.run_instar("commit", "--bitmaps", pair.top)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
    assert str(getattr(pair, where)) in result.stderr and "bitmap" in result.stderr, str(result)


def test_killed_and_run_again(tmp_path):
    _, mid, top = chain(tmp_path)
    support.qemu_io(top, *(f"write -P {n % 250 + 1} {n * 40}k 4k" for n in range(100)))
    support.qemu_img("bitmap", "--add", top, "late")
    support.qemu_io(top, "write -P 9 2M 200k")
    for path in (mid, top):
        support.assert_clean(path)
    saved = [(path, path.read_bytes()) for path in (mid, top)]
    content, own = support.content_hash(top), {name: dirty(top, name) for name in ("one", "late")}
    command = [support.instar_binary(), "commit", "--bitmaps", top]
    start = time.monotonic()
    support.run(*command)
    lasts, rng, ended = time.monotonic() - start, random.Random(11), 0
    for _ in range(10):
        for path, data in saved:
            path.write_bytes(data)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.uniform(0.2, 1) * lasts)
        process.kill()
        ended += process.wait() == 0
        assert support.content_hash(top) == content
        assert set(dirty_bitmaps.names(mid)) in (set(), set(own))
        result = support.run_instar("commit", "--bitmaps", "--wait", "10", top)
        assert result.rc == 0, str(result)
        assert support.content_hash(top) == support.content_hash(mid) == content
        for name, bits in own.items():
            assert within(bits, dirty(mid, name)), name
        # The run that was killed may have leaked clusters, never more than that.
        for path in (mid, top):
            found = support.qemu_img("check", "--output=json", path, rc=None).json
            assert not found.get("corruptions") and not found["check-errors"], found
    assert ended < 10, "no run was killed"
