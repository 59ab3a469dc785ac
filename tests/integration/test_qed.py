"""The example of a third party: the QED plugin, built in its own folder and loaded from a directory."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import support
from support import MIB

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "qed-plugin"
SIZE = 12 * MIB


@pytest.fixture(scope="module")
def plugins(tmp_path_factory, worker_id):
    """A directory with the one library that `cargo build` in the example's folder makes."""
    directory = tmp_path_factory.mktemp("plugins")
    support.build_plugin(EXAMPLE, "libinstar_plugin_qed.so", directory, "--locked")
    return directory


def test_the_example_is_small():
    sources = [path for path in EXAMPLE.rglob("*.rs") if not {"target", "tests"} & set(path.relative_to(EXAMPLE).parts)]
    lines = sum(len(path.read_text().splitlines()) for path in sources)
    assert 300 < lines < 600


def test_the_driver_passes_the_conformance_test():
    support.run_plugin_tests(EXAMPLE, "-p", "qed-driver", "--locked")


def test_it_is_listed(plugins):
    listed = support.run_instar("plugins", "--output", "json", "--plugin-dir", plugins).json
    [qed] = [plugin for plugin in listed["plugins"] if plugin["name"] == "qed"]
    assert qed["roles"] == ["source", "sink"] and qed["version"] == "0.1.0"


