"""Commits that succeed, each held against what `qemu-img commit` makes of copies."""

from __future__ import annotations

import os
import re
import shutil

import pytest
import qcow2_bytes
import support
from support import GIB, KIB, MIB, TIB

DATA = ("write -P 0x11 0 1M", "write -P 0x12 2M 512k")
CLUSTER_SIZES = [512 << n for n in range(13)]
REFCOUNT_BITS = [1, 2, 4, 8, 16, 32, 64]


# --- what is said -----------------------------------------------------------------------------------


def test_implicit_backing(pair):
    pair.make(top=DATA)
    result = pair.check_commit()
    assert result.stdout == "Image committed.\n"
    assert result.stderr == ""


def test_quiet(pair):
    pair.make(top=DATA)
    result = pair.check_commit("-q")
    assert (result.stdout, result.stderr) == ("", "")


def test_json(pair):
    pair.make(top=["write -P 1 0 512k", "write -P 2 1M 512k"])
    result = pair.check_commit("--output", "json")
    assert result.stderr == ""
    assert result.stdout.endswith("}\n")
    expected = {
        "overlay": str(pair.top),
        "overlay_format": "qcow2",
        "backing": str(pair.base),
        "backing_format": "qcow2",
        "clusters_committed": 16,
        "bytes_committed": 1 * MIB,
        "overlay_clusters_cleared": 16,
        "sandbox": support.SANDBOX,
    }
    assert result.json == expected
    assert list(result.json) == list(expected)


def test_json_of_an_empty_overlay(pair):
    pair.make(base=DATA)
    answer = pair.check_commit("--output", "json").json
    assert answer["clusters_committed"] == 0
    assert answer["bytes_committed"] == 0
    assert answer["overlay_clusters_cleared"] == 0


def test_without_emptying(pair):
    """`-d`: the backing gets everything, the overlay stays as it is."""
    pair.make(base=["write -P 9 0 4M"], top=[*DATA, "write -z 3M 64k"])
    with support.untouched(pair.top):
        answer = pair.check_commit("-d", "--output", "json", cleared=False).json
    assert answer["clusters_committed"] == 25
    assert answer["overlay_clusters_cleared"] == 0


@pytest.mark.parametrize("output", ["human", "json"])
def test_dry_run(pair, output):
    """It says what would be done, and does nothing."""
    pair.make(base=["write -P 9 0 4M"], top=DATA)
    with support.untouched(pair.top, pair.base):
        result = support.commit(pair.top, "--dry-run", "--output", output)
    assert "24" in result.stdout and str(24 * 64 * KIB) in result.stdout, str(result)
    assert "Image committed." not in result.stdout
    if output == "json":
        assert result.json["clusters_committed"] == 24


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_dry_run_says_how_much_the_target_grows(pair, fmt):
    pair.make(8 * MIB, base=["write -P 1 0 1M"], top=["write -P 2 2M 3M"])
    if fmt == "raw":
        support.qemu_img("convert", "-O", "raw", pair.base, pair.dir / "flat")
        support.create(pair.top, backing="flat", backing_fmt="raw", cwd=pair.dir)
        support.qemu_io(pair.top, "write -P 2 2M 3M")
    target = pair.base if fmt == "qcow2" else pair.dir / "flat"
    answer = support.commit(pair.top, "--dry-run", "--output", "json").json
    human = support.commit(pair.top, "--dry-run").stdout
    growth, space, free = answer["backing_growth_bytes"], answer["backing_space_bytes"], answer["free_bytes"]
    assert re.search(rf"grow by {growth} bytes( \([^)]+\))? at most, and take {space} bytes( \([^)]+\))? more of the disk", human) and answer["dry_run"] is True
    assert re.search(r", of which its file system has [\d.]+ \w+ free\.", human), human
    system = os.statvfs(pair.dir)
    assert 0 < free <= system.f_blocks * system.f_frsize
    before = target.stat()
    support.commit(pair.top)
    os.sync()
    after = target.stat()
    assert after.st_size - before.st_size <= growth <= (4 * MIB if fmt == "qcow2" else 0)
    # The raw target is sparse: its length stays, but not what it takes of the disk.
    assert 3 * MIB <= (after.st_blocks - before.st_blocks) * 512 <= space <= 4 * MIB


