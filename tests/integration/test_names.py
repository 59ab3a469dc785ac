"""Which file a recorded name leads to, and which of them may be opened. What `qemu-img convert` reads through the chain before is
what the target has to read afterwards: a name that is followed otherwise than the kernel follows it shows."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import qcow2_bytes
import support
from support import KIB, MIB, qemu_img, qemu_io, refuse

MISSING = support.REPO / "tests/tools/missing_calls.py"


def image(path, *writes, backing=None, size="4M", fmt="qcow2", backing_fmt="qcow2", **options):
    """An image with data; the name of its backing is recorded as it is given, whatever it leads to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    support.create(path, size, fmt=fmt, **options)
    if backing is not None:
        qemu_img("rebase", "-u", "-b", backing, "-F", backing_fmt, path)
    if writes:
        # Not through the chain: `qemu-io` would have to open it.
        qemu_io(path, *writes, fmt=fmt)
    return path


def record(path, name, fmt="qcow2"):
    qemu_img("rebase", "-u", "-b", name, "-F", fmt, path)


def content(path, fmt="qcow2"):
    return support.content_hash(path, fmt)


def commits(top, target, *args, fmt="qcow2", cwd=None):
    """The commit succeeds, and the target reads what the overlay read through the chain."""
    wanted = content(top)
    result = support.run_instar("commit", *args, top, cwd=cwd)
    assert result.rc == 0, str(result)
    assert content(target, fmt) == wanted and content(top) == wanted
    return result


def refused(name, top, *args, files=(), mentions=()):
    """The commit is refused, and changes nothing; what it says."""
    refuse(name, top, *args, files=files, mentions=mentions)
    return support.run_instar("commit", *args, top).stderr


def advice(text, option):
    """The argument of an option that a message names."""
    return re.search(rf"{option} '([^']*)'", text)[1]


# --- names are followed as the kernel follows them --------------------------------------------------------


def test_up_again_behind_a_link(tmp_path):
    """`current/../base` is beside the link's target; another image of that name lies beside the overlay."""
    decoy = image(tmp_path / "vm/base", "write -P 0xaa 0 4M")
    real = image(tmp_path / "releases/base", "write -P 0xbb 0 4M")
    (tmp_path / "releases/42").mkdir()
    (tmp_path / "vm/current").symlink_to("../releases/42")
    top = image(tmp_path / "vm/top", backing="current/../base")
    qemu_io(top, "write -P 0x11 1M 64k")
    with support.untouched(decoy):
        result = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[decoy, real], mentions=["-b", "--allow-backing-dir"])
        commits(top, real, "-b", advice(result, "-b"))
        qemu_io(top, "write -P 0x12 2M 64k")
        commits(top, real, "--allow-backing-dir", advice(result, "--allow-backing-dir"))


def test_a_target_that_is_named_by_another_path(tmp_path):
    """What lies below the target is looked for beside the name that the chain has for it, whatever path `-b` gives."""
    base = image(tmp_path / "vm/base", "write -P 0xaa 0 4M")
    decoy = image(tmp_path / "templates/base", "write -P 0xbb 0 4M")
    mid = image(tmp_path / "templates/mid", backing="base")
    (tmp_path / "vm/mid").symlink_to("../templates/mid")
    top = image(tmp_path / "vm/top", backing="mid", cluster_size=4 * KIB)
    qemu_io(top, "write -P 0x11 1M 4k")
    with support.untouched(base, decoy):
        commits(top, tmp_path / "vm/mid", "-b", mid)
    qemu_io(tmp_path / "vm/mid", "read -P 0x11 1M 4k", "read -P 0xaa 1028k 60k")