def scribble(path, fmt, seed, count=14):
    """Data of any length, also over parts of clusters, and zeroes over whole ones."""
    rng = random.Random(seed)
    commands = []
    for number in range(count):
        length = rng.choice([1, 3, 128, 700]) * 512
        at = rng.randrange(0, (SIZE - length) // 512) * 512
        commands.append(f"write -P {rng.randrange(1, 255)} {at} {length}")
        if number % 4 == 0:
            commands.append(f"write -z {rng.randrange(0, SIZE >> 16) << 16} 128k")
    support.qemu_io(path, *commands, fmt=fmt)


def pair(tmp_path, base_fmt, top_fmt, seed, *, base_size=SIZE, **options):
    base, top = tmp_path / f"base.{base_fmt}", tmp_path / f"top.{top_fmt}"
    chosen = {fmt: options if fmt == "qed" else {} for fmt in ("qed", "qcow2")}
    support.create(base, base_size, fmt=base_fmt, **chosen[base_fmt])
    scribble(base, base_fmt, seed)
    support.create(top, SIZE, backing=base, backing_fmt=base_fmt, fmt=top_fmt, **chosen[top_fmt])
    scribble(top, top_fmt, seed + 1000)
    return base, top


def commits(plugins, base, top, base_fmt, top_fmt, *options):
    """What a guest saw before, it sees after; both images are clean, and the overlay holds nothing."""
    expected = support.content_hash(top, top_fmt)
    result = support.run_instar("commit", "--output", "json", "--plugin-dir", plugins, *options, top)
    assert result.rc == 0, str(result)
    assert (result.json["overlay_format"], result.json["backing_format"]) == (top_fmt, base_fmt)
    assert support.content_hash(base, base_fmt) == expected
    assert support.content_hash(top, top_fmt) == expected
    if base_fmt != "raw":
        support.assert_clean(base, base_fmt)
    support.assert_clean(top, top_fmt)
    held = support.qemu_img("map", "--output=json", "-f", top_fmt, top).json
    assert not any(run["depth"] == 0 and run["present"] for run in held)
    return result.json


GEOMETRIES = [
    {},
    {"cluster_size": 4096, "table_size": 2},
    {"cluster_size": 4096, "table_size": 16},
    {"cluster_size": "1M", "table_size": 2},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize("formats", [("qed", "qed"), ("qcow2", "qed"), ("qed", "qcow2")], ids="-below-".join)
def test_commits(plugins, tmp_path, formats, options):
    base, top = pair(tmp_path, *formats, 1, **options)
    done = commits(plugins, base, top, *formats)
    assert done["clusters_committed"] > 0
    # The overlay can be written and committed again.
    scribble(top, formats[1], 77)
    commits(plugins, base, top, *formats)


def test_as_qemu_img_does(plugins, tmp_path):
    base, top = pair(tmp_path, "qed", "qed", 5)
    twin = tmp_path / "twin"
    twin.mkdir()
    for path in (base, top):
        shutil.copy(path, twin)
    support.qemu_img("rebase", "-u", "-f", "qed", "-F", "qed", "-b", twin / base.name, twin / top.name)
    support.qemu_img("commit", "-q", "-f", "qed", twin / top.name)
    commits(plugins, base, top, "qed", "qed")
    support.assert_same_content(base, twin / base.name, "qed", "qed")


def test_chains(plugins, tmp_path):
    """A backing with a backing of its own: what surrounds a partial cluster comes from there."""
    lowest, base = pair(tmp_path, "qed", "qed", 3)
    top = tmp_path / "topmost.qed"
    support.create(top, SIZE, backing=base, backing_fmt="qed", fmt="qed")
    support.qemu_io(top, "write -P 3 100k 512", "write -P 4 5M 70k", fmt="qed")
    before = support.content_hash(lowest, "qed")
    commits(plugins, base, top, "qed", "qed")
    assert support.content_hash(lowest, "qed") == before


def test_a_raw_backing(plugins, tmp_path):
    """QED records that a backing is raw, and nothing else of its format."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qed"
    base.write_bytes(random.Random(1).randbytes(4 * MIB))
    support.create(top, 4 * MIB, backing=base, backing_fmt="raw", fmt="qed")
    support.qemu_io(top, "write -P 3 1M 100k", "write -z 2M 64k", fmt="qed")
    commits(plugins, base, top, "raw", "qed")


def test_an_unclean_image(plugins, tmp_path):
    """The need-check bit does not matter: all tables are verified in any case."""
    base, top = pair(tmp_path, "qed", "qed", 8)
    data = bytearray(base.read_bytes())
    data[16] |= 2
    # What a crash leaves: half a cluster that nothing refers to.
    base.write_bytes(data + b"\xee" * 1000)
    expected = support.content_hash(top, "qed")
    result = support.run_instar("commit", "--plugin-dir", plugins, top)
    assert result.rc == 0, str(result)
    assert support.content_hash(base, "qed") == expected


def damaged(path, how):
    data = bytearray(path.read_bytes())
    word = lambda at: int.from_bytes(data[at : at + 8], "little")  # noqa: E731
    l1 = word(40)
    first = next(at for at in range(l1, l1 + 4 * 65536, 8) if word(at))
    table = word(first)
    entries = [at for at in range(table, table + 4 * 65536, 8) if word(at) > 1]
    values = {
        "table in the header": (first, 0),
        "table past the end": (first, len(data)),
        "table off its place": (first, table + 512),
        "table is the L1 table": (first, l1),
        "cluster in a table": (entries[0], table),
        "cluster past the end": (entries[0], 1 << 50),
        "cluster off its place": (entries[0], word(entries[0]) + 8),
        "cluster twice": (entries[0], word(entries[1])),
        "unknown feature": (16, word(16) | 1 << 9),
        "clusters of 3 bytes": (4, 3),
        "a disk too large": (48, 1 << 61),
        "L1 table past the end": (40, 1 << 40),
    }
    at, value = values[how]
    if how == "table in the header":
        value = 4096
    data[at : at + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)


DAMAGE = [
    "table in the header", "table past the end", "table off its place", "table is the L1 table", "cluster in a table",
    "cluster past the end", "cluster off its place", "cluster twice", "unknown feature", "clusters of 3 bytes",
    "a disk too large", "L1 table past the end",
]


@pytest.mark.parametrize("side", ["base", "top"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_refused(plugins, tmp_path, how, side):
    base, top = pair(tmp_path, "qed", "qed", 4)
    damaged(base if side == "base" else top, how)
    with support.untouched(base, top):
        result = support.run_instar("commit", "--plugin-dir", plugins, top)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
    assert (base if side == "base" else top).name in result.stderr, str(result)