def test_dry_run_needs_neither_the_write_lock_nor_the_permission(pair):
    pair.make(top=["write -P 2 0 1M"])
    reader = support.Holder(pair.base, "-r")
    with reader, support.untouched(pair.top, pair.base):
        assert support.commit(pair.top, "--dry-run").rc == 0
    for path in (pair.top, pair.base):
        # Whoever writes to it changes what is asked about.
        with support.Holder(path), support.untouched(pair.top, pair.base):
            support.assert_refused(support.run_instar("commit", "--dry-run", pair.top), "ERROR_IMAGE_IN_USE")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("strace") is None, reason="needs root and strace")
def test_dry_run_opens_nothing_for_writing(pair):
    pair.make(top=["write -P 2 0 1M"])
    trace = pair.dir.parent / "trace"
    result = support.run("strace", "-f", "-e", "trace=open,openat,openat2", "-o", trace, support.instar_binary(),
                         "commit", "--dry-run", pair.top)
    assert result.rc == 0, str(result)
    opened = [line for line in trace.read_text().splitlines() if ".qcow2" in line]
    assert len(opened) >= 2 and not [line for line in opened if "O_RDWR" in line or "O_WRONLY" in line], opened


def test_dry_run_says_that_the_files_cannot_be_written(pair):
    pair.make(top=["write -P 2 0 1M"])
    with support.read_only(pair.dir) as there:
        if not there:
            pytest.skip("nothing can be mounted here")
        with support.untouched(pair.top, pair.base):
            for option in ["--dry-run", "-d"]:
                result = support.run_instar("commit", option, "--output", "json", pair.top)
                support.assert_refused(result, "ERROR_READ_ONLY", pair.top)


def test_dry_run_refuses_what_a_commit_refuses(pair):
    pair.make(4 * MIB, top_size=8 * MIB, top=DATA)
    support.refuse("ERROR_OVERLAY_LARGER_THAN_BACKING", pair.top, "--dry-run", files=[pair.base])


def test_empty_overlay_leaves_the_backing_alone(pair):
    pair.make(base=DATA)
    with support.untouched(pair.base):
        result = pair.check_commit()
    assert result.stdout == "Image committed.\n"


@pytest.mark.parametrize("fmt", [("-f", "qcow2"), ("--format", "qcow2"), ("--format=qcow2",)])
def test_named_format(pair, fmt):
    pair.make(top=DATA)
    pair.check_commit(*fmt)


# --- which file is committed into -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base.qcow2", "./base.qcow2", "../images/base.qcow2", None])
def test_explicit_backing(pair, tmp_path, name):
    """A relative `-b` begins at the overlay's directory, whatever the working directory is."""
    pair.make(top=DATA)
    pair.check_commit("-b", name or pair.base, cwd=tmp_path)


def test_explicit_backing_through_a_link(pair):
    pair.make(top=DATA)
    (pair.dir / "link").symlink_to("base.qcow2")
    pair.check_commit("--base", "link")


def test_absolute_recorded_backing_in_the_same_directory(pair):
    pair.make(top=DATA)
    support.qemu_img("rebase", "-u", "-b", pair.base, "-F", "qcow2", pair.top)
    before = support.content_hash(pair.top)
    support.commit(pair.top)
    assert support.content_hash(pair.base) == before
    assert support.content_hash(pair.top) == before
    assert support.holds_no_clusters(pair.top)


def test_backing_in_a_directory_below(pair):
    (pair.dir / "sub").mkdir()
    base = support.create(pair.dir / "sub" / "base.qcow2", 4 * MIB)
    support.create(pair.top, backing="sub/base.qcow2")
    support.qemu_io(pair.top, *DATA)
    before = support.content_hash(pair.top)
    support.commit(pair.top)
    assert support.content_hash(base) == before
    assert support.holds_no_clusters(pair.top)