def test_folders_of_links_to_one_another(tmp_path):
    """As libvirt's tests make them: every image is in a folder of its own, in which the one above has it as a link."""
    image(tmp_path / "a/a", "write -P 1 0 4M")
    for name, below in (("b", "a"), ("c", "b"), ("d", "c")):
        image(tmp_path / name / name, backing=f"../{below}/{below}")
        qemu_io(tmp_path / name / name, f"write -P {ord(name)} {ord(name) - 97}M 64k")
    links = tmp_path / "links"
    links.mkdir()
    for name in "abcd":
        (links / name).mkdir()
        (links / name / name).symlink_to(f"../../{name}/{name}")
    commits(links / "d/d", links / "c/c", "--allow-backing-dir", tmp_path)
    commits(links / "c/c", tmp_path / "a/a", "-b", tmp_path / "a/a", "--allow-backing-dir", tmp_path)


@pytest.mark.parametrize("kind", ["file", "device"])
def test_volumes_behind_links(tmp_path, request, kind):
    """`/dev/VG/LV -> ../dm-N`. Whoever names a volume allows the volumes of its group, and no other device."""
    dev, group = tmp_path / "dev", tmp_path / "dev/vg"
    group.mkdir(parents=True, mode=0o755)
    names = ["base", "mid", "top", "alien"]
    for number, name in enumerate(names):
        with (tmp_path / f"disk{number}").open("wb") as file:
            file.truncate(32 * MIB)
        if kind == "device":
            loop = attach(request, tmp_path / f"disk{number}")
            os.mknod(dev / f"dm-{number}", 0o600 | 0o060000, os.stat(loop).st_rdev)
        else:
            (tmp_path / f"disk{number}").rename(dev / f"dm-{number}")
        if name != "alien":
            (group / name).symlink_to(f"../dm-{number}")
    base, mid, top = (group / name for name in names[:3])
    image(base, "write -P 1 0 4M", size="16M")
    image(mid, backing="base", size="16M")
    qemu_io(mid, "write -P 2 2M 4M")
    image(top, backing="mid", size="16M")
    qemu_io(top, "write -P 3 4M 4M")
    alien = image(dev / "dm-3", size="16M")
    options = [] if kind == "device" else ["--allow-backing-dir", dev]
    if kind == "file":
        # Only devices are named so.
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base, mid], mentions=[f"--allow-backing-dir '{dev}'"])
    commits(top, mid, *options)
    qemu_io(top, "write -P 4 1M 4M")
    commits(top, mid, "-b", mid, *options)
    qemu_io(top, "write -P 5 3M 4M")
    commits(top, base, "-b", base, *options)
    mapped = support.run_instar("map", *options, top)
    assert mapped.rc == 0, str(mapped)
    if kind == "device":
        record(top, "../dm-3")
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[alien], mentions=[f"--allow-backing-dir '{dev}'"])
        # A file over volumes: the group is allowed.
        over = image(tmp_path / "vm/over", backing=str(mid), size="16M")
        qemu_io(over, "write -P 6 1M 64k")
        error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", over, files=[mid])
        assert advice(error, "--allow-backing-dir") == str(group)
        commits(over, mid, "--allow-backing-dir", group)
        # Links that others can make say nothing.
        record(top, "mid")
        group.chmod(0o777)
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[mid])


def attach(request, file, *options):
    """A loop device, detached at the end of the test."""
    made = support.run("losetup", "--find", "--show", *options, file)
    if made.rc != 0:
        pytest.skip("no loop devices here")
    device = made.stdout.strip()
    request.addfinalizer(lambda: support.run("losetup", "--detach", device))
    return device


def test_what_is_named_needs_no_further_word(tmp_path):
    base = image(tmp_path / "bases/base", "write -P 1 0 4M", size="8M", fmt="raw")
    disk = image(tmp_path / "disks/disk", backing=str(base), backing_fmt="raw", size="8M")
    qemu_io(disk, "write -P 2 1M 1M")
    top = image(tmp_path / "snapshots/top", backing=str(disk), size="8M")
    qemu_io(top, "write -P 3 1536k 100k")
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, "-b", base, files=[base, disk], mentions=["--allow-backing-dir"])
    commits(top, base, "-b", base, "--allow-backing-dir", advice(error, "--allow-backing-dir"), fmt="raw")


