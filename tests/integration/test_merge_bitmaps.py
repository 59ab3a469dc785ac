"""`instar commit --bitmaps`: the bitmaps of the overlay are merged into those of the target. qemu makes and reads them."""

import json

import dirty_bitmaps
import pytest
import support
from dirty_bitmaps import add, dirty, merge, rounded, within
from support import KIB, MIB


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
    assert result.rc == 1 and "cannot have bitmaps" in result.stderr and "without --bitmaps" in result.stderr, str(result)
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