def test_allowed_directory_outside(pair, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for base, options in (("one", ["--allow-backing-dir", elsewhere]), ("two", ["-b", elsewhere / "two"])):
        support.create(elsewhere / base, 4 * MIB)
        top = support.create(pair.dir / f"top-{base}", backing=str(elsewhere / base))
        support.qemu_io(top, *DATA)
        before = support.content_hash(top)
        support.commit(top, *options)
        assert support.content_hash(elsewhere / base) == before
        assert support.holds_no_clusters(top)
        support.assert_clean(elsewhere / base)


def test_symlinked_overlay(pair):
    pair.make(top=DATA)
    (pair.dir / "link").symlink_to("top.qcow2")
    pair.check_commit(overlay=pair.dir / "link")
    assert (pair.dir / "link").is_symlink()


def test_overlay_named_from_another_directory(pair, tmp_path):
    pair.make(top=DATA)
    pair.check_commit(cwd=tmp_path, overlay="images/top.qcow2")


@pytest.mark.parametrize(
    "name", [b"with space", b"new\nline", b"tab\t\x1b[31m", b"\xff\xfe.qcow2", "Grüße".encode(), b"-dash", b"a,b=c"],
    ids=["space", "newline", "escape", "not-utf8", "utf8", "dash", "comma"],
)
def test_odd_overlay_names(pair, name):
    pair.make(top=DATA)
    before = support.content_hash(pair.top)
    odd = os.path.join(os.fsencode(pair.dir), name)
    os.rename(pair.top, odd)
    argument = odd if name != b"-dash" else b"./-dash"
    result = support.run_instar("commit", argument, cwd=pair.dir)
    assert result.rc == 0, str(result)
    assert result.stdout == "Image committed.\n"
    os.rename(odd, pair.top)
    assert support.content_hash(pair.base) == before
    assert support.content_hash(pair.top) == before
    assert support.holds_no_clusters(pair.top)


@pytest.mark.parametrize("name", ["with space", "new\nline", "Grüße", "100%_#?", "quote'\""])
def test_odd_recorded_backing_names(pair, name):
    pair.make(top=DATA)
    before = support.content_hash(pair.top)
    pair.base.rename(pair.dir / name)
    qcow2_bytes.Image(pair.top).set_backing(name.encode())
    result = support.commit(pair.top, "-v")
    assert not support.CONTROL.search(result.stdout + result.stderr)
    assert support.content_hash(pair.dir / name) == before
    assert support.content_hash(pair.top) == before


# --- what is committed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "top"),
    [
        (["write -P 1 0 4M"], ["write -P 2 1M 1M", "write -P 3 3000k 5k"]),
        (["write -z 0 4M"], ["write -P 2 1M 1M", "write -P 3 3000k 5k"]),
        (["write -z -u 0 4M"], ["write -P 2 1M 1M"]),
        (["write -P 1 0 4M"], ["write -z 1M 1M"]),
        (["write -P 1 0 4M"], ["write -z -u 1M 1M"]),
        (["write -P 1 0 4M"], ["write -P 9 1M 1M", "write -z 1M 1M"]),
        (["write -P 1 0 4M"], ["write -P 9 1M 1M", "write -z -u 1M 1M"]),
        (["write -P 1 0 4M"], ["write -P 9 1M 1M", "discard 1M 1M"]),
        (["write -P 1 0 1M"], ["write -z 2M 1M"]),
        ([], ["write -z -u 0 4M"]),
        (["write -P 1 0 4M"], ["write -P 0 1M 1M"]),
        (["write -P 1 0 4M", "discard 1M 1M"], ["write -P 5 512k 1M"]),
        ([], ["write -P 1 3M 1M", "write -P 2 0 64k", "write -P 3 1M 64k"]),
    ],
    ids=["data-data", "data-zero", "data-zero-unmapped", "zero-data", "zero-unmap-data", "zero-own-data",
         "zero-unmap-own-data", "discard", "zero-hole", "zeroes-only", "literal-zeroes", "data-discarded",
         "out-of-order"],
)
@pytest.mark.parametrize("versions", ["33", "23", "32", "22"], ids="top-base-v{}".format)
def test_kinds_of_clusters(pair, base, top, versions):
    compat = {"2": {"compat": "0.10"}, "3": {"compat": "1.1"}}
    pair.make(base=base, top=top, top_options=compat[versions[0]], base_options=compat[versions[1]])
    pair.check_commit()


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_cluster_sizes(pair, cluster_size):
    options = {"cluster_size": cluster_size}
    size = max(4 * MIB, 8 * cluster_size)
    pair.make(size, base_options=options, top_options=options,
              base=["write -P 1 0 700k"],
              top=["write -P 2 300k 1000k", "write -z 2M 300k", f"write -P 7 {size - 1024} 1024"])
    pair.check_commit()


@pytest.mark.parametrize(
    ("top", "base"),
    [(512, 4096), (4096, 512), (4096, 65536), (65536, 4096), (2 * MIB, 65536), (65536, 2 * MIB), (512, 2 * MIB)],
)
@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB - 512])
def test_differing_cluster_sizes(pair, top, base, size):
    pair.make(size, top_options={"cluster_size": top}, base_options={"cluster_size": base},
              base=["write -P 1 0 3M"],
              top=["write -P 2 1000k 1001k", "write -z 2100k 600k", "write -P 3 5555k 1k",
                   f"write -P 4 {size - 512} 512"])
    pair.check_commit()