# --- names of local files behind a protocol --------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"@/base"}}',
        'json:{"file": {"driver": "file", "filename": "@/base"}}',
        'json:{"driver":"qcow2","file.driver":"file","file.filename":"@/base"}',
        "file:@/base",
        "file:base",
    ],
)
def test_local_files_behind_a_protocol(tmp_path, form):
    base = image(tmp_path / "vm/base", "write -P 1 0 4M")
    top = image(tmp_path / "vm/top", backing=form.replace("@", str(tmp_path / "vm")))
    qemu_io(top, "write -P 2 1M 64k", cwd=tmp_path / "vm")
    if form == "file:base":
        # QEMU begins at the working directory, and so does instar: elsewhere there is no such file, or not the right one.
        decoy = image(tmp_path / "base", "write -P 7 0 4M")
        with support.untouched(decoy, base, top):
            assert support.run_instar("commit", top, cwd=tmp_path).rc == 1
        assert support.run_instar("commit", top, cwd=tmp_path / "vm").rc == 0
        qemu_io(base, "read -P 2 1M 64k", "read -P 1 0 1M")
        return
    commits(top, base)
    assert support.run_instar("map", top).rc == 0
    info = support.run_instar("info", "--backing-chain", "--output", "json", top)
    assert info.rc == 0 and len(info.json) == 2, str(info)


def advised(command, new):
    """Run a command that a message advises."""
    words = command.replace("NEW", new).replace("FMT", "qcow2")
    assert words.startswith("instar ")
    return support.run("sh", "-c", f"{support.instar_binary()} {words.removeprefix('instar ')}")


@pytest.mark.parametrize(
    "name",
    ["nbd://localhost:10809/x", "nbd:localhost:10809", "C:\\VMs\\base", "rbd:pool/image", "http://localhost/x", "fat:rw:.",
     'json:{"driver":"file","filename":"top","filename":"base"}', "json:{bad"],
)
def test_what_is_no_local_file(tmp_path, name):
    """The advice is taken, and helps."""
    base = image(tmp_path / "base", "write -P 1 0 4M")
    top = image(tmp_path / "top", "write -P 2 1M 64k", backing="base")
    qcow2_bytes.Image(top).set_backing(name.encode())
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base], mentions=["rebase -u", top])
    assert "-b '" not in error and "--allow" not in error, error
    assert ("Windows" in error) == name.startswith("C:")
    command = re.search(r"`(instar rebase -u -b NEW -F FMT '.*')`", error)[1]
    assert advised(command, "base").rc == 0
    commits(top, base)


@pytest.mark.parametrize(
    ("option", "name"),
    [("offset", '{"driver":"raw","offset":1048576,"size":1048576,"file":{"driver":"file","filename":"@/base"}}'),
     ("backing", '{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"@/base"}}')],
)
def test_options_that_change_what_is_read(tmp_path, option, name):
    """Another name would make another disk of it, so that none is advised."""
    base = image(tmp_path / "base", "write -P 1 0 2M")
    top = image(tmp_path / "top", backing="base")
    qcow2_bytes.Image(top).set_backing(b"json:" + name.replace("@", str(tmp_path)).encode())
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base], mentions=[f"has the option '{option}'"])
    assert "rebase" not in error


def test_options_that_change_nothing_of_it(tmp_path):
    base = image(tmp_path / "base", "write -P 1 0 4M")
    top = image(tmp_path / "top", "write -P 2 1M 64k", backing="base")
    options = '"lazy-refcounts":true,"l2-cache-size":65536,"overlap-check":"none","pass-discard-request":true'
    name = f'json:{{"driver":"qcow2",{options},"file":{{"driver":"file","filename":"{base}"}}}}'
    qcow2_bytes.Image(top).set_backing(name.encode())
    commits(top, base)


