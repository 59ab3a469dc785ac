"""A sample of tests/campaigns/power_loss.py: power losses of the real program on real file systems."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import support

PROGRAM = support.REPO / "tests/campaigns/power_loss.py"


def lose_power(*options):
    if os.geteuid() != 0:
        pytest.skip("mounting file systems takes root")
    return support.run("unshare", "--mount", sys.executable, PROGRAM, *options)


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs"])
def test_a_sample(name):
    result = lose_power("--file-system", name, "--sample", "4", "--commits")
    assert result.rc == 0, str(result)
    tried, shared, violations = re.search(rf"{name}: (\d+) power losses, (no )?extents shared, (\d+) v", result.stdout).groups()
    assert int(tried) >= 16 and violations == "0"
    # Where the file system can share extents, it was asked to, and that was tried, too.
    assert (shared is None) == (name in ("xfs", "btrfs"))


#: One of each command; all of them, on every file system, are in `make crash`.
COMMANDS = ["rebase_onto_another", "resize_shrinks", "resize_vpc", "repair_all", "convert_replaces"]


def test_a_sample_of_the_other_commands():
    """Among them power losses that come twice, and after which another command is run first."""
    result = lose_power("--file-system", "ext4", "--sample", "1", *(f"--case={name}" for name in COMMANDS))
    assert result.rc == 0, str(result)
    assert int(re.search(r"ext4: (\d+) power losses", result.stdout)[1]) >= 2 * len(COMMANDS)


def test_a_flush_that_is_missing_would_be_seen():
    """The flushes of the base are skipped and said to be done: what was tried above has to fail now."""
    result = lose_power("--file-system", "ext4", "--unflushed", "--sample", "8", "--commits")
    assert result.rc == 1
    assert int(re.search(r"(\d+) violations", result.stdout)[1]) > 0, str(result)
    assert "VIOLATION ext4" in result.stderr
