"""Plugin contract 1.0, for ever: a plugin that was built with the crates of that time loads, and does all that it did then.

The crates are frozen in tests/compat/plugin-api-1.0, with the plugin slate, which uses all that they offer. It is built as a
third party builds it: in its own workspace, with its own lock file. A second build, of a contract that has grown in a way
that the program under test has never heard of, has to do the same.
"""

from __future__ import annotations

import fcntl
import json
import random

import pytest
import slate_bytes
import support
from slate_bytes import CLUSTER
from support import MIB, REPO

FROZEN = REPO / "tests" / "compat" / "plugin-api-1.0"
LIBRARY = "libinstar_plugin_slate.so"
# Not a multiple of a cluster.
SIZE = 5 * MIB + 512
#: How a later contract may differ: a function more in each table. File, text, and what stands in its place.
GROWTH = [
    ("plugin-api/Cargo.toml", 'version = "1.0.0"', 'version = "1.1.0"'),
    ("plugin-api/src/v1.rs", "\n}\n\nimpl RootModule",
     '\n    /// More.\n    #[sabi(missing_field(option))]\n    pub more: extern "C" fn(number: u64) -> u64,\n}\n\n'
     'extern "C" fn more(number: u64) -> u64 {\n    number\n}\n\nimpl RootModule'),
    ("plugin-api/src/v1.rs", "notes: notes::<P>,", "notes: notes::<P>,\n            more,"),
    ("guest/abi/src/module.rs", "MODULE_ABI_MINOR: u32 = 0;", "MODULE_ABI_MINOR: u32 = 1;"),
    *(("guest/abi/src/module.rs", f"\n}}\n\nimpl {table}",
       f'\n    /// More.\n    pub more: Option<extern "C" fn(number: u64) -> u64>,\n}}\n\nimpl {table}') for table in ("SourceOps", "SinkOps")),
    *((f"guest/sdk/src/ffi/{role}_shim.rs", f"\n    }}\n}}\n\n/// The open {role}",
       f'\n        more: Some(more),\n    }}\n}}\n\nextern "C" fn more(number: u64) -> u64 {{\n    number\n}}\n\n/// The open {role}')
      for role in ("source", "sink")),
]

#: From a content's number to the next one that a child with the number 1 gives it.
NEXT = 1 + (1 << 16)


def build(source, tmp_path_factory, *options):
    """A directory with the one library that `cargo build` makes of it."""
    directory = tmp_path_factory.mktemp("plugins")
    support.build_plugin(source, LIBRARY, directory, *options, "--package", "instar-plugin-slate")
    return directory


