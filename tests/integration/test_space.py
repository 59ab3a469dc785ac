"""A full disk: noticed before the first change where it can be computed, survived where it cannot."""

from __future__ import annotations

import json
import os
import re

import pytest
import support
from support import MIB

BECOME_ROOT = [] if os.geteuid() == 0 else ["--map-root-user"]

# A small file system of its own, the two images on it, and what became of them.
SCRIPT = """
set -e
mount -t tmpfs -o size="$3" none "$2"
cp "$1"/top "$1"/base "$2"
sha256sum "$2"/base "$2"/top
status=0; "$0" commit $4 "$2"/top || status=$?
echo "status $status"
sha256sum "$2"/base "$2"/top
cp "$2"/base "$1"/after
"""


def on_a_disk_of(size, tmp_path, *options):
    """Exit status, what was printed on stderr, and whether the images are as they were."""
    place = tmp_path / "place"
    place.mkdir(exist_ok=True)
    result = support.run(
        "unshare", *BECOME_ROOT, "--mount", "sh", "-c", SCRIPT, support.instar_binary(), tmp_path, place, size, " ".join(options)
    )
    assert result.rc == 0, str(result)
    hashes = re.findall(r"^[0-9a-f]{64}", result.stdout, re.MULTILINE)
    status = int(re.search(r"status (\d+)", result.stdout)[1])
    return status, result.stderr, hashes[:2] == hashes[2:]


@pytest.fixture(params=["qcow2", "vmdk"])
def images(request, tmp_path):
    fmt = request.param
    support.create(tmp_path / "base", 16 * MIB, fmt=fmt)
    support.qemu_io(tmp_path / "base", "write -P 1 0 1M", fmt=fmt)
    support.create(tmp_path / "top", backing="base", backing_fmt=fmt, fmt=fmt, cwd=tmp_path)
    support.qemu_io(tmp_path / "top", "write -P 2 2M 6M", fmt=fmt)
    return fmt


def test_it_is_noticed_before_the_first_change(images, tmp_path):
    """Data of 6 MiB, and 3 MiB of space for it."""
    for options in ([], ["--dry-run"]):
        status, stderr, untouched = on_a_disk_of("11M", tmp_path, *options)
        assert status == 1 and untouched, stderr
        assert len(stderr.splitlines()) == 1 and "base'" in stderr and "nothing was changed" in stderr, stderr
        needed, free = map(int, re.search(r"needs (\d+) bytes(?: \([^)]+\))? more of the file system, which has (\d+) bytes(?: \([^)]+\))? free", stderr).groups())
        assert 6 * MIB <= needed < 7 * MIB and 2 * MIB < free < 4 * MIB


def test_a_measurement_tells_what_is_lacking(images, tmp_path):
    """Who measures wants the figures, above all where there is too little space."""
    (tmp_path / "images").mkdir()
    (tmp_path / "place").mkdir()
    for name in ("base", "top"):
        (tmp_path / name).rename(tmp_path / "images" / name)
    command = ["measure", "--commit", "--output", "json", "top"]
    result = support.run(
        "unshare", *BECOME_ROOT, "--mount", "sh", "-c", ANY, support.instar_binary(), tmp_path / "images", tmp_path / "place", "11M", *command
    )
    assert result.rc == 0 and "status 0" in result.stdout, str(result)
    measured = json.loads(re.search(r"^\{.*?^\}", result.stdout, re.MULTILINE | re.DOTALL)[0])
    assert 2 * MIB < measured["lacking"] < 5 * MIB and 2 * MIB < measured["free"] < 4 * MIB, measured


def test_what_fits_is_committed(images, tmp_path):
    expected = support.content_hash(tmp_path / "top", images)
    status, stderr, _ = on_a_disk_of("16M", tmp_path)
    assert status == 0, stderr
    assert support.content_hash(tmp_path / "after", images) == expected


def test_what_is_there_already_needs_no_space(tmp_path):
    """Clusters that the base has are written in place, however full the disk is."""
    support.create(tmp_path / "base", 16 * MIB)
    support.qemu_io(tmp_path / "base", "write -P 1 0 6M")
    support.create(tmp_path / "top", backing="base", cwd=tmp_path)
    support.qemu_io(tmp_path / "top", "write -P 2 0 6M")
    expected = support.content_hash(tmp_path / "top")
    status, stderr, _ = on_a_disk_of("13M", tmp_path)
    assert status == 0, stderr
    assert support.content_hash(tmp_path / "after") == expected


def test_holes_need_no_space(tmp_path):
    """Clusters of an overlay that were allocated in advance, and never written, hold no data."""
    support.create(tmp_path / "base", 64 * MIB)
    support.create(tmp_path / "top", backing="base", cwd=tmp_path, preallocation="metadata", extended_l2="on")
    support.qemu_io(tmp_path / "top", "write -P 2 0 1M")
    expected = support.content_hash(tmp_path / "top")
    status, stderr, _ = on_a_disk_of("9M", tmp_path)
    assert status == 0, stderr
    assert support.content_hash(tmp_path / "after") == expected


