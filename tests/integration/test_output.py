"""What a program prints, and where nobody reads it: no print decides how a command ends, bad usage, the error object."""

from __future__ import annotations

import os
import subprocess

import pytest
import support
from support import CODES, KIB, MIB, run_instar


def unread(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=None):
    """Run with outputs that fail: "full", or "gone" for a pipe that nobody reads any more."""
    opened = []

    def output(kind):
        if not isinstance(kind, str):
            return kind
        if kind == "full":
            opened.append(os.open("/dev/full", os.O_WRONLY))
        else:
            reader, writer = os.pipe()
            os.close(reader)
            opened.append(writer)
        return opened[-1]

    done = subprocess.run([support.instar_binary(), *args], stdin=subprocess.DEVNULL, stdout=output(stdout), cwd=cwd,
                          stderr=output(stderr), timeout=support.TIMEOUT, check=False)
    for descriptor in opened:
        os.close(descriptor)
    return done


@pytest.mark.parametrize("kind", ["full", "gone"])
@pytest.mark.parametrize("option", ["-v", "-p", "-q"])
def test_a_commit_whose_lines_nobody_reads_is_done(pair, option, kind):
    pair.make(16 * MIB, base=["write -P 1 0 16M"], top=["write -P 6 1M 6M", "write -z 8M 1M"])
    before = support.content_hash(pair.top)
    done = unread("commit", option, pair.top, stderr=kind)
    assert (done.returncode, done.stdout) == (0, b"" if option == "-q" else b"Image committed.\n"), done
    assert support.content_hash(pair.base) == before == support.content_hash(pair.top)
    assert support.holds_no_clusters(pair.top)


@pytest.mark.parametrize("kind", ["full", "gone"])
def test_warnings_that_nobody_reads(tmp_path, kind):
    for name, backing in (("base", None), ("mid", "base"), ("top", "mid")):
        support.create(tmp_path / name, MIB, backing=backing, cwd=tmp_path)
    support.qemu_io(tmp_path / "top", "write -P 5 0 64k")
    assert unread("commit", "-b", "base", "top", stderr=kind, cwd=tmp_path).returncode == 0
    support.qemu_io(tmp_path / "base", "read -P 5 0 64k")


@pytest.mark.parametrize("kind", ["full", "gone"])
@pytest.mark.parametrize("command", ["commit", "check", "map", "info"])
def test_an_error_that_nobody_reads(tmp_path, command, kind):
    assert unread(command, tmp_path / "none", stderr=kind).returncode == 1
    assert unread(command, "--nonesuch", stderr=kind).returncode == (64 if command == "check" else 2)


@pytest.mark.parametrize("kind", ["full", "gone"])
def test_findings_that_nobody_reads(tmp_path, kind):
    image = support.create(tmp_path / "image", MIB)
    support.qemu_io(image, "write -P 5 0 1M")
    with image.open("r+b") as file:  # the refcount block: everything leaks no more, it is corrupt
        file.seek(2 * 65536)
        file.write(bytes(65536))
    assert unread("check", image, stderr=kind).returncode == support.run_instar("check", image).rc == 2


@pytest.mark.parametrize("kind", ["full", "gone"])
@pytest.mark.parametrize("output", [[], ["--output", "json"]], ids=["human", "json"])
def test_a_commit_that_cannot_print_its_result_says_that_it_is_done(pair, kind, output):
    pair.make(top=["write -P 6 0 1M"])
    before = support.content_hash(pair.top)
    done = unread("commit", *output, pair.top, stdout=kind)
    assert done.returncode == 1, done
    text = done.stderr.decode()
    assert "the commit is done, but" in text and "ERROR_OUTPUT_FAILED" in text and str(pair.top) in text
    if output:
        assert support.error_of(text)["code"] == CODES["ERROR_OUTPUT_FAILED"]
    assert support.content_hash(pair.base) == before and support.holds_no_clusters(pair.top)


@pytest.mark.parametrize(
    "args", [["info", "IMAGE"], ["map", "--output", "json", "IMAGE"], ["check", "IMAGE"], ["plugins"], ["config"],
             ["--help"], ["commit", "--help"], ["--version"], ["commit", "--dry-run", "IMAGE"]], ids=" ".join)
def test_a_result_that_cannot_be_printed(pair, args):
    pair.make(top=["write -P 6 0 64k"])
    done = unread(*[str(pair.top) if arg == "IMAGE" else arg for arg in args], stdout="full")
    assert done.returncode == 1, done
    assert b"ERROR_OUTPUT_FAILED" in done.stderr and b"No space left" in done.stderr


def test_an_image_that_is_made_and_not_announced(tmp_path):
    done = unread("create", "-f", "qcow2", tmp_path / "new", "1M", stdout="full")
    assert done.returncode == 1 and b"the image is made, but" in done.stderr, done
    support.assert_clean(tmp_path / "new")