def grown():
    """The frozen sources, grown; files that are as they have to be stay, so that they are not compiled again."""
    folder = REPO / "target" / "grown-contract"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in FROZEN.rglob("*"):
            name = path.relative_to(FROZEN)
            # Its version of the contract is not the one that is locked.
            if path.is_dir() or name.parts[0] == "target" or name.name == "Cargo.lock" and (folder / name).exists():
                continue
            text = path.read_text()
            for _, old, new in (change for change in GROWTH if change[0] == name.as_posix()):
                assert text.count(old) == 1, (name, old)
                text = text.replace(old, new)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists() or (folder / name).read_text() != text:
                (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    return build(FROZEN, tmp_path_factory, "--locked")


@pytest.fixture(scope="module")
def later_plugins(tmp_path_factory):
    return build(grown(), tmp_path_factory)


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


def test_it_is_listed(plugins):
    listed = instar(plugins, "plugins", "--output", "json").json
    [plugin] = [plugin for plugin in listed["plugins"] if plugin["name"] == "slate"]
    assert plugin["api-version"] == "1.0.0"
    assert plugin["roles"] == ["source", "sink", "create"] and "tablet" in plugin["formats"]
    assert not listed["skipped"]


def test_info(plugins, tmp_path):
    base = slate(plugins, tmp_path / "base.slate", 1, "-o", "content_id=41,reserve=on")
    assert base.stat().st_size >= 2 * CLUSTER
    top = tmp_path / "top.slate"
    instar(plugins, "create", "-f", "tablet", "-b", base.name, "-F", "slate", top)
    shown = instar(plugins, "info", "--output", "json", top).json
    assert (shown["format"], shown["virtual-size"], shown["cluster-size"]) == ("slate", SIZE, CLUSTER)
    assert (shown["backing-filename"], shown["backing-filename-format"]) == (base.name, "slate")
    parent = {"id": 41, "announced": False, "names": [base.name]}
    assert shown["format-specific"]["data"] == {"content-id": 1, "parent": parent}
    assert "notes" not in shown
    slate_bytes.put_names(top, "elsewhere.slate", base.name)
    shown = instar(plugins, "info", "--output", "json", top).json
    assert shown["notes"] == ["its parent may have 2 names"]
    assert shown["format-specific"]["data"]["parent"]["names"] == ["elsewhere.slate", base.name]


def test_options_that_make_no_sense(plugins, tmp_path):
    for option, reason in [("colour=red", 'unknown option "colour"'), ("content_id=x", "content_id must be a number")]:
        path = tmp_path / "new.slate"
        refused = support.run_instar("create", "--plugin-dir", plugins, "-f", "slate", "-o", option, path, "1M")
        support.assert_refused(refused, "ERROR_UNSUPPORTED_FORMAT", reason)
        assert not path.exists()


def slate_into_slate(plugins, tmp_path):
    """Both roles, `read`, `next_identity` and `follow_parent`; twice, with a layer below that is read through."""
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
        # Both say that it is the next content, and nothing is announced any more.
        assert slate_bytes.ids(top)[1:] == (slate_bytes.ids(base)[0], False) == (1 + (seed - 3) * NEXT, False)
    assert slate_bytes.content(lowest) == below
    return lowest, base, top


def test_slate_into_slate(plugins, tmp_path):
    slate_into_slate(plugins, tmp_path)


def test_another_parent_is_refused_unless_it_was_announced(plugins, tmp_path):
    lowest, base, top = slate_into_slate(plugins, tmp_path)
    slate_bytes.put(top, clusters(7))
    content, recorded, _ = slate_bytes.ids(top)
    below = slate_bytes.content(lowest)
    before = slate_bytes.content(top, slate_bytes.content(base, below))
    # A commit was interrupted before the parent got the identity that was announced ...
    slate_bytes.put_ids(top, content, recorded + NEXT, True)
    instar(plugins, "map", "--output", "json", top)
    # ... and here, nobody announced it.
    slate_bytes.put_ids(top, content, recorded + NEXT, False)
    with support.untouched(base, top):
        refused = support.run_instar("commit", "--plugin-dir", plugins, top)
    support.assert_refused(refused, "ERROR_PARENT_MISMATCH")
    slate_bytes.put_ids(top, content, recorded + NEXT, True)
    instar(plugins, "commit", top)
    assert slate_bytes.content(base, below) == before
    assert slate_bytes.ids(top) == (content, recorded + NEXT, False) and slate_bytes.ids(base)[0] == recorded + NEXT


def test_a_parent_has_several_names(plugins, tmp_path):
    base = slate(plugins, tmp_path / "base.slate", 1)
    top = tmp_path / "top.slate"
    instar(plugins, "create", "-f", "slate", "-b", base.name, "-F", "slate", top)
    slate_bytes.put(top, clusters(2))
    slate_bytes.put_names(top, "nowhere.slate", "nor/here.slate", base.name)
    before = slate_bytes.content(top, slate_bytes.content(base))
    instar(plugins, "commit", top)
    assert slate_bytes.content(base) == before and not any(slate_bytes.entries(top))


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
    if fmt == "qcow2":
        support.assert_clean(base)


def a_format_of_today_into_slate(plugins, tmp_path):
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
    assert support.holds_no_clusters(top)


def test_a_format_of_today_into_slate(plugins, tmp_path):
    a_format_of_today_into_slate(plugins, tmp_path)


def test_measure(plugins, tmp_path):
    empty = instar(plugins, "measure", "-O", "slate", "--output", "json", "--size", str(SIZE)).json
    assert empty == {"required": CLUSTER, "fully-allocated": CLUSTER + 81 * CLUSTER}
    # What was measured is what a new image becomes, and what one becomes that everything is written to.
    new = tmp_path / "new.slate"
    instar(plugins, "create", "-f", "slate", new, str(SIZE))
    assert new.stat().st_size == empty["required"]
    slate_bytes.put(new, {index: bytes([index]) * CLUSTER for index in range(81)})
    assert new.stat().st_size == empty["fully-allocated"]
    source = tmp_path / "source.raw"
    source.write_bytes(b"\0" * SIZE)
    support.qemu_io(source, "write -P 5 1M 1M", fmt="raw")
    held = instar(plugins, "measure", "-f", "raw", "-O", "slate", "--output", "json", source).json
    assert held["fully-allocated"] == empty["fully-allocated"] and held["required"] >= CLUSTER + MIB
    # What an image holds is known from its driver: zeroes take no room in a new one.
    sparse = slate(plugins, tmp_path / "sparse.slate", 1)
    found = instar(plugins, "measure", "-O", "slate", "--output", "json", sparse).json_of_sandbox
    taking = sum(entry > 1 for entry in slate_bytes.entries(sparse))
    assert found == {**empty, "required": CLUSTER + taking * CLUSTER} and 10 < taking < 30


def test_compare(plugins, tmp_path):
    base = slate(plugins, tmp_path / "base.slate", 11)
    top = tmp_path / "top.slate"
    instar(plugins, "create", "-f", "slate", "-b", base, "-F", "slate", top)
    slate_bytes.put(top, clusters(12))
    mirror = tmp_path / "mirror.raw"
    mirror.write_bytes(slate_bytes.content(top, slate_bytes.content(base)))
    qcow2 = tmp_path / "mirror.qcow2"
    support.qemu_img("convert", "-f", "raw", "-O", "qcow2", mirror, qcow2)
    for other, options in [(mirror, ["-F", "raw"]), (qcow2, [])]:
        assert "identical" in instar(plugins, "compare", *options, top, other).stdout
    # A byte of an encoded cluster, or of any other one.
    for index, entry in enumerate(slate_bytes.entries(top)):
        if entry and index < 80:
            data = bytearray(mirror.read_bytes())
            data[index * CLUSTER + 77] ^= 1
            (tmp_path / "changed.raw").write_bytes(data)
            different = support.run_instar("compare", "--plugin-dir", plugins, "-F", "raw", top, tmp_path / "changed.raw")
            assert different.rc == 1 and "mismatch" in different.stdout, str(different)


def test_check_and_map(plugins, tmp_path):
    path = slate(plugins, tmp_path / "image.slate", 10)
    checked = instar(plugins, "check", "--output", "json", path).json
    assert (checked["total-clusters"], checked["allocated-clusters"]) == (81, 30)
    mapped = instar(plugins, "map", "--output", "json", path).json
    assert sum(run["length"] for run in mapped) == SIZE
    first = next(index for index, entry in enumerate(slate_bytes.entries(path)) if entry and not entry & 0xFF)
    [run] = [run for run in mapped if run["start"] <= first * CLUSTER < run["start"] + run["length"]]
    assert run["offset"] + first * CLUSTER - run["start"] == slate_bytes.entries(path)[first]
    data = bytearray(path.read_bytes())
    data[4096 + 8 * first : 4104 + 8 * first] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(data)
    damaged = support.run_instar("check", "--output", "json", "--plugin-dir", plugins, path)
    assert damaged.rc == 2 and json.loads(damaged.stdout)["corruptions"] == 1, str(damaged)


def test_a_plugin_of_a_later_contract_works_here(later_plugins, tmp_path):
    """It was built with a function more in its root module and in both tables of its guest half."""
    listed = instar(later_plugins, "plugins", "--output", "json").json
    [plugin] = [plugin for plugin in listed["plugins"] if plugin["name"] == "slate"]
    assert plugin["api-version"] == "1.1.0" and not listed["skipped"]
    for number, whole in enumerate((slate_into_slate, a_format_of_today_into_slate)):
        folder = tmp_path / str(number)
        folder.mkdir()
        whole(later_plugins, folder)
