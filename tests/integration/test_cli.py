"""The command line beside `commit`'s outcome: help, usage errors, info, create, plugins, `-v`."""

from __future__ import annotations

import os
import re
import shutil

import pytest
import qcow2_bytes
import support
from support import GIB, KIB, MIB, run_instar

COMMIT_OPTIONS = [
    "--format", "--base", "--progress", "--quiet", "--rate-limit", "--cache", "--output", "--resize-backing",
    "--dry-run", "--allow-backing-dir", "--plugin-dir", "-f", "-b", "-d", "-p", "-q", "-r", "-t", "-v",
]
INFO_KEYS = [
    "virtual-size", "filename", "format", "actual-size", "cluster-size", "format-specific", "dirty-flag",
    "backing-filename", "full-backing-filename", "backing-filename-format",
]


# --- usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["help"], ["commit", "--help"], ["info", "--help"]], ids=" ".join)
def test_help(args):
    result = run_instar(*args)
    assert result.rc == 0 and result.stderr == "", str(result)
    assert "Usage: instar" in result.stdout


def test_help_names_every_option():
    text = run_instar("commit", "--help").stdout
    missing = [o for o in COMMIT_OPTIONS if not re.search(rf"(^|[\s,]){re.escape(o)}\b", text)]
    assert not missing, text


def test_help_says_what_the_program_does():
    first = run_instar("--help").stdout.splitlines()[0]
    assert all(word in first.lower() for word in ("commit", "rebase", "resize", "convert", "check")), first


def test_the_ways_to_call_measure():
    usage = run_instar("measure", "--help").stdout.split("Usage: ")[1].split("\n\n")[0].split("\n")
    assert [line.strip() for line in usage] == ["instar measure [OPTIONS] <FILENAME>", "instar measure [OPTIONS] --size <SIZE>"]


@pytest.mark.parametrize("command", ["check", "map", "measure", "compare"])
def test_what_v_prints_of_a_command_that_reads(tmp_path, command):
    support.create(tmp_path / "image", MIB)
    result = run_instar(command, "-v", *["image"] * (2 if command == "compare" else 1), cwd=tmp_path)
    assert result.rc == 0 and "instar: plugin qcow2 " in result.stderr and "instar: confinement: " in result.stderr, str(result)
    assert ("instar: disks of 1048576 and 1048576 bytes" in result.stderr) == (command == "compare"), str(result)
    shown = " ".join(run_instar(command, "--help").stdout.split())
    for words in ("Print what was loaded, how the process is confined,", "what the guest logs"):
        assert words in shown, shown
    assert ("how large the disks are" in shown) == (command == "compare"), shown


@pytest.mark.parametrize("args", [["map", "-f", "foo", "image"], ["measure", "-O", "foo", "image"], ["create", "-f", "foo", "new", "1M"]],
                         ids=" ".join)
def test_a_format_without_a_plugin_names_those_that_have_one(tmp_path, args):
    support.create(tmp_path / "image", MIB)
    result = run_instar(*args, cwd=tmp_path)
    words = "unknown format 'foo': the plugins that are loaded are for parallels, qcow, qcow2, raw, vdi, vhdx, vmdk, vpc (see `instar plugins`)"
    assert result.rc == 1 and f"{words} (ERROR_PLUGIN_UNAVAILABLE)" in result.stderr, str(result)


def test_version():
    result = run_instar("--version")
    assert result.rc == 0 and re.fullmatch(r"instar \d+\.\d+\.\d+\S*\n", result.stdout), str(result)


@pytest.mark.parametrize(
    "args",
    [
        [], ["nonesuch"], ["commit"], ["commit", "--nonesuch", "x"], ["commit", "a", "b"], ["commit", "-b"],
        ["commit", "--output", "xml", "x"], ["commit", "-t", "bogus", "x"], ["commit", "-r", "abc", "x"],
        ["info"], ["create"], ["plugins", "x"],
    ],
    ids=lambda args: " ".join(args) or "nothing",
)
def test_usage_errors(tmp_path, args):
    result = run_instar(*args, cwd=tmp_path)
    assert result.rc == 2, str(result)
    assert result.stdout == "" and result.stderr, str(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["commit", "TOP", "-q"], ["commit", "-q", "--", "TOP"]], ids=" ".join)