@pytest.mark.parametrize("bits", REFCOUNT_BITS)
@pytest.mark.parametrize("side", ["top", "base", "both"])
def test_refcount_widths(pair, bits, side):
    options = {"refcount_bits": bits, "cluster_size": 512}
    plain = {"cluster_size": 512}
    pair.make(base=["write -P 1 0 700k"], top=["write -P 2 300k 1500k", "write -z 2M 300k"],
              top_options=plain if side == "base" else options,
              base_options=plain if side == "top" else options)
    pair.check_commit()


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [512, 1024, 65536 - 512, 65536 + 512, 4 * MIB + 1536, 3 * MIB - 512])
@pytest.mark.parametrize("zero", [False, True], ids=["data", "zero"])
def test_unaligned_sizes(pair, size, zero):
    last = size - 512
    pair.make(size, base=[f"write -P 1 0 {size}"], top=[f"write {'-z' if zero else '-P 2'} {last} 512"])
    pair.check_commit()
    assert support.virtual_size(pair.base) == size


@pytest.mark.parametrize("size", [512, 1 * MIB + 512, 2 * MIB - 512])
@pytest.mark.parametrize("zero", [False, True], ids=["data", "zero"])
def test_bytes_past_a_smaller_overlay_stay(pair, size, zero):
    """The overlay's last cluster covers bytes of the backing that are beyond the overlay's end."""
    pair.make(4 * MIB, top_size=size, base=["write -P 1 0 4M"],
              top=[f"write {'-z' if zero else '-P 2'} 0 {size}"])
    pair.check_commit()
    assert support.virtual_size(pair.base) == 4 * MIB
    support.qemu_io(pair.base, f"read -P 1 {size} {4 * MIB - size}", f"read -P {0 if zero else 2} 0 {size}")


def test_scattered_clusters(pair):
    """10,000 clusters, no two side by side, in an order of their own."""
    top = [f"write -P {1 + n % 250} {(n * 7919 % 10000) * 1024 * 8} 512" for n in range(10_000)]
    options = {"cluster_size": 4096}
    pair.make(10_000 * 8 * KIB, base=["write -P 255 0 2M"], top=top, base_options=options, top_options=options)
    answer = pair.check_commit("--output", "json").json
    assert answer["clusters_committed"] == 10_000


def test_huge_disk(pair):
    pair.make(TIB, base=["write -P 1 512G 1M"],
              top=["write -P 2 0 64k", f"write -P 3 {TIB - 64 * KIB} 64k", "write -P 4 525000M 200k",
                   "write -z 524288M 64k"])
    before = support.content_hash(pair.top)
    support.commit(pair.top)
    assert support.content_hash(pair.base) == before
    assert support.content_hash(pair.top) == before
    for path in (pair.base, pair.top):
        support.assert_clean(path)
    assert support.holds_no_clusters(pair.top)


def test_refcount_blocks_and_table_grow(pair):
    """24 MiB of 512-byte clusters: 192 new refcount blocks of 256 entries, and a table that must move."""
    options = {"cluster_size": 512}
    pair.make(32 * MIB, base_options=options, top_options=options, top=["write -P 3 1M 24M"])
    table = qcow2_bytes.Image(pair.base).get("refcount_table_clusters")
    pair.check_commit()
    assert qcow2_bytes.Image(pair.base).get("refcount_table_clusters") > table


def test_growth_of_wide_refcounts(pair):
    options = {"cluster_size": 512, "refcount_bits": 64}
    pair.make(32 * MIB, base_options=options, top_options=options, top=["write -P 3 1M 20M"])
    pair.check_commit()


# --- afterwards -------------------------------------------------------------------------------------


def test_space_is_given_back(pair):
    empty = support.create(pair.dir / "empty.qcow2", 64 * MIB)
    pair.make(64 * MIB, top=["write -P 1 0 32M", "write -P 2 48M 1M"])
    pair.check_commit()
    after = pair.top.stat()
    assert after.st_size <= empty.stat().st_size + 256 * KIB
    assert after.st_blocks * 512 <= 512 * KIB