# --- bad usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "word"),
    [(["commit"], "<FILENAME>"), (["commit", "--nonesuch", "x"], "--nonesuch"), (["commit", "-r", "abc", "x"], "abc"),
     (["check"], "<FILENAME>"), (["map", "-s", "x", "y"], "start-offset"), (["info", "a", "b"], "'b'"),
     (["map", "--wait", "x", "y"], "not a whole number of seconds"), (["commit", "--wait=-1", "y"], "not a whole number of seconds"),
     (["check", "--wait", "99999999999999999999", "y"], "more than 2^64 - 1 seconds"),
     (["commit", "--image-opts", "x"], "--image-opts"), (["check", "-r", "all", "-U", "x"], "-U")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_bad_usage(tmp_path, args, word):
    status = 64 if args[0] == "check" else 2
    human = run_instar(*args, cwd=tmp_path)
    assert human.rc == status and human.stdout == "" and word in human.stderr, str(human)
    result = run_instar(args[0], "--output=json", *args[1:], cwd=tmp_path)
    assert result.rc == status and result.stdout == "", str(result)
    error = result.error
    assert (error["code"], error["name"]) == (CODES["ERROR_BAD_USAGE"], "ERROR_BAD_USAGE")
    assert word in error["message"] and "\n" not in error["message"]


def test_only_check_says_corrupt_with_2(tmp_path):
    assert run_instar("check", "--nonesuch").rc == 64
    assert run_instar("check", tmp_path / "none").rc == 1
    assert run_instar("map", "--nonesuch").rc == 2


# --- the error object -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["commit", "check", "map", "info"])
def test_a_missing_file_has_one_code(tmp_path, command):
    human = run_instar(command, "none", cwd=tmp_path)
    assert human.stderr == "instar: 'none': does not exist (ERROR_IMAGE_NOT_FOUND)\n", str(human)
    error = run_instar(command, "--output", "json", "./none", cwd=tmp_path).error
    assert error == {
        "code": 24, "name": "ERROR_IMAGE_NOT_FOUND", "message": "'./none': does not exist", "file": str(tmp_path / "none"),
        "role": "overlay" if command == "commit" else "image", "errno": 2,
    }


@pytest.mark.parametrize("command", [["commit"], ["map"], ["info", "--backing-chain"]], ids=" ".join)
def test_a_missing_backing_has_another(tmp_path, command):
    support.create(tmp_path / "base", MIB)
    support.create(tmp_path / "top", backing="base", cwd=tmp_path)
    (tmp_path / "base").unlink()
    error = run_instar(*command, "--output", "json", "top", cwd=tmp_path).error
    assert (error["name"], error["errno"]) == ("ERROR_BACKING_NOT_FOUND", 2), error
    assert error["role"] == ("backing" if command == ["commit"] else "ancestor")
    assert error["file"] == str(tmp_path / "base")
    if command == ["commit"]:
        given = run_instar("commit", "--output", "json", "-b", "base", "top", cwd=tmp_path).error
        assert (given["name"], given["role"]) == ("ERROR_BACKING_NOT_FOUND", "backing")


def test_a_failed_write_says_where(pair):
    pair.make(80 * MIB, base_options={"preallocation": "metadata"}, top=["write -P 6 70M 1M"])
    command = f"ulimit -f {support.FILE_LIMIT // KIB}; exec {support.instar_binary()} commit --output json {pair.top}"
    limited = support.run("bash", "-c", command)
    error = limited.error
    assert limited.rc == 1 and error["role"] == "backing" and error["step"] == "write", error
    assert error["errno"] == 27 and error["file"] == str(pair.base) and isinstance(error["offset"], int)


# --- paths ------------------------------------------------------------------------------------------


def test_paths_are_shown_as_given_and_absolute_in_json(pair):
    pair.make(top=["write -P 6 0 64k"])
    sub = pair.dir / "sub"
    sub.mkdir()
    (pair.dir / "way").symlink_to("sub")
    human = run_instar("commit", "--dry-run", "way/../top.qcow2", cwd=pair.dir)
    assert "'way/../top.qcow2'" in human.stdout, str(human)
    result = run_instar("commit", "--dry-run", "--output", "json", "way/../top.qcow2", cwd=pair.dir).json
    assert (result["overlay"], result["backing"]) == (str(pair.top), str(pair.base))
    for command in ("check", "map", "info", "commit"):
        said = run_instar(command, "-f", "vmdk", "way/../top.qcow2", cwd=pair.dir)
        assert said.stderr.startswith("instar: 'way/../top.qcow2': "), str(said)


def test_paths_go_where_the_kernel_goes(tmp_path):
    """Behind a link, `..` is the parent of the directory that it leads to."""
    deep = tmp_path / "elsewhere/deep"
    deep.mkdir(parents=True)
    (tmp_path / "way").symlink_to(deep)
    support.create(tmp_path / "elsewhere/base", MIB)
    support.create(tmp_path / "elsewhere/top", backing="base", cwd=tmp_path / "elsewhere")
    result = run_instar("commit", "--dry-run", "--output", "json", "way/../top", cwd=tmp_path)
    assert result.json["overlay"] == str(tmp_path / "elsewhere/top"), str(result)