def test_order_of_arguments(pair, args):
    pair.make(top=["write -P 1 0 64k"])
    before = support.content_hash(pair.top)
    result = run_instar(*[str(pair.top) if a == "TOP" else a for a in args])
    assert (result.rc, result.stdout, result.stderr) == (0, "", ""), str(result)
    assert support.content_hash(pair.base) == before


# --- info -------------------------------------------------------------------------------------------


def same_info(ours: dict, theirs: dict):
    """Every key that both mean alike has the same value; none is missing or invented."""
    wanted = {key: theirs[key] for key in INFO_KEYS if key in theirs}
    assert {key: ours.get(key) for key in wanted} == wanted
    assert set(ours) <= set(theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"compat": "0.10"}, {"cluster_size": 512}, {"cluster_size": "2M"}, {"refcount_bits": 1},
     {"lazy_refcounts": "on"}, {"compression_type": "zstd"}],
    ids=str,
)
def test_info(pair, options):
    pair.make(5 * MIB + 512, base_options=options, top_options=options, top=["write -P 1 0 64k"])
    for path in (pair.top, pair.base):
        result = run_instar("info", "--output", "json", path)
        assert result.rc == 0 and result.stderr == "", str(result)
        same_info(result.json, support.info(path))


def test_info_of_a_chain(pair):
    pair.make(top=["write -P 1 0 64k"])
    third = support.create(pair.dir / "third", backing="top.qcow2")
    result = run_instar("info", "--backing-chain", "--output", "json", third)
    assert result.rc == 0, str(result)
    theirs = support.info(third, "--backing-chain")
    assert [os.path.basename(image["filename"]) for image in result.json] == ["third", "top.qcow2", "base.qcow2"]
    for ours, their in zip(result.json, theirs, strict=True):
        same_info(ours, their)


def test_info_for_people(pair):
    pair.make(top=["write -P 1 0 64k"])
    text = run_instar("info", pair.top).stdout
    for line in ("file format: qcow2", "virtual size: 4 MiB (4194304 bytes)", "cluster_size: 65536",
                 "backing file format: qcow2"):
        assert line in text


def test_info_says_what_a_commit_means_for_the_image(pair):
    pair.make()
    assert "notes" not in run_instar("info", "--output", "json", pair.base).json
    assert "Notes:" not in run_instar("info", pair.base).stdout
    support.qemu_img("snapshot", "-c", "before the upgrade", pair.base)
    support.qemu_img("bitmap", "--add", pair.base, "daily")
    notes = run_instar("info", "--output", "json", pair.base).json["notes"]
    assert len(notes) == 2 and notes[0].startswith("1 internal snapshot: ") and "(before the upgrade)" in notes[0]
    assert notes[1].startswith("1 persistent bitmap: ")
    human = run_instar("info", pair.base).stdout.splitlines()
    assert human[-3:] == ["Notes:", *(f"    {note}" for note in notes)]
    verbose = run_instar("commit", "-v", pair.top)
    assert verbose.rc == 0
    assert all(f"instar: backing {pair.base}: {note}\n" in verbose.stderr for note in notes), str(verbose)