@pytest.mark.parametrize("kind", ["snapshot", "bitmap", "v2", "large-l1", "extended", "dirty", "compressed"])
def test_space_is_given_back_in_every_case(pair, kind):
    """What qemu-img's slow path keeps: the file's length, and sometimes more."""
    size = TIB if kind == "large-l1" else 64 * MIB
    options = {"v2": {"compat": "0.10"}, "large-l1": {"cluster_size": 4 * KIB}, "extended": {"extended_l2": "on"},
               "dirty": {"lazy_refcounts": "on"}}.get(kind, {})
    pair.make(size, top_options=options)
    if kind == "snapshot":
        support.qemu_img("snapshot", "-c", "before", pair.top)
    if kind == "bitmap":
        support.qemu_img("bitmap", "--add", pair.top, "dirty")
    before = pair.top.stat().st_blocks * 512
    flag = "-c " if kind == "compressed" else ""
    support.qemu_io(pair.top, *(f"write {flag}-P {number + 1} {number * 256}k 128k" for number in range(64)))
    if kind == "dirty":
        image = qcow2_bytes.Image(pair.top)
        image.set("incompatible", image.get("incompatible") | 1)
    length = pair.top.stat().st_size

    pair.check_commit()

    after = pair.top.stat()
    assert after.st_size <= length
    assert after.st_blocks * 512 <= before + 256 * KIB


def test_commit_again_is_a_no_op(pair):
    pair.make(top=DATA)
    pair.check_commit()
    with support.untouched(pair.base):
        answer = pair.check_commit("--output", "json").json
    assert answer["clusters_committed"] == 0


def test_write_and_commit_again(pair):
    pair.make(base=["write -P 1 0 4M"], top=DATA)
    for round_number in range(3):
        pair.check_commit()
        support.qemu_io(pair.top, f"write -P {0x40 + round_number} {round_number}M 700k", "write -z 3M 128k")
    pair.check_commit()


# --- chains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
@pytest.mark.parametrize("versions", ["33", "22"], ids="v{}".format)
@pytest.mark.parametrize("cluster_size", [65536, 4096])
def test_three_layers(pair, fmt, versions, cluster_size):
    """Top goes into mid; the base is only read, and may be read-only."""
    compat = {"compat": "0.10" if versions == "22" else "1.1"}
    root = support.create(pair.dir / "root.img", 4 * MIB, fmt=fmt)
    support.qemu_io(root, "write -P 1 0 4M", fmt=fmt)
    root.chmod(0o444)
    support.create(pair.base, backing="root.img", backing_fmt=fmt, **compat)
    support.qemu_io(pair.base, "write -P 2 1M 1M", "write -z 2M 128k")
    support.create(pair.top, backing="base.qcow2", cluster_size=cluster_size, **compat)
    support.qemu_io(pair.top, "write -P 3 1500k 12k", "write -P 4 3M 4k", "write -z 256k 256k", "write -z 1M 4k")
    with support.untouched(root):
        pair.check_commit()


def test_deep_chain(pair):
    names = [f"layer{n}.qcow2" for n in range(12)]
    support.create(pair.dir / names[0], 4 * MIB)
    for below, name in zip(names, names[1:]):
        support.create(pair.dir / name, backing=below)
        support.qemu_io(pair.dir / name, f"write -P {len(name)} {names.index(name) * 256}k 300k")
    support.create(pair.top, backing=names[-1])
    support.qemu_io(pair.top, "write -P 77 100k 3M")
    ancestors = [pair.dir / name for name in names[:-1]]
    with support.untouched(*ancestors):
        pair.check_commit(backing=pair.dir / names[-1])


def test_overlay_created_by_instar(pair):
    """Nothing but the product makes the images."""
    for args in ([pair.base, "4M"], ["-b", "base.qcow2", "-F", "qcow2", pair.top]):
        result = support.run_instar("create", "-f", "qcow2", *args, cwd=pair.dir)
        assert result.rc == 0, str(result)
    support.qemu_io(pair.top, *DATA)
    pair.check_commit()


def test_json_names_are_absolute(pair):
    pair.make(top=DATA)
    result = support.commit("top.qcow2", "--output=json", cwd=pair.dir)
    answer = result.json
    assert answer["overlay"] == str(pair.top)
    assert answer["backing"] == str(pair.base)
    assert answer["bytes_committed"] == MIB + 512 * KIB


def test_large_offsets(pair):
    """Guest offsets beyond 4 GiB on both sides."""
    pair.make(16 * GIB, base=["write -P 1 5G 1M"], top=["write -P 2 5243000k 100k", "write -P 3 15G 64k"])
    pair.check_commit()
    support.qemu_io(pair.base, "read -P 3 15G 64k", "read -P 2 5243000k 100k", "read -P 1 5G 100k")