# As above, on a file system of which nothing is known before: the disk fills up in the middle.
OVERLAID = SCRIPT.replace(
    'cp "$1"/top "$1"/base "$2"',
    'mkdir "$2"/upper "$2"/work "$2"/lower "$2"/merged; here="$2"\n'
    'mount -t overlay -o lowerdir="$2"/lower,upperdir="$2"/upper,workdir="$2"/work none "$2"/merged\n'
    'set -- "$1" "$2"/merged "$3" "$4"; cp "$1"/top "$1"/base "$2"',
).replace('cp "$2"/base "$1"/after', 'df --output=avail -B1 "$here" | tail -n 1; cp "$2"/base "$2"/top "$1"/after')


def test_what_was_written_in_vain_is_given_back(tmp_path):
    """The overlay is complete, the disk is no fuller than before, and the message says so."""
    support.create(tmp_path / "base", 16 * MIB)
    support.qemu_io(tmp_path / "base", "write -P 1 0 1M")
    support.create(tmp_path / "top", backing="base", cwd=tmp_path)
    support.qemu_io(tmp_path / "top", "write -P 2 2M 6M")
    expected = support.content_hash(tmp_path / "top")
    (tmp_path / "after").mkdir()
    (tmp_path / "place").mkdir()
    result = support.run(
        "unshare", *BECOME_ROOT, "--mount", "sh", "-c", OVERLAID, support.instar_binary(), tmp_path, tmp_path / "place", "11M", ""
    )
    if "wrong fs type" in result.stderr or "mount" in result.stderr.split("instar")[0]:
        pytest.skip(f"no overlay file system here: {result.stderr}")
    assert result.rc == 0 and "status 1" in result.stdout and "No space left" in result.stderr, str(result)
    assert "the overlay is intact" in result.stderr, str(result)
    # 11 MiB less the two images; what was written of the 6 MiB is free again.
    assert int(result.stdout.split()[-1]) > 2 * MIB, str(result)
    after = tmp_path / "after"
    assert (after / "base").stat().st_size == (tmp_path / "base").stat().st_size
    support.assert_clean(after / "base")
    assert support.content_hash(after / "top") == expected


# As the first one, for any command on copies of all files, in that directory.
ANY = """
set -e
binary=$0; from=$1; place=$2; size=$3; shift 3
mount -t tmpfs -o size="$size" none "$place"
cp --sparse=always "$from"/* "$place"
cd "$place"
sha256sum *
status=0; "$binary" "$@" || status=$?
echo "status $status"
sha256sum *
"""


def run_on_a_disk_of(size, tmp_path, *command):
    """Exit status, what was printed on stderr, and whether all files are as they were; the images are in `images`."""
    (tmp_path / "place").mkdir(exist_ok=True)
    result = support.run(
        "unshare", *BECOME_ROOT, "--mount", "sh", "-c", ANY, support.instar_binary(), tmp_path / "images", tmp_path / "place", size, *command
    )
    assert result.rc == 0, str(result)
    before, after = (re.findall(r"^[0-9a-f]{64}.*$", part, re.MULTILINE) for part in re.split(r"status \d+\n", result.stdout))
    return int(re.search(r"status (\d+)", result.stdout)[1]), result.stderr, before == after


def noticed(result, least, most):
    status, stderr, untouched = result
    assert status == 1 and untouched, stderr
    assert len(stderr.splitlines()) == 1 and "nothing was changed" in stderr and "ERROR_NO_SPACE" in stderr, stderr
    needed = int(re.search(r"needs (\d+) bytes(?: \([^)]+\))? more of the file system, which has \d+ bytes(?: \([^)]+\))? free", stderr)[1])
    assert least <= needed <= most, stderr


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("fmt", ["raw", "qcow2", "vdi", "vhdx", "vmdk"])
def test_a_preallocation_that_cannot_be_is_noticed(fmt, mode, tmp_path):
    (tmp_path / "images").mkdir()
    image = tmp_path / "images/image"
    assert support.run_instar("create", "-f", fmt, image, "8M").rc == 0
    command = ["resize", "-f", fmt, f"--preallocation={mode}", "image"]
    for options in ([], ["--dry-run"]):
        noticed(run_on_a_disk_of("20M", tmp_path, *command, "40M", *options), 32 * MIB, 36 * MIB)
    # What fits is done, and so is what takes no space. A block of a VHDX has 32 MiB, and room for all of them.
    status, stderr, _ = run_on_a_disk_of("60M" if fmt == "vhdx" else "20M", tmp_path, *command, "12M")
    assert status == 0, stderr
    status, stderr, _ = run_on_a_disk_of("20M", tmp_path, "resize", "-f", fmt, "image", "40M")
    assert status == 0, stderr


def bases(tmp_path):
    """`old` and `new`, which differ in 6 MiB, and `top` over `old`."""
    (tmp_path / "images").mkdir()
    folder = tmp_path / "images"
    for name in ("old", "new"):
        support.create(folder / name, 16 * MIB)
    support.qemu_io(folder / "old", "write -P 1 2M 6M")
    support.create(folder / "top", backing="old", cwd=folder)
    return folder


