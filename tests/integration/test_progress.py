"""Progress as data, `--progress=json` and `--progress=fd:N`, and by SIGUSR1. For people: test_options.py."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time

import pytest
import schemas
import support
from support import MIB

#: Ten writes of which the slow commits here do some before and some after whatever happens.
WRITES = [f"write -P {n + 1} {n}M 512k" for n in range(10)]


def started(*args, descriptor=True, **options):
    """instar with a descriptor for its progress, or not; the process, and the reader's end."""
    reader, writer = os.pipe()
    how = [f"--progress=fd:{writer}"] if descriptor else []
    child = subprocess.Popen([support.instar_binary(), args[0], *how, *args[1:]], stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[writer], **options)
    os.close(writer)
    return child, os.fdopen(reader)


def lines(text):
    """The lines of progress, each of which the schema allows, with what holds of all of them."""
    told = [schemas.insist("progress", json.loads(line)) for line in text.splitlines()]
    assert told[0]["status"] == "created" and told[-1]["status"] == "concluded"
    for before, after in zip(told, told[1:]):
        assert after["current-progress"] >= before["current-progress"] and after["elapsed"] >= before["elapsed"]
    assert all(line["current-progress"] <= line["total-progress"] for line in told)
    return told


@pytest.mark.parametrize("sandbox", ["kvm", "process"])
def test_a_commit_tells_what_it_does(pair, sandbox):
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    expected = support.content_hash(pair.top)
    child, reader = started("commit", "--sandbox", sandbox, "-r", "4M", "--output", "json", pair.top)
    told = lines(reader.read())
    out, err = child.communicate(timeout=support.TIMEOUT)
    assert child.returncode == 0 and err == "", err
    assert {line["type"] for line in told} == {"commit"} and told[-1]["result"] == json.loads(out)
    stages = [line["stage"] for line in told if line["status"] == "running"]
    assert list(dict.fromkeys(stages)) == ["checking", "writing", "emptying"], stages
    assert stages.count("writing") > 2, "a rate of 4 MiB/s takes more than a second"
    assert len(told) <= 4 * told[-1]["elapsed"] + 8, "four a second"
    assert told[-1]["current-progress"] == told[-1]["total-progress"] >= 5 * MIB
    assert support.content_hash(pair.base) == expected


def test_standard_error_and_quiet(pair):
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    told = lines(support.commit(pair.top, "-q", "--progress=json").stderr)
    assert told[-1]["result"]["bytes_committed"] == 5 * MIB


def test_nothing_else_is_on_the_descriptor_of_the_lines(pair):
    """Warnings are lines, and the error is in the last one, and nowhere else; on another descriptor, people have theirs."""
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    support.create(pair.top.with_name("other"), backing=pair.base)
    failed = support.run_instar("commit", "--progress=json", pair.top)
    last = lines(failed.stderr)[-1]
    assert failed.rc == 1 and last["result"]["error"]["name"] == "ERROR_BACKING_SHARED", str(failed)
    as_json = support.run_instar("commit", "--progress=json", "--output", "json", pair.top)
    assert as_json.rc == 1 and lines(as_json.stderr)[-1]["result"] == last["result"], str(as_json)
    child, reader = started("commit", pair.top)
    with reader:
        assert lines(reader.read())[-1]["result"] == last["result"]
    assert child.communicate()[1].endswith("(ERROR_BACKING_SHARED)\n")
    done = support.commit(pair.top, "--progress=json", "--ignore-siblings")
    told = lines(done.stderr)
    warned = [line["warning"] for line in told if "warning" in line]
    assert done.rc == 0 and len(warned) == 1 and "other" in warned[0], str(done)


@pytest.mark.parametrize("options", [["-c", "-O", "qcow2"], ["-O", "vmdk", "-o", "subformat=streamOptimized"]], ids=" ".join)
def test_what_is_compressed_counts_as_bytes_of_the_disk(tmp_path, options):
    """Of 96 MiB that shrink to a sixteenth, more than a half is told before the end; and all of it fits into a guest's memory."""
    disk, page = tmp_path / "disk", random.Random(1)
    with open(disk, "wb") as file:
        for _ in range(192):
            file.write(page.randbytes(4096) * 128)
    done = support.run_instar("convert", "--progress=json", "-f", "raw", *options, disk, tmp_path / "new")
    assert done.rc == 0 and (tmp_path / "new").stat().st_size < 16 * MIB, str(done)
    told = [line["current-progress"] for line in lines(done.stderr) if line["status"] == "running"]
    # A conversion that takes less than a quarter of a second tells its begin and its end.
    assert max(told) > 48 * MIB or len(told) <= 2, told


def test_a_comparison_tells_it_too(pair):
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    result = support.run_instar("compare", "--progress=json", "--output", "json", pair.base, pair.top)
    told = lines(result.stderr)
    assert result.rc == 1 and told[-1]["type"] == "compare" and told[-1]["result"] == result.json
    assert "error" not in told[-1], "images that differ are a result"