def listed(path):
    """Snapshots and bitmaps as `qemu-img info` has them: in JSON, and its lines for people."""
    theirs = support.info(path)
    lines = support.qemu_img("info", path).stdout.splitlines()
    begin = lines.index("Format specific information:")
    snapshots = lines[lines.index("Snapshot list:") if "Snapshot list:" in lines else begin : begin]
    return theirs.get("snapshots"), theirs["format-specific"]["data"].get("bitmaps"), snapshots


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_info_lists_snapshots_and_bitmaps(tmp_path, compat):
    path = support.create(tmp_path / "image.qcow2", 4 * MIB, compat=compat)
    for count in range(3):
        ours = run_instar("info", "--output", "json", path).json
        human = run_instar("info", path).stdout
        snapshots, bitmaps, lines = listed(path)
        assert ours.get("snapshots") == snapshots and ours["format-specific"]["data"].get("bitmaps") == bitmaps
        assert "\n".join(lines) in human and ("Snapshot list:" in human) == (count > 0)
        if bitmaps:
            assert f"name: {bitmaps[0]['name']}\n" in human
        support.qemu_img("snapshot", "-c", ["plain", "with spaces and more than sixteen"][count % 2], path)
        if compat == "1.1":
            support.qemu_img("bitmap", "--add", *(["--disable", "-g", "128k"] if count else []), path, f"daily-{count}")


def test_info_of_damaged_lists_is_an_answer(tmp_path):
    """What cannot be read is left out, and names are escaped."""
    path = support.create(tmp_path / "image.qcow2", 4 * MIB)
    support.qemu_img("snapshot", "-c", "ESC2J", path)
    support.qemu_img("bitmap", "--add", path, "ESC2J")
    path.write_bytes(path.read_bytes().replace(b"ESC2J", b"\x1b[2J\n"))
    human, ours = run_instar("info", path), run_instar("info", "--output", "json", path)
    assert human.rc == ours.rc == 0 and "\x1b" not in human.stdout + ours.stdout
    assert ours.json["snapshots"][0]["name"] == ours.json["format-specific"]["data"]["bitmaps"][0]["name"] == "\x1b[2J\n"
    image = qcow2_bytes.Image(path)
    header = bytearray(path.read_bytes())
    header[64:72] = (1 << 40).to_bytes(8, "big")  # the snapshot table, past the end
    path.write_bytes(header)
    ours = run_instar("info", "--output", "json", path)
    assert ours.rc == 0 and "snapshots" not in ours.json, str(ours)
    del image


def test_info_of_an_image_without_its_data_file(tmp_path):
    path = support.create(tmp_path / "image.qcow2", MIB, data_file=str(tmp_path / "data"))
    os.remove(tmp_path / "data")
    [note] = run_instar("info", "--output", "json", path).json["notes"]
    assert note.startswith("its file ") and "data" in note, note


def test_info_escapes_names(pair):
    pair.make()
    qcow2_bytes.Image(pair.top).set_backing(b"a\n\x1b[31mb")
    for output in ("human", "json"):
        result = run_instar("info", "--output", output, pair.top)
        assert result.rc == 0, str(result)
        assert "\x1b" not in result.stdout and "\n\x1b" not in result.stdout
    assert run_instar("info", "--output", "json", pair.top).json["backing-filename"].startswith("a")


def test_info_changes_nothing_and_reports_what_is_missing(pair, tmp_path):
    pair.make(top=["write -P 1 0 64k"])
    with support.untouched(pair.top, pair.base):
        assert run_instar("info", pair.top).rc == 0
    result = run_instar("info", tmp_path / "none")
    assert result.rc == 1 and "does not exist" in result.stderr, str(result)
    assert len(result.stderr.splitlines()) == 1


# --- create -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [("", "4M"), ("cluster_size=512", "1M"), ("cluster_size=2M", "3G"), ("compat=0.10", "4M"),
     ("compat=1.1,refcount_bits=1", "4M"), ("refcount_bits=64,cluster_size=4096", "100G"), ("", "1000000"), ("", "8T"),
     ("", "0")],
)
def test_create(tmp_path, options, size):
    path = tmp_path / "new.qcow2"
    result = run_instar("create", "-f", "qcow2", *(["-o", options] if options else []), path, size)
    assert result.rc == 0, str(result)
    support.assert_clean(path)
    theirs = support.create(tmp_path / "theirs.qcow2", size, **dict(o.split("=") for o in options.split(",") if o))
    ours, wanted = support.info(path), support.info(theirs)
    for key in ("virtual-size", "cluster-size", "format-specific", "format"):
        assert ours[key] == wanted[key]
    assert support.holds_no_clusters(path)
    if ours["virtual-size"]:
        support.qemu_io(path, f"read -P 0 0 {min(ours['virtual-size'], 64 * KIB)}", "write -P 1 0 512", "read -P 1 0 512")
        support.assert_clean(path)