def test_a_rebase_that_does_not_fit_is_noticed(tmp_path):
    bases(tmp_path)
    command = ["rebase", "-b", "new", "-F", "qcow2", "top"]
    for options in ([], ["--dry-run"]):
        noticed(run_on_a_disk_of("10M", tmp_path, *command, *options), 6 * MIB, 7 * MIB)
    status, stderr, _ = run_on_a_disk_of("16M", tmp_path, *command)
    assert status == 0, stderr


def test_an_adoption_that_does_not_fit_is_noticed(tmp_path):
    (bases(tmp_path) / "new").unlink()
    command = ["commit", "--by-adoption", "-b", "old", "top"]
    noticed(run_on_a_disk_of("10M", tmp_path, *command), 6 * MIB, 7 * MIB)
    status, stderr, _ = run_on_a_disk_of("16M", tmp_path, *command)
    assert status == 0, stderr


def test_a_disk_that_is_too_full_for_a_preallocation(tmp_path):
    """On a file system of which nothing is known: it is asked before the first change."""
    (tmp_path / "after").mkdir()
    (tmp_path / "place").mkdir()
    support.create(tmp_path / "top", 8 * MIB)
    support.qemu_io(tmp_path / "top", "write -P 1 0 1M")
    support.create(tmp_path / "base", MIB)
    script = OVERLAID.replace('"$0" commit $4 "$2"/top', '"$0" resize --preallocation=full "$2"/top 40M')
    arguments = [support.instar_binary(), tmp_path, tmp_path / "place", "12M", ""]
    result = support.run("unshare", *BECOME_ROOT, "--mount", "sh", "-c", script, *arguments)
    if "wrong fs type" in result.stderr or "mount" in result.stderr.split("instar")[0]:
        pytest.skip(f"no overlay file system here: {result.stderr}")
    assert result.rc == 0 and "status 1" in result.stdout and "ERROR_NO_SPACE" in result.stderr, str(result)
    assert "nothing was changed" in result.stderr, str(result)
    after = tmp_path / "after/top"
    assert support.virtual_size(after) == 8 * MIB
    assert after.stat().st_size == (tmp_path / "top").stat().st_size
    support.assert_clean(after)


# What a resize needs is not known beforehand of the file system that lies over that of `place`; `$4` are its words.
OVERLAID_RESIZE = """
set -e
mount -t tmpfs -o size="$3" none "$2"
mkdir "$2"/lower "$2"/upper "$2"/work "$2"/images
cp --sparse=always "$1"/* "$2"/lower
mount -t overlay -o lowerdir="$2"/lower,upperdir="$2"/upper,workdir="$2"/work none "$2"/images
cd "$2"/images
# Into the upper directory, where it is written.
for file in *; do touch "$file"; done
before=$(stat -f -c %f .); sha256sum *
status=0; "$0" resize $4 || status=$?
echo "status $status"
sha256sum *; echo "took $(( (before - $(stat -f -c %f .)) * $(stat -f -c %S .) ))"
"""

GROWS = {
    "raw": ["raw"], "qcow": ["qcow"], "qcow2": ["qcow2"], "vdi": ["vdi"], "vhdx": ["vhdx"], "vhd": ["vpc"], "vhd-fixed": ["vpc", "subformat=fixed"],
    "parallels": ["parallels"], "vmdk": ["vmdk"], "vmdk-flat": ["vmdk", "subformat=monolithicFlat"],
    "vmdk-split": ["vmdk", "subformat=twoGbMaxExtentSparse"],
}


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("kind", GROWS)
def test_a_resize_whose_space_is_not_there_changes_nothing(kind, mode, tmp_path):
    """Whatever the format: no image of the new size that was not closed, no space that is gone."""
    fmt, *options = GROWS[kind]
    (tmp_path / "place").mkdir()
    (tmp_path / "images").mkdir()
    image = tmp_path / "images/image.x"
    support.create(image, 4 * MIB, fmt=fmt, **dict(option.split("=") for option in options))
    support.qemu_io(image, "write -P 1 0 1M", fmt=fmt)

    def run(size):
        words = f"-f {fmt} --preallocation={mode} image.x 36M"
        result = support.run("unshare", *BECOME_ROOT, "--mount", "sh", "-c", OVERLAID_RESIZE, support.instar_binary(),
                             tmp_path / "images", tmp_path / "place", size, words)
        if "wrong fs type" in result.stderr or "mount" in result.stderr.split("instar")[0]:
            pytest.skip(f"no overlay file system here: {result.stderr}")
        assert result.rc == 0, str(result)
        before, after = (re.findall(r"^[0-9a-f]{64}.*$", part, re.MULTILINE) for part in re.split(r"status \d+\n", result.stdout))
        return int(re.search(r"status (\d+)", result.stdout)[1]), before == after, int(result.stdout.split()[-1]), str(result)

    status, untouched, took, said = run("30M")
    assert status == 1 and untouched and took <= 64 * 1024, said
    assert "ERROR_NO_SPACE" in said and "nothing was changed" in said, said
    # What fits is done, and takes what it is to take, and no more.
    status, untouched, took, said = run("60M")
    assert status == 0 and not untouched and 31 * MIB <= took <= 36 * MIB, said