def test_a_refusal_is_the_result(pair):
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    with support.untouched(pair.top, pair.base):
        child, reader = started("commit", "-f", "vmdk", "--output", "json", pair.top)
        told = lines(reader.read())
        _, err = child.communicate(timeout=support.TIMEOUT)
    assert child.returncode == 1
    assert [line["status"] for line in told][-2:] == ["aborting", "concluded"]
    assert told[-1]["result"]["error"] == support.error_of(err) and told[-1]["error"] == support.error_of(err)["message"]


def test_an_interruption_is_told(pair):
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    expected = support.content_hash(pair.top)
    child, reader = started("commit", "-r", "1M", pair.top)
    text = ""
    while '"writing"' not in text:
        text += reader.readline()
    child.send_signal(signal.SIGTERM)
    told = lines(text + reader.read())
    assert child.wait(timeout=support.TIMEOUT) == 1
    assert told[-1]["result"]["error"]["name"] == "ERROR_INTERRUPTED"
    assert told[-1]["current-progress"] < 5 * MIB
    support.commit(pair.top)
    assert support.content_hash(pair.base) == expected


def test_a_reader_that_does_not_read_holds_nothing_up(pair):
    """And one that is gone does not end the commit."""
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    child, reader = started("commit", pair.top)
    reader.close()
    out, err = child.communicate(timeout=support.TIMEOUT)
    assert (child.returncode, out, err) == (0, "Image committed.\n", "")


@pytest.mark.parametrize(("how", "words"), [
    ("fd:77", "has to leave descriptor 77 open"),
    ("fd:0", "fd:N"),
    ("xml", "`text`, `json`, or `fd:N`"),
])
def test_a_place_that_cannot_be_written_to_is_bad_usage(pair, how, words):
    pair.make(MIB, base=["write 0 64k"], top=["write 0 64k"])
    with support.untouched(pair.top, pair.base):
        result = support.run_instar("commit", f"--progress={how}", pair.top)
    assert result.rc == 2 and words in result.stderr, str(result)


def test_what_is_read_only_cannot_be_written_to(pair):
    pair.make(MIB, base=["write 0 64k"], top=["write 0 64k"])
    with support.untouched(pair.top, pair.base), open("/dev/null") as file:
        done = subprocess.run([support.instar_binary(), "commit", f"--progress=fd:{file.fileno()}", pair.top],
                              capture_output=True, text=True, pass_fds=[file.fileno()], timeout=support.TIMEOUT)
    assert done.returncode == 2 and "open for writing" in done.stderr, done


@pytest.mark.parametrize("sandbox", ["kvm", "process"])
@pytest.mark.parametrize("rate", ["1M", "64M"])
def test_sigusr1_is_a_question(pair, sandbox, rate):
    """Also one that comes at any moment is not the end."""
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    expected = support.content_hash(pair.top)
    child, reader = started("commit", "--sandbox", sandbox, "-r", rate, pair.top)
    reader.readline()
    deadline = time.monotonic() + support.TIMEOUT
    while child.poll() is None and time.monotonic() < deadline:
        child.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    told = lines('{"type": "commit", "status": "created", "current-progress": 0, "total-progress": 0, "speed": 0, "elapsed": 0}\n'
                 + reader.read())
    out, err = child.communicate(timeout=support.TIMEOUT)
    assert (child.returncode, out, err) == (0, "Image committed.\n", "")
    if rate == "1M":
        assert len(told) > 4 * told[-1]["elapsed"] + 8, "each question has an answer of its own"
    assert support.content_hash(pair.base) == expected


def test_sigusr1_without_the_option_is_answered_for_people(pair):
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    child, _ = started("commit", "-r", "1M", pair.top, descriptor=False)
    said = ""
    while "%" not in said:
        time.sleep(0.1)
        assert child.poll() is None, said
        child.send_signal(signal.SIGUSR1)
        said = child.stderr.readline()
    assert re.fullmatch(r"instar: \d+ % \(\d+ of 5242880 bytes, [\d.]+ [KM]?i?B of 5 MiB\)\n", said)
    out, err = child.communicate(timeout=support.TIMEOUT)
    assert (child.returncode, out) == (0, "Image committed.\n"), err


def test_a_question_does_not_end_the_wait_for_an_image(pair):
    pair.make(MIB, base=["write -P 1 0 64k"], top=["write -P 2 0 64k"])
    with support.Holder(pair.top):
        child, reader = started("commit", "--wait", "60", pair.top)
        assert "created" in reader.readline()
        for _ in range(5):
            time.sleep(0.1)
            child.send_signal(signal.SIGUSR1)
        assert child.poll() is None
    out, err = child.communicate(timeout=support.TIMEOUT)
    assert (child.returncode, out) == (0, "Image committed.\n"), err


def test_the_sandbox_does_not_get_the_descriptor(pair):
    """It has the doorbell and nothing else."""
    pair.make(16 * MIB, base=["write -P 99 0 16M"], top=WRITES)
    child, reader = started("commit", "--sandbox", "process", "-r", "1M", pair.top)
    text = ""
    while '"writing"' not in text:
        text += reader.readline()
    [guest] = [int(pid) for pid in open(f"/proc/{child.pid}/task/{child.pid}/children").read().split()]
    assert len(os.listdir(f"/proc/{guest}/fd")) == 1
    child.send_signal(signal.SIGTERM)
    reader.read()
    child.communicate(timeout=support.TIMEOUT)
