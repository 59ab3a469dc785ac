"""Bad plugins, from outside: each gets one line, and the others go on working beside it.

`libinstar_test_plugin_faulty.so` (tests/crates/plugins/faulty) misbehaves as `INSTAR_TEST_FAULT` says.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess

import pytest
import support
from support import BUNDLED, MIB, run_instar

TARGET = support.instar_binary().resolve().parent
PREFIX = "libinstar_plugin_"
ABI = (support.REPO / "guest/abi/src/module.rs").read_text()
MAJOR, MINOR, LEAST = (
    re.search(rf"MODULE_ABI_{part}: u32 = (\d+);", ABI)[1] for part in ("MAJOR", "MINOR", "LEAST_MINOR")
)


@pytest.fixture
def directory(tmp_path):
    """For plugins: nobody else can change it, whatever the umask is."""
    directory = tmp_path / "plugins"
    directory.mkdir(mode=0o755)
    return directory


def library(name):
    return TARGET / f"lib{name}.so"


def copied(directory, source, name):
    path = directory / f"{PREFIX}{name}.so"
    shutil.copyfile(source, path)
    path.chmod(0o644)
    return path


def one_line(text):
    """One line, and one that a terminal can show."""
    assert len(text.splitlines()) == 1 and len(text) < 3000, text
    assert all(character.isprintable() for character in text.rstrip("\n")), repr(text)
    return text


def the_others_work(tmp_path, directory, fault="", named=True):
    """A commit between two formats succeeds with the bad plugin in the directory, which the operator names, or the
    environment."""
    base, top = tmp_path / "good.raw", tmp_path / "good.qcow2"
    base.write_bytes(b"\x11" * MIB)
    support.create(top, backing=base, backing_fmt="raw")
    support.qemu_io(top, "write -P 0x22 64k 100k")
    expected = support.content_hash(top)
    options, path = (["--plugin-dir", directory], "") if named else ([], str(directory))
    result = run_instar("commit", *options, top, env={"INSTAR_TEST_FAULT": fault, "INSTAR_PLUGIN_PATH": path})
    assert result.rc == 0 and result.stderr == "", str(result)
    assert support.content_hash(base, "raw") == expected
    assert support.holds_no_clusters(top)


def skipped(directory, fault=""):
    """The reason for which the one bad plugin is skipped; the ones beside the program are loaded."""
    env = {"INSTAR_TEST_FAULT": fault}
    listed = run_instar("plugins", "--output", "json", "--plugin-dir", directory, env=env).json
    human = run_instar("plugins", "--plugin-dir", directory, env=env)
    [bad] = listed["skipped"]
    assert set(BUNDLED) <= {plugin["name"] for plugin in listed["plugins"]}
    one_line(bad["reason"])
    assert human.rc == 0 and sum(bad["path"] in line for line in human.stdout.splitlines()) == 1, str(human)
    return bad["reason"]


# --- libraries that are not loaded -----------------------------------------------------------------------------


def compiled(directory, code):
    source = directory.parent / "unrelated.c"
    source.write_text(code)
    path = directory / f"{PREFIX}bad.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)
    path.chmod(0o644)


def patched(directory, at, value):
    data = bytearray(library("instar_plugin_raw").read_bytes())
    data[at : at + len(value)] = value
    (directory / f"{PREFIX}bad.so").write_bytes(data)


FILES = {
    "empty": (lambda d: (d / f"{PREFIX}bad.so").touch(), "not an ELF file"),
    "text": (lambda d: (d / f"{PREFIX}bad.so").write_text("#!/bin/sh\n" * 99), "not an ELF file"),
    "truncated": (
        lambda d: (d / f"{PREFIX}bad.so").write_bytes(library("instar_plugin_raw").read_bytes()[:-1000]), "truncated"
    ),
    "another machine": (lambda d: patched(d, 18, struct.pack("<H", 183)), "another machine"),
    "32 bits": (lambda d: patched(d, 4, b"\1"), "not an ELF file for 64-bit x86"),
    "a program": (lambda d: patched(d, 16, struct.pack("<H", 2)), "not a shared library"),
    "no root module": (lambda d: compiled(d, "int nothing;\n"), "does not export a plugin header"),
    "a newer API": (lambda d: copied(d, library("instar_test_plugin_newer_api"), "bad"), "newer|update instar"),
    "another layout": (
        lambda d: copied(d, library("instar_test_plugin_other_layout"), "bad"), "types differ from those of plugin API"
    ),
    "a folder": (lambda d: (d / f"{PREFIX}bad.so").mkdir(), "not a regular file"),
    "writable by all": (
        lambda d: copied(d, library("instar_plugin_raw"), "bad").chmod(0o666), "the file is writable by others"
    ),
    "a link to nothing": (lambda d: os.symlink("nothing", d / f"{PREFIX}bad.so"), "cannot follow the link"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_library_that_is_none(directory, tmp_path, kind):
    make, words = FILES[kind]
    make(directory)
    for path in directory.iterdir():
        if kind != "writable by all" and path.is_file():
            path.chmod(0o644)
    reason = skipped(directory)
    assert any(word in reason for word in words.split("|")), reason
    the_others_work(tmp_path, directory)


def test_a_directory_that_others_may_write(directory, tmp_path):
    copied(directory, library("instar_test_plugin_faulty"), "faulty")
    directory.chmod(0o777)
    assert "the directory is writable by others" in skipped(directory)
    the_others_work(tmp_path, directory, named=False)


# --- plugins that say nonsense when they are loaded ---------------------------------------------------------------


LOADED = {
    "manifest:name": '"Not A Name" cannot be the name of a format',
    "manifest:long-name": "cannot be the name of a format",
    "manifest:reserved": '"core" cannot be the name of a format',
    "manifest:alias": '"a/b" cannot be the name of a format',
    "manifest:aliases": "more than 64 aliases",
    "manifest:version": "its version is not one short line",
    "manifest:description": "its description is not one short line",
    "manifest:option": "its option is not one short line",
    "manifest:error": "it does not want to",
    "guest_module:panic": "plugin panicked: in guest_module",
    "guest_module:elf": "its guest module is not an ELF file",
    "guest_module:none": "unknown roles 0x0",
    "guest_module:roles": "unknown roles 0x8",
    "guest_module:major": f"needs module interface 2.{LEAST}, this instar has {MAJOR}.{MINOR}: update instar",
    "guest_module:minor": f"needs module interface {MAJOR}.99, this instar has {MAJOR}.{MINOR}: update instar",
    "guest_module:old": f"needs module interface 0.{LEAST}, this instar has {MAJOR}.{MINOR}: rebuild the plugin",
}


@pytest.mark.parametrize("fault", LOADED)
def test_a_plugin_that_says_nonsense_of_itself(directory, tmp_path, fault):
    copied(directory, library("instar_test_plugin_faulty"), "faulty")
    assert LOADED[fault] in skipped(directory, fault)
    the_others_work(tmp_path, directory, fault)


def test_a_guest_module_may_offer_more_than_is_known(directory, tmp_path):
    copied(directory, library("instar_test_plugin_faulty"), "faulty")
    env = {"INSTAR_TEST_FAULT": "guest_module:newer"}
    listed = run_instar("plugins", "--output", "json", "--plugin-dir", directory, env=env).json
    assert "faulty" in {plugin["name"] for plugin in listed["plugins"]} and not listed["skipped"]
    the_others_work(tmp_path, directory, "guest_module:newer")


def test_a_plugin_that_claims_the_name_of_another(directory):
    copied(directory, library("instar_test_plugin_faulty"), "faulty")
    env = {"INSTAR_TEST_FAULT": "manifest:taken"}
    listed = run_instar("plugins", "--output", "json", "--plugin-dir", directory, env=env).json
    reasons = [one_line(skipped["reason"]) for skipped in listed["skipped"]]
    assert len(reasons) == 2 and all("it claims the format raw, as does " in reason for reason in reasons)
    assert set(BUNDLED) - {"raw"} == {plugin["name"] for plugin in listed["plugins"]}


# --- plugins that say nonsense of an image -----------------------------------------------------------------------


IMAGES = {
    "probe:panic": "plugin panicked: in probe",
    "probe:score": "its probe scored 4294967295 of 100",
    "probe:error": "xxx",
    "probe:no-error": "failed with the unknown code 0",
    "probe:unknown-error": "failed with the unknown code 9999",
    "facts:panic": "plugin panicked: in facts",
    "facts:error": "xxx",
    "facts:name": 'it reports the format "qcow2"',
    "facts:long-name": 'it reports the format "xxx',
    "facts:size": "a virtual size beyond 2^63 bytes",
    "facts:file-length": "another file length than the file has",
    "facts:cluster-size": "a cluster size of 196608 bytes, which is no power of two",
    "facts:huge-cluster-size": "a cluster size beyond 2^63 bytes",
    "facts:long-backing": "a backing whose name or format is longer than 4095 bytes",
    "facts:long-format": "a backing whose name or format is longer than 4095 bytes",
    "facts:nested": 'the value of its feature "ratio" is too large, or nested too deeply',
    "facts:deeply-nested": 'the value of its feature "ratio" is too large, or nested too deeply',
    "facts:long-text": 'the value of its feature "ratio" is too large, or nested too deeply',
    "facts:long-list": 'the value of its feature "ratio" is too large, or nested too deeply',
    "facts:long-field": 'the value of its feature "ratio" is too large, or nested too deeply',
    "facts:long-values": 'the value of its feature "ratio" is too large, or nested too deeply',
    "facts:no-feature-name": "the name of a feature that it reports is not one short line",
    "facts:feature-name": "the name of a feature that it reports is not one short line",
    "facts:many-features": "more than 1000 features",
    "facts:read": "read more than 8388608 bytes in one call",
}
COMMITS = IMAGES | {
    "files:panic": "plugin panicked: in files",
    "files:error": "xxx",
    "files:many": "more files than the 512",
    "files:empty": "the recorded name '' is empty",
    "files:zero": "is no file name",
    "files:long": "it names a file of the image by more than 4095 bytes",
    "files:outside": "leads outside the image's own directory",
    "verdict:panic": "plugin panicked: in verdict",
    "verdict:code": "an unknown code",
    "verdict:reason": "xxx",
    # Nothing but the virtual machine's loader has looked at it before.
    "verdict:": "guest module faulty: ",
}


@pytest.fixture
def image(directory, tmp_path):
    copied(directory, library("instar_test_plugin_faulty"), "faulty")
    support.create(tmp_path / "base.qcow2", MIB)
    path = tmp_path / "image.faulty"
    path.write_bytes(b"FAULTY" + bytes(506))
    return path


@pytest.mark.parametrize("fault", IMAGES)
def test_nonsense_about_an_image_that_is_looked_at(directory, image, fault):
    result = run_instar("info", "--plugin-dir", directory, image, env={"INSTAR_TEST_FAULT": fault})
    assert result.rc == 1 and result.stdout == "", str(result)
    assert IMAGES[fault] in one_line(result.stderr) and image.name in result.stderr, str(result)


@pytest.mark.parametrize("fault", COMMITS)
def test_nonsense_about_an_image_that_is_committed(directory, image, tmp_path, fault):
    with support.untouched(image, tmp_path / "base.qcow2"):
        result = run_instar("commit", "--plugin-dir", directory, image, env={"INSTAR_TEST_FAULT": fault})
    assert result.rc == 1 and COMMITS[fault] in one_line(result.stderr), str(result)
    the_others_work(tmp_path, directory, fault)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("notes:panic", "no notes: the faulty plugin is faulty: plugin panicked: in notes"),
        ("notes:error", "no notes: "),
        ("notes:many", "its notes are not a few short lines"),
        ("notes:long", "its notes are not a few short lines"),
        ("notes:lines", "its notes are not a few short lines"),
        ("notes:empty", "its notes are not a few short lines"),
        ("", "nothing is wrong"),
    ],
)
def test_nonsense_in_notes_hides_nothing_else(directory, image, fault, words):
    env = {"INSTAR_TEST_FAULT": fault}
    shown = run_instar("info", "--output", "json", "--plugin-dir", directory, image, env=env).json
    assert shown["virtual-size"] == MIB
    [note] = shown["notes"]
    assert words in note and len(note) < 3000
    human = run_instar("info", "--plugin-dir", directory, image, env=env)
    assert human.stdout.splitlines()[-2] == "Notes:" and words in one_line(human.stdout.splitlines()[-1])
    verbose = run_instar("commit", "-v", "--plugin-dir", directory, image, env=env)
    assert sum(words in line for line in verbose.stderr.splitlines()) == 1, str(verbose)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("create:panic", "plugin panicked: in create"),
        ("create:error", "xxx"),
        ("create:outside", "puts metadata of a new image past the end of the file"),
        ("create:overflow", "puts metadata of a new image past the end of the file"),
        ("create:reserved", "reserves space past the end of a new image"),
        ("create:huge", "makes a new image too large to be written"),
    ],
)
def test_nonsense_instead_of_a_new_image(directory, tmp_path, fault, words):
    copied(directory, library("instar_test_plugin_faulty"), "faulty")
    path = tmp_path / "new"
    env = {"INSTAR_TEST_FAULT": fault}
    result = run_instar("create", "--plugin-dir", directory, "-f", "faulty", path, "1M", env=env)
    assert result.rc == 1 and words in one_line(result.stderr), str(result)
    assert not path.exists()
    assert run_instar("create", "--plugin-dir", directory, "-f", "qcow2", path, "1M", env=env).rc == 0


def test_a_guest_module_of_another_major_version(directory, tmp_path):
    """What its host half says of it is right; what the module itself says is not."""
    data = bytearray(library("instar_plugin_raw").read_bytes())
    # ModuleDescriptor: the magic, then the major version.
    at = data.index(b"INSTMODU" + struct.pack("<I", 1))
    data[at + 8 : at + 12] = struct.pack("<I", 2)
    bad = directory / f"{PREFIX}raw.so"
    bad.write_bytes(data)
    bad.chmod(0o644)
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(bytes(MIB))
    support.create(top, backing=base, backing_fmt="raw")
    support.qemu_io(top, "write -P 1 0 64k")
    with support.untouched(base, top):
        result = run_instar("commit", "--plugin-dir", directory, top)
    assert result.rc == 1, str(result)
    assert "module raw: it was built for module version 2, not 1" in one_line(result.stderr), str(result)
