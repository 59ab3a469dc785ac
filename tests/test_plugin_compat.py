"""Plugin contract 1.0, for ever: a plugin that was built with the crates of that time loads, and does all that it did then.

The crates are frozen in tests/compat/plugin-api-1.0, with the plugin slate, which uses all that they offer. It is built as a
third party builds it: in its own workspace, with its own lock file and target directory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import slate_bytes
import support
from slate_bytes import CLUSTER
from support import MIB

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "tests" / "compat" / "plugin-api-1.0"
# Not a multiple of a cluster.
SIZE = 5 * MIB + 512


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A directory with the one library that `cargo build` makes of the frozen sources."""
    target = ROOT / "target" / "compat"
    built = subprocess.run(
        ["cargo", "build", "--release", "--locked", "--package", "instar-plugin-slate"],
        cwd=FROZEN, env={**os.environ, "CARGO_TARGET_DIR": str(target)}, capture_output=True, text=True, check=False,
    )
    assert built.returncode == 0, built.stderr
    directory = tmp_path_factory.mktemp("plugins")
    shutil.copy(target / "release" / "libinstar_plugin_slate.so", directory)
    return directory


def instar(plugins, command, *args):
    result = support.run_instar(command, "--plugin-dir", plugins, *args)
    assert result.rc == 0 and not result.stderr, str(result)
    return result