def allocated(path):
    return os.stat(path).st_blocks * 512


def mapped(path, fmt="qcow2", block=1):
    """What `qemu-img map` says, without the places in the file: those are the program's to choose. Where clusters are shorter than
    a `block` of the file system, or the disk ends within one, qemu's are no holes there: then only what is allocated counts."""
    told = ("depth", "present", "compressed") if block > 1 else ("depth", "present", "compressed", "zero", "data")
    runs = []
    for entry in support.qemu_img("map", "-f", fmt, "--output", "json", path).json:
        kind = [entry[key] for key in told]
        if runs and runs[-1][0] == kind:
            runs[-1][1] += entry["length"]
        else:
            runs.append([kind, entry["length"]])
    return runs


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options", ["", "extended_l2=on", "extended_l2=on,cluster_size=16k", "cluster_size=512", "cluster_size=2M,refcount_bits=1",
                "compat=0.10"])
@pytest.mark.parametrize("size", ["9M", "3000320"])
def test_create_preallocated(tmp_path, options, preallocation, size):
    options = ",".join(filter(None, [options, f"preallocation={preallocation}"]))
    path = tmp_path / "new.qcow2"
    result = run_instar("create", "-q", "-f", "qcow2", "-o", options, path, size)
    assert result.rc == 0, str(result)
    theirs = support.create(tmp_path / "theirs.qcow2", size, **dict(o.split("=") for o in options.split(",")))
    support.assert_clean(path)
    ours, wanted = support.info(path), support.info(theirs)
    for key in ("virtual-size", "cluster-size", "format-specific", "format"):
        assert ours[key] == wanted[key]
    block = 4096 if ours["cluster-size"] == 512 or size == "3000320" else 1
    assert mapped(path, block=block) == mapped(theirs, block=block)
    least = ours["virtual-size"] if preallocation in ("falloc", "full") else 0
    assert least <= allocated(path) <= allocated(theirs) + 64 * KIB + ours["cluster-size"]
    support.assert_same_content(path, theirs)
    checked = run_instar("check", "-q", path)
    assert checked.rc == 0, str(checked)
    if preallocation != "off":
        before = path.stat().st_size
        support.qemu_io(path, "write -P 1 0 128k", "write -P 2 2M 1k", "read -P 1 64k 64k", "read -P 0 2050k 1k")
        assert path.stat().st_size == before, "a write into what is preallocated took new clusters"
        support.assert_clean(path)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_create_preallocated_overlay(pair, preallocation):
    """Subclusters show what lies below, although their clusters are allocated."""
    pair.make(base=["write -P 7 0 3M"])
    pair.top.unlink()
    options = f"extended_l2=on,preallocation={preallocation}"
    result = run_instar("create", "-q", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", pair.top)
    assert result.rc == 0, str(result)
    support.assert_clean(pair.top)
    support.assert_same_content(pair.top, pair.base)
    theirs = support.create(pair.dir / "theirs.qcow2", backing="base.qcow2", backing_fmt="qcow2", extended_l2="on",
                            preallocation=preallocation)
    assert mapped(pair.top) == mapped(theirs)
    support.qemu_io(pair.top, "write -P 9 1M 6k", "write -P 8 3M 512")
    flat = pair.dir / "flat.qcow2"
    support.qemu_img("convert", "-O", "qcow2", pair.top, flat)
    theirs.unlink()
    support.commit(pair.top)
    support.assert_same_content(flat, pair.base)
    support.assert_same_content(flat, pair.top)


@pytest.mark.parametrize(
    ("options", "words"),
    [("preallocation=full", "extended_l2=on"), ("extended_l2=on,compat=0.10", "compat=1.1"),
     ("extended_l2=on,cluster_size=8k", "16k"), ("preallocation=on", "off, metadata, falloc or full")])
def test_create_refuses_as_qemu_img(pair, options, words):
    pair.make()
    new = pair.dir / "new.qcow2"
    result = run_instar("create", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", new)
    assert result.rc == 1 and words in result.stderr and not new.exists(), str(result)
    theirs = support.run("qemu-img", "create", "-f", "qcow2", "-o", options, "-b", "base.qcow2", "-F", "qcow2", new)
    assert theirs.rc != 0


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_create_preallocated_raw(tmp_path, preallocation):
    path, theirs = tmp_path / "new.raw", tmp_path / "theirs.raw"
    result = run_instar("create", "-q", "-f", "raw", "-o", f"preallocation={preallocation}", path, "5M")
    assert result.rc == 0, str(result)
    support.create(theirs, "5M", fmt="raw", preallocation=preallocation)
    assert path.read_bytes() == theirs.read_bytes()
    if preallocation == "off":
        # qemu writes the first block to see whether it can.
        assert allocated(path) == 0
    else:
        assert mapped(path, "raw") == mapped(theirs, "raw") and allocated(path) == allocated(theirs)
    refused = run_instar("create", "-q", "-f", "raw", "-o", "preallocation=metadata", tmp_path / "no", "5M")
    assert refused.rc == 1 and "off, falloc or full" in refused.stderr


def test_create_overlay(pair):
    pair.make(base=["write -P 1 0 4M"])
    pair.top.unlink()
    result = run_instar("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", cwd=pair.dir)
    assert result.rc == 0, str(result)
    support.assert_clean(pair.top)
    support.assert_same_content(pair.top, pair.base)
    assert support.info(pair.top)["backing-filename"] == "base.qcow2"


def test_formatting_is_announced_after_the_refusals(tmp_path):
    new = tmp_path / "new"
    for args in (["-o", "cluster_size=1000", new, "4M"], [tmp_path / "no/such", "4M"], [tmp_path, "4M"]):
        result = run_instar("create", "-f", "qcow2", *args)
        assert result.rc == 1 and result.stdout == "", str(result)
    result = run_instar("create", "-f", "qcow2", new, "4M")
    assert result.rc == 0 and result.stdout.startswith(f"Formatting '{new}', fmt=qcow2 size=4194304"), str(result)
    with support.Holder(new):
        result = run_instar("create", "-f", "qcow2", new, "4M")
    assert (result.rc, result.stdout) == (1, "") and "ERROR_IMAGE_IN_USE" in result.stderr, str(result)


def test_create_keeps_what_is_there_if_asked_to(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_bytes(b"precious")
    link.symlink_to("nowhere")
    for path in (precious, link, tmp_path):
        result = run_instar("create", "--no-clobber", "-f", "qcow2", path, "4M")
        assert result.rc == 1 and result.stdout == "" and "--no-clobber" in result.stderr, str(result)
    assert precious.read_bytes() == b"precious" and not (tmp_path / "nowhere").exists()
    assert run_instar("create", "--no-clobber", "-f", "qcow2", tmp_path / "new", "4M").rc == 0
    # Without it, as qemu-img.
    assert run_instar("create", "-f", "qcow2", precious, "4M").rc == 0
    support.assert_clean(precious)


@pytest.mark.parametrize("args", [["-o", "cluster_size=1000"], ["-o", "nonesuch=1"], ["-o", "refcount_bits=3"]], ids=" ".join)
def test_create_refuses_bad_options(tmp_path, args):
    result = run_instar("create", "-f", "qcow2", *args, tmp_path / "new", "4M")
    assert result.rc in (1, 2) and result.stderr, str(result)
    assert list(tmp_path.iterdir()) == []


# --- plugins ----------------------------------------------------------------------------------------


def plugins(*args, env=None):
    result = run_instar("plugins", "--output", "json", *args, env=env)
    assert result.rc == 0, str(result)
    return result.json


def test_plugins():
    answer = plugins()
    assert re.fullmatch(r"\d+\.\d+\.\d+", answer["api-version"])
    loaded = {plugin["name"]: plugin for plugin in answer["plugins"]}
    assert {"source", "sink"} <= set(loaded["qcow2"]["roles"])
    assert loaded["qcow2"]["formats"] == ["qcow2"]
    assert os.path.isabs(loaded["qcow2"]["path"])
    assert "qcow2" in run_instar("plugins").stdout


def bad_plugin(directory, kind):
    """A file that must not be loaded, made from a good plugin."""
    good = next(p["path"] for p in plugins()["plugins"] if p["name"] == "qcow2")
    path = directory / f"libinstar_plugin_{kind.replace('-', '_')}.so"
    match kind:
        case "truncated":
            with open(good, "rb") as file:
                path.write_bytes(file.read(5000))
        case "cut-short":
            shutil.copyfile(good, path)
            os.truncate(path, path.stat().st_size - 4096)
        case "not-elf":
            path.write_text("#!/bin/sh\n")
        case "empty":
            path.touch()
        case "world-writable":
            shutil.copyfile(good, path)
            path.chmod(0o666)
        case "directory":
            path.mkdir()
        case "dangling":
            path.symlink_to("nowhere")
    if kind not in ("world-writable", "directory", "dangling"):
        path.chmod(0o644)
    return path


@pytest.mark.parametrize("kind", ["truncated", "cut-short", "not-elf", "empty", "world-writable", "directory", "dangling"])
def test_bad_plugin_does_not_stop_others(pair, tmp_path, kind):
    directory = tmp_path / "plugins"
    directory.mkdir(mode=0o755)
    path = bad_plugin(directory, kind)
    for args, env in ((["--plugin-dir", directory], None), ([], {"INSTAR_PLUGIN_PATH": str(directory)})):
        answer = plugins(*args, env=env)
        assert "qcow2" in [plugin["name"] for plugin in answer["plugins"]]
        assert str(path) not in [plugin["path"] for plugin in answer["plugins"]]
        reasons = {skipped["path"]: skipped["reason"] for skipped in answer["skipped"]}
        assert reasons.get(str(path)), answer["skipped"]
    pair.make(base=["write -P 9 0 4M"], top=["write -P 1 0 1M"])
    pair.check_commit("--plugin-dir", directory)


def test_directory_that_others_may_write(tmp_path):
    directory = tmp_path / "plugins"
    directory.mkdir()
    good = next(p["path"] for p in plugins()["plugins"] if p["name"] == "qcow2")
    shutil.copyfile(good, directory / "libinstar_plugin_other.so")
    directory.chmod(0o777)
    answer = plugins("--plugin-dir", directory)
    assert not [p for p in answer["plugins"] if p["path"].startswith(str(directory))]
    assert [s for s in answer["skipped"] if s["path"].startswith(str(directory))], answer["skipped"]


# --- what -v says -----------------------------------------------------------------------------------


def test_verbose(pair):
    pair.make(top=["write -P 1 0 1M"])
    result = pair.check_commit("-v")
    assert result.stdout == "Image committed.\n"
    assert "ring 3" in result.stderr
    assert re.search(r"\b\d+ exits", result.stderr), result.stderr
    assert str(pair.top) in result.stderr and str(pair.base) in result.stderr
    assert all(line.startswith("instar: ") for line in result.stderr.splitlines())


def test_exits_of_a_sequential_gibibyte(pair):
    pair.make(GIB, top=[f"write -P {1 + n} {n * 64}M 64M" for n in range(16)])
    result = support.commit(pair.top, "-v")
    exits = int(re.search(r"(\d+) exits", result.stderr).group(1))
    assert exits < 500, result.stderr
    support.qemu_io(pair.base, *[f"read -P {1 + n} {n * 64}M 64M" for n in range(16)])
    support.assert_clean(pair.base)
    support.assert_clean(pair.top)
    assert support.holds_no_clusters(pair.top)