@pytest.mark.parametrize("name", ["it's", "a';touch PWNED;'", "$(touch PWNED)`touch PWNED`", "new\nline"])
def test_advice_can_be_pasted_whatever_the_name_is(tmp_path, name):
    """An image chooses the names that advice repeats: for a shell they are one word, and nothing else."""
    base = image(tmp_path / name / "base", "write -P 1 0 4M")
    top = image(tmp_path / "vm/top", "write -P 2 1M 64k", backing=base)
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base])
    word = re.search(r"commit into it with -b (.*), or allow its directory", error)[1]
    wanted = content(top)
    script = f"{support.instar_binary()} commit -b {word} {top}"
    result = support.run("bash", "-c", script, cwd=tmp_path)
    assert result.rc == 0 and content(base) == wanted, str(result)
    assert not list(tmp_path.rglob("PWNED"))


def test_the_advice_for_a_name_through_proc_leads_on(tmp_path):
    base = image(tmp_path / "base", "write -P 1 0 4M")
    top = image(tmp_path / "top", "write -P 2 1M 64k", backing="base")
    qcow2_bytes.Image(top).set_backing(b"/proc/self/cwd/base")
    for options in ([], ["-b", base], ["--allow-backing-dir", tmp_path]):
        error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, *options, files=[base], mentions=["/proc"])
    command = re.search(r"`(instar rebase -u -b NEW -F FMT '.*')`", error)[1]
    assert advised(command, "base").rc == 0
    commits(top, base)


# --- what is not there ----------------------------------------------------------------------------------


def test_a_backing_that_is_gone(tmp_path):
    base = image(tmp_path / "base", "write -P 1 0 4M")
    top = image(tmp_path / "top", "write -P 2 1M 64k", backing="base")
    moved = tmp_path / "moved"
    base.rename(moved)
    error = refused("ERROR_BACKING_NOT_FOUND", top, files=[moved], mentions=["does not exist", base, f"'{top}' records it"])
    # Also for one that is named with -b: a message that names the place that is gone says how to record the other one.
    named = refused("ERROR_NOT_IN_CHAIN", top, "-b", moved, files=[moved], mentions=["immediate parent is base", "rebase -u"])
    command, also = (re.search(r"`(instar rebase -u -b NEW -F FMT '.*?')`", text)[1] for text in (error, named))
    assert command == also
    assert advised(command, "moved").rc == 0
    commits(top, moved)


@pytest.mark.parametrize("fmt", ["vmdk", "qcow"])
def test_a_backing_of_another_format_that_was_moved(tmp_path, fmt):
    base, top = tmp_path / f"base.{fmt}", tmp_path / f"top.{fmt}"
    support.create(base, 4 * MIB, fmt=fmt)
    support.qemu_io(base, "write -P 1 0 4M", fmt=fmt)
    support.create(top, None, fmt=fmt, backing=base.name, backing_fmt=fmt, cwd=tmp_path)
    support.qemu_io(top, "write -P 2 1M 64k", fmt=fmt)
    base.rename(tmp_path / f"moved.{fmt}")
    error = support.run_instar("commit", top).stderr
    command = re.search(r"`(instar rebase -u -b NEW -F [a-zA-Z]+ '.*')`", error)[1].replace("FMT", fmt)
    assert advised(command, f"moved.{fmt}").rc == 0
    assert support.run_instar("commit", "-f", fmt, top).rc == 0
    support.qemu_io(tmp_path / f"moved.{fmt}", "read -P 2 1M 64k", "read -P 1 0 1M", fmt=fmt)