def clusters(seed):
    """Data, runs of it, zeroes, and clusters that only the plugin can decode."""
    rng = random.Random(seed)
    found = {}
    for index in rng.sample(range(-(-SIZE // CLUSTER)), 30):
        found[index] = rng.choice([None, rng.randrange(256), rng.randbytes(CLUSTER), rng.randbytes(CLUSTER)])
    return found


def slate(plugins, path, seed, *options):
    instar(plugins, "create", "-f", "slate", *options, path, str(SIZE))
    slate_bytes.put(path, clusters(seed))
    return path


def raw_content(path, fmt):
    """What a guest reads of an image that QEMU knows."""
    raw = path.parent / f"{path.name}.raw"
    support.qemu_img("convert", "-f", fmt, "-O", "raw", path, raw)
    return raw.read_bytes()


def test_an_engine_that_has_grown_lists_it(plugins):
    listed = instar(plugins, "plugins", "--output", "json").json
    [plugin] = [plugin for plugin in listed["plugins"] if plugin["name"] == "slate"]
    assert plugin["api-version"] == "1.0.0"
    assert plugin["roles"] == ["source", "sink", "create"] and "tablet" in plugin["formats"]
    # What the test is about: this engine's contract is a newer one.
    assert [int(part) for part in listed["api-version"].split(".")] > [1, 0, 0]
    assert not listed["skipped"]


def test_info(plugins, tmp_path):
    base = slate(plugins, tmp_path / "base.slate", 1, "-o", "content_id=41")
    top = tmp_path / "top.slate"
    instar(plugins, "create", "-f", "tablet", "-b", base.name, "-F", "slate", top)
    shown = instar(plugins, "info", "--output", "json", top).json
    assert (shown["format"], shown["virtual-size"], shown["cluster-size"]) == ("slate", SIZE, CLUSTER)
    assert (shown["backing-filename"], shown["backing-filename-format"]) == (base.name, "slate")
    assert shown["format-specific"]["data"] == {"content-id": 1, "parent-id": 41}


def test_slate_into_slate(plugins, tmp_path):
    """Both roles, `read`, `next_content_id` and `follow_parent`; twice, with a layer below that is read through."""
    lowest = slate(plugins, tmp_path / "lowest.slate", 2)
    base = slate(plugins, tmp_path / "base.slate", 3, "-b", lowest, "-F", "slate")
    below = slate_bytes.content(lowest)
    top = tmp_path / "top.slate"
    instar(plugins, "create", "-f", "slate", "-b", base, "-F", "slate", top)
    for seed in (4, 5):
        slate_bytes.put(top, clusters(seed))
        held = sum(entry != 0 for entry in slate_bytes.entries(top))
        before = slate_bytes.content(top, slate_bytes.content(base, below))
        done = instar(plugins, "commit", "--output", "json", top).json
        assert (done["overlay_format"], done["backing_format"]) == ("slate", "slate")
        assert done["clusters_committed"] == done["overlay_clusters_cleared"] == held > 0
        assert slate_bytes.content(base, below) == before
        assert slate_bytes.content(top, before) == before and not any(slate_bytes.entries(top))
        assert slate_bytes.ids(top)[1] == slate_bytes.ids(base)[0]
    assert slate_bytes.content(lowest) == below
    # Another content than the one that the overlay was made for.
    data = bytearray(base.read_bytes())
    data[24] += 7
    base.write_bytes(data)
    with support.untouched(base, top):
        refused = support.run_instar("commit", "--plugin-dir", plugins, top)
    assert refused.rc == 1 and "it was changed in between" in refused.stderr, str(refused)


@pytest.mark.parametrize("fmt", ["qcow2", "raw"])
def test_slate_into_a_format_of_today(plugins, tmp_path, fmt):
    base, top = tmp_path / f"base.{fmt}", tmp_path / "top.slate"
    support.create(base, SIZE, fmt=fmt)
    support.qemu_io(base, "write -P 7 100k 3M", fmt=fmt)
    instar(plugins, "create", "-f", "slate", "-b", base, "-F", fmt, top)
    slate_bytes.put(top, clusters(6))
    before = slate_bytes.content(top, raw_content(base, fmt))
    instar(plugins, "commit", top)
    assert raw_content(base, fmt) == before and not any(slate_bytes.entries(top))


def test_a_format_of_today_into_slate(plugins, tmp_path):
    """Parts of clusters, so that the frozen sink reads what is below through the table that it is handed."""
    lowest = tmp_path / "lowest.raw"
    lowest.write_bytes(random.Random(8).randbytes(SIZE))
    base = slate(plugins, tmp_path / "base.slate", 9, "-b", lowest, "-F", "raw")
    before = slate_bytes.content(base, lowest.read_bytes())
    top = tmp_path / "top.qcow2"
    instar(plugins, "create", "-f", "qcow2", "-o", "cluster_size=4096", "-b", base, "-F", "slate", top)
    # QEMU knows no slate: it is shown a raw image with the same content instead.
    mirror = tmp_path / "mirror.raw"
    mirror.write_bytes(before)
    opened = f"driver=qcow2,file.filename={top},backing.driver=raw,backing.file.filename={mirror}"
    commands = [*(f"write -P {n} {n * 70}k {n}k" for n in range(1, 60)), "write -z 1M 300k"]
    written = support.run("qemu-io", "--image-opts", *(word for command in commands for word in ("-c", command)), opened)
    assert written.rc == 0 and "failed" not in written.stdout, str(written)
    support.qemu_img("convert", "--image-opts", "-O", "raw", opened, tmp_path / "after.raw")
    after = (tmp_path / "after.raw").read_bytes()
    assert after != before
    instar(plugins, "commit", top)
    assert slate_bytes.content(base, lowest.read_bytes()) == after


def test_check_and_map(plugins, tmp_path):
    path = slate(plugins, tmp_path / "image.slate", 10)
    checked = instar(plugins, "check", "--output", "json", path).json
    assert (checked["total-clusters"], checked["allocated-clusters"]) == (81, 30)
    mapped = instar(plugins, "map", "--output", "json", path).json
    assert sum(run["length"] for run in mapped) == SIZE
    first = next(index for index, entry in enumerate(slate_bytes.entries(path)) if entry and not entry & 0xFF)
    data = bytearray(path.read_bytes())
    data[4096 + 8 * first : 4104 + 8 * first] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(data)
    damaged = support.run_instar("check", "--output", "json", "--plugin-dir", plugins, path)
    assert damaged.rc == 2 and json.loads(damaged.stdout)["corruptions"] == 1, str(damaged)
