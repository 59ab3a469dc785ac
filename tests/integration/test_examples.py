"""`examples/merge_overlay.py`: what it makes of real images, in files and on volumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import dirty_bitmaps
import support
from support import MIB
from test_devices import Loop

SCRIPT = support.REPO / "examples/merge_overlay.py"


def merge(overlay, *children, **variables):
    """What the script says on success."""
    path = f"{support.instar_binary().parent}:{os.environ['PATH']}"
    done = support.run(SCRIPT, overlay, *children, env={"PATH": path, **variables})
    assert done.rc == 0, str(done)
    return json.loads(done.stdout)


def fill(base, overlay, child):
    """Three layers; two of them have the same bitmap."""
    support.qemu_io(base, "write -P 1 0 1M")
    dirty_bitmaps.add(base, "backup")
    support.create(overlay, backing=base, backing_fmt="qcow2")
    dirty_bitmaps.add(overlay, "backup")
    support.qemu_io(overlay, "write -P 2 512k 3M", "write -z 8M 64k")
    support.create(child, backing=overlay, backing_fmt="qcow2")
    support.qemu_io(child, "write -P 3 2M 64k")


def assert_merged(base, child, expected, dirty):
    assert support.content_hash(child) == expected
    assert Path(support.info(child)["full-backing-filename"]) == Path(base)
    assert dirty_bitmaps.within(dirty, dirty_bitmaps.dirty(base, "backup"))
    support.assert_clean(base)


def test_files(tmp_path):
    base, overlay, child = (tmp_path / name for name in ("base", "overlay", "child"))
    support.create(base, 16 * MIB)
    fill(base, overlay, child)
    expected, dirty = support.content_hash(child), dirty_bitmaps.dirty(overlay, "backup")
    merged = merge(overlay, child)
    assert [(bitmap["name"], bitmap["result"]) for bitmap in merged["bitmaps"]] == [("backup", "merged")]
    assert merged["verified_bytes"] == merged["bytes_committed"] > 3 * MIB
    assert not overlay.exists()
    assert_merged(base, child, expected, dirty)


def test_volumes(tmp_path):
    """The base's volume is too short for what comes, and is extended first."""
    file, child, removed = tmp_path / "base.img", tmp_path / "child", tmp_path / "removed"
    with Loop(file, 2 * MIB) as base, Loop(tmp_path / "overlay.img", 5 * MIB) as overlay:
        support.create(base, 16 * MIB)
        fill(base, overlay, child)
        expected, dirty = support.content_hash(child), dirty_bitmaps.dirty(overlay, "backup")
        short = support.run_instar("commit", "--bitmaps", "--dry-run", "--relink", child, overlay)
        assert short.rc == 1 and "ERROR_NO_SPACE" in short.stderr, str(short)
        extend = f'truncate -s "$SIZE" {file} && truncate -s %512 {file} && losetup -c'
        merge(overlay, child, EXTEND=extend, REMOVE=f"touch {removed}")
        assert 4 * MIB < file.stat().st_size < 6 * MIB and removed.exists()
        assert_merged(base, child, expected, dirty)


def test_an_error_is_one_line(tmp_path):
    done = support.run(SCRIPT, tmp_path / "missing", env={"PATH": f"{support.instar_binary().parent}:{os.environ['PATH']}"})
    assert done.rc == 1 and len(done.stderr.splitlines()) == 1 and "missing" in done.stderr, str(done)