def test_a_layer_below_that_is_gone_is_said_to_be_recorded_by_its_own_overlay(tmp_path):
    image(tmp_path / "base")
    mid = image(tmp_path / "mid", "write -P 1 0 64k", backing="base")
    top = image(tmp_path / "top", "write -P 2 1M 64k", backing="mid")
    (tmp_path / "base").unlink()
    for command in (["commit"], ["map"], ["info", "--backing-chain"]):
        error = support.run_instar(*command, top).stderr
        assert f"'{mid}' records it" in error and "rebase -u" in error, error


# --- what an image may not choose -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".bashrc", ".config/rc", "script", "odd", "way/rc"])
def test_what_only_the_operator_may_choose(tmp_path, name):
    home = tmp_path / "home"
    victim = home / name.replace("way/", ".config/")
    victim.parent.mkdir(parents=True)
    (home / "way").symlink_to(".config")
    victim.write_bytes(b"precious\n" * 4096 if name != "odd" else b"x" * 1000)
    if name == "script":
        victim.chmod(0o755)
    top = image(home / "top", size=f"{victim.stat().st_size // 512 * 512}")
    record(top, name, "raw")
    qemu_io(top, "write -P 9 0 512")
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[victim], mentions=["may not choose", "-b"])
    assert support.run_instar("commit", "-b", advice(error, "-b"), top).rc == 0
    assert victim.read_bytes()[:512] == b"\x09" * 512


def test_a_hidden_file_is_not_read_either(tmp_path):
    """What an ancestor holds ends up in the target."""
    secret = tmp_path / ".secret"
    secret.write_bytes(b"s" * MIB)
    mid = image(tmp_path / "mid", size="1M")
    record(mid, ".secret", "raw")
    top = image(tmp_path / "top", size="1M", cluster_size=4 * KIB)
    record(top, "mid")
    qemu_io(top, "write -P 9 0 4k")
    refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[mid, secret], mentions=["hidden", mid])
    assert support.run_instar("map", top).rc == 1


