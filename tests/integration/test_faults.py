"""A sample of `make faults`: system calls that fail, are interrupted, move less than asked, or are where the program dies."""

from __future__ import annotations

import os
import random

import commands
import device_faults
import faults
import pytest

SAMPLE = 12
CHANGES = {"pwritev", "copy_file_range", "ftruncate", "linkat", "renameat", "fsync"}
#: Faults of each of the other commands.
FEW = 3
# Calls that each case makes, whatever else it does.
ALWAYS = {"openat", "fcntl", "pread64", "preadv", "pwritev", "fdatasync"}
# And one of those that copy: by one thread, or by several.
COPIES = {"copy_file_range", "pwrite64"}


#: The others keep an undo log, which cannot lie in memory, where these tests run.
ON_DEVICES = [device_faults.qcow2_on_a_device, device_faults.raw_on_a_device]


@pytest.fixture(params=[*faults.CASES, *ON_DEVICES], ids=lambda case: case.__name__)
def case(request, tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    if request.param not in ON_DEVICES:
        yield request.param(directory)
        return
    if os.geteuid() != 0:
        pytest.skip("loop devices take root")
    with device_faults.attached(tmp_path) as loop:
        yield request.param(directory, loop)


def test_a_sample(case):
    calls = case.calls().keys()
    assert calls >= ALWAYS and calls & COPIES
    everything = list(case.faults())
    assert {fault for fault, _, _ in everything} == set(faults.FAULTS)
    chosen = random.Random(len(everything)).sample(everything, min(SAMPLE, len(everything)))
    # The calls that change something, and one of each kind.
    chosen += [(fault, 1, "pwritev") for fault in faults.FAULTS] + [("EIO", 1, "fdatasync"), ("EINTR", 1, "openat")]
    injected = sum(case.inject(*fault) for fault in chosen)
    assert injected > len(chosen) // 2


def test_what_is_wrong_would_be_seen(case):
    """The checks can fail: a base, or an overlay, that reads differently is a violation."""
    case.reset()
    before = case.expected
    case.expected = "another content"
    with pytest.raises(faults.Violation):
        case.inject("COUNT", 0, "none")
    case.expected = before
    assert case.inject("COUNT", 0, "none") is False


# test_relink.py has all faults of its own.
@pytest.fixture(params=[job for job in commands.ALL if job is not commands.relink], ids=lambda job: job.__name__)
def job(request, tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    return request.param(directory)


def test_a_sample_of_the_other_commands(job):
    """And the checks can fail: of each, one that expects something else is a violation."""
    everything = list(job.faults())
    changing = [fault for fault in everything if fault[0] == "KILL" and fault[2] in CHANGES]
    rng = random.Random(len(everything))
    for fault in [*rng.sample(everything, FEW), rng.choice(changing)]:
        job.inject(*fault)
    job.expected = job.wanted = "another content"
    with pytest.raises(faults.Violation):
        job.inject("COUNT", 0, "none")