def test_a_flat_extent_is_no_script(tmp_path):
    """The same for the other files of an image that an overlay leads to."""
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    support.create(base, MIB, fmt="vmdk", subformat="monolithicFlat")
    support.create(top, backing="base.vmdk", backing_fmt="vmdk", fmt="vmdk")
    qemu_io(top, "write -P 9 0 64k", fmt="vmdk")
    flat = tmp_path / "base-flat.vmdk"
    flat.chmod(0o755)
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base, flat], mentions=["executable", "chmod a-x"])
    assert support.run("sh", "-c", re.search(r"`(chmod .*?)`", error)[1]).rc == 0
    with flat.open("ab") as file:
        file.write(b"#" * 100)
    error = refused("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[base, flat], mentions=["512"])
    assert support.run("sh", "-c", re.search(r"`(truncate .*?)`", error)[1]).rc == 0
    wanted = content(top, "vmdk")
    assert support.run_instar("commit", top).rc == 0 and content(base, "vmdk") == wanted


def test_a_device_that_is_mounted(tmp_path, request):
    """A recorded name does not choose a device that the kernel uses; with -b the operator does."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    device = attach(request, disk)
    node = tmp_path / "vm/node"
    node.parent.mkdir()
    os.mknod(node, 0o600 | 0o060000, os.stat(device).st_rdev)
    top = image(tmp_path / "vm/top", backing="node", backing_fmt="raw", size="64M")
    qemu_io(top, "write -P 9 32M 64k")
    if support.run("mkfs.ext4", "-q", device).rc != 0:
        pytest.skip("no mkfs.ext4")
    (tmp_path / "mnt").mkdir()
    if support.run("mount", device, tmp_path / "mnt").rc != 0:
        pytest.skip("may not mount")
    try:
        refuse("ERROR_WRITE_TARGET_NOT_ALLOWED", top, files=[disk], mentions=["mounted", "-b"])
    finally:
        support.run("umount", tmp_path / "mnt")
    # A mount namespace that another test has made meanwhile may have it mounted for as long as that runs.
    for _ in range(120):
        result = support.run_instar("commit", top)
        if result.rc == 0 or "in use by the kernel" not in result.stderr and "mounted" not in result.stderr:
            break
        time.sleep(1)
    assert result.rc == 0, str(result)
    assert disk.read_bytes()[32 * MIB : 32 * MIB + 64 * KIB] == b"\x09" * 64 * KIB


# --- nothing is opened that is no image ---------------------------------------------------------------------


def opens(log):
    """The files that were opened for reading or writing, by the calls in an strace log."""
    calls = [call for call in log.read_text(errors="replace").splitlines() if re.search(r"\bopen(at2?)?\(", call)]
    return [call for call in calls if "O_PATH" not in call]


@pytest.mark.parametrize("command", ["commit", "commit -b", "map", "info --backing-chain", "check", "create"])
@pytest.mark.parametrize("kind", ["fifo", "tty", "socket"])
def test_what_is_no_file_is_never_opened(tmp_path, command, kind):
    if shutil.which("strace") is None or support.run("strace", "-o", "/dev/null", "true").rc != 0:
        pytest.skip("strace is not installed, or may not trace")
    odd = tmp_path / "odd"
    match kind:
        case "fifo":
            os.mkfifo(odd)
        case "tty":
            os.mknod(odd, 0o600 | 0o020000, os.stat("/dev/tty").st_rdev)
        case "socket":
            os.mknod(odd, 0o600 | 0o140000)
    other = image(tmp_path / "other")
    top = image(tmp_path / "top", backing="odd")
    args = {
        "commit": ["commit", top],
        "commit -b": ["commit", "-b", other, top],
        "map": ["map", top],
        "info --backing-chain": ["info", "--backing-chain", top],
        "check": ["check", odd],
        "create": ["create", "-q", "-f", "qcow2", odd, "1M"],
    }[command]
    log = tmp_path / "strace"
    result = support.run("strace", "-f", "-qq", "-o", log, support.instar_binary(), *args)
    assert result.rc == 1 and len(result.stderr.splitlines()) == 1, str(result)
    assert opens(log) and not [call for call in opens(log) if "odd" in call], result.stderr


def test_the_recorded_parent_is_no_concern_of_a_file_that_is_named(tmp_path):
    """With -b, a recorded name that leads elsewhere is neither opened nor told about."""
    (tmp_path / "outside").mkdir()
    base = image(tmp_path / "vm/base")
    there = tmp_path / "outside/there"
    there.write_bytes(bytes(512))
    told = []
    for name in ("there", "gone0"):
        top = image(tmp_path / "vm/top", backing=f"../outside/{name}")
        told.append(support.run_instar("commit", "-b", base, top).stderr.replace(name, ""))
    assert told[0] == told[1] and "immediate parent" not in told[0].split(":")[0]


# --- directories are opened once ----------------------------------------------------------------------------

RENAME_EXCHANGE, AT_FDCWD = 2, -100


def test_a_directory_that_is_exchanged_for_a_link(tmp_path):
    """Whoever may rename the overlay's directory does not choose the file that is written."""
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    image(shared / "vm/base", "write -P 1 0 1M", size="1M", fmt="raw")
    top = image(shared / "vm/top", backing="base", backing_fmt="raw", size="1M")
    qemu_io(top, "write -P 0x41 0 64k")
    overlay = top.read_bytes()
    shutil.copytree(shared / "vm", victim)
    (victim / "top").unlink()
    (shared / "link").symlink_to(victim)
    libc, stop = ctypes.CDLL(None, use_errno=True), threading.Event()
    names = [os.fsencode(shared / name) for name in ("vm", "link")]
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) != 0:
        pytest.skip("this file system cannot exchange names")

    def exchange():
        while not stop.is_set():
            libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)

    thread = threading.Thread(target=exchange)
    directory = os.open(shared / "vm" if not (shared / "vm").is_symlink() else shared / "link", os.O_PATH)
    thread.start()
    done = 0
    try:
        with support.untouched(victim / "base"):
            for _ in range(60):
                file = os.open("top", os.O_RDWR, dir_fd=directory)
                os.pwrite(file, overlay, 0)
                os.ftruncate(file, len(overlay))
                os.close(file)
                done += support.run_instar("commit", shared / "vm/top").rc == 0
    finally:
        stop.set()
        thread.join()
    assert sorted(os.listdir(victim)) == ["base"]
    assert done, "no commit came to its end"


# --- kernels and containers that lack a call -------------------------------------------------------------

#: Calls that came to Linux after 3.10, by their numbers on x86-64.
NEWER = {
    "openat2": 437, "statx": 332, "copy_file_range": 326, "close_range": 436, "faccessat2": 439, "clone3": 435, "preadv2": 327,
    "renameat2": 316, "getrandom": 318, "memfd_create": 319, "membarrier": 324, "rseq": 334, "seccomp": 317,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
}

#: What a process sandbox does not do without: memory and text, seccomp, and a Landlock that is there has to work.
NEEDED_BY_THE_PROCESS = {"memfd_create", "seccomp", "landlock_restrict_self", "all"}


@pytest.mark.parametrize("call", [*NEWER, "all"])
@pytest.mark.parametrize("errno", [38, 1], ids=["ENOSYS", "EPERM"])
def test_a_kernel_without(tmp_path, call, errno):
    base = image(tmp_path / "base", "write -P 1 0 16M", size="32M")
    top = image(tmp_path / "top", "write -P 2 1M 8M", backing="base", size="32M")
    if call == "all" and errno == 1:
        # The C library takes clone3 for refused then, and starts no thread: not what this test is about.
        numbers = [number for name, number in NEWER.items() if name not in ("clone3", "getrandom")]
    else:
        numbers = list(NEWER.values()) if call == "all" else [NEWER[call]]
    wanted = content(top)

    def run(*args):
        return support.run(sys.executable, MISSING, str(errno), ",".join(map(str, numbers)), support.instar_binary(), *args)

    result = run("commit", top)
    if result.rc == 77:
        pytest.skip("no filter can be made here")
    in_sandbox = [["map", top], ["check", top]]
    if support.SANDBOX == "process" and call in NEEDED_BY_THE_PROCESS:
        # It is what keeps the guest in, and not optional there.
        with support.untouched(base, top):
            for args in (["commit", top], *in_sandbox):
                done = run(*args)
                assert "ERROR_SANDBOX_UNUSABLE" in done.stderr and done.stdout == "", str(done)
    else:
        assert result.rc == 0, str(result)
        assert content(base) == wanted and content(top) == wanted
        for args in in_sandbox:
            done = run(*args)
            assert done.rc == 0, str(done)
    for args in (["info", "--backing-chain", top], ["create", "-q", "-f", "qcow2", tmp_path / "new", "1M"]):
        done = run(*args)
        assert done.rc == 0, str(done)
    doctor = run("doctor", "--output", "json")
    parts = {part["part"]: part["state"] for part in doctor.json["parts"]} if doctor.stdout else {}
    lacking = {"seccomp": "seccomp", "landlock_create_ruleset": "landlock", "landlock_add_rule": None}
    if lacking.get(call):
        assert parts.get(lacking[call]) != "ok", doctor.stdout


def test_the_commands_use_no_openat2(tmp_path):
    if shutil.which("strace") is None or support.run("strace", "-o", "/dev/null", "true").rc != 0:
        pytest.skip("strace is not installed, or may not trace")
    image(tmp_path / "base")
    top = image(tmp_path / "top", "write -P 2 1M 64k", backing="base")
    log = tmp_path / "strace"
    done = subprocess.run(["strace", "-f", "-qq", "-o", log, support.instar_binary(), "commit", top], check=False, capture_output=True)
    assert done.returncode == 0 and "openat2(" not in log.read_text(errors="replace")
