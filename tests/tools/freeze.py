"""Keeps the crates of a plugin's author as they are when a contract is complete.

`python3 tests/tools/freeze.py 1.0` writes them to tests/compat/plugin-api-1.0, without their tests, as a workspace of their own,
and the digest of that folder to a file beside it, which tests/crates/contract/tests/frozen.rs compares. The plugin in
the folder `slate` is written by hand and stays; the digest covers it, too.

A copy that exists is not written again. Before anything was released, `--again` does that.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
#: What a plugin's author depends on.
CRATES = ["guest/abi", "guest/build", "guest/sdk", "plugin-api"]
#: Written by hand, and not touched.
PLUGIN = "slate"
#: Entries of a manifest that name files which are not copied.
NOT_COPIED = re.compile(r"^(readme|exclude) = .*\n|^# The tests build .*\n", re.MULTILINE)

README = """# Plugin contract {version}, as it was

`plugin-api`, `guest/abi`, `guest/sdk` and `guest/build` are the crates of this repository at the time when contract {version}
was complete (module interface {interface}), without their tests. `tests/tools/freeze.py` made this copy. `slate` is a plugin
that was written with them: a format of the tests' own that uses everything they offer but images in several files
and a sink that grows.

**Nothing in here changes**: the digest of this folder stands in `{folder}.digest` beside it, and a test compares it.
`tests/integration/test_plugin_compat.py` builds `slate` as a third party does and works with it in the engine of today: what it
could do once, it can do as long as the contract's major version is {major}. If that fails, the engine is wrong.

The crates are also the baseline of both guards of the public API: `tests/crates/contract` (in `make test`) and `make semver`.
The next copy is made beside this one when a later contract is released, and this one stays.
"""


def fail(text: str):
    sys.exit(f"freeze: {text}")


def without_tests(source: str) -> str:
    """The source up to its test module, which is the last item of a file, and without declarations of such modules elsewhere."""
    source = re.sub(r"(?m)^#\[cfg\(test\)\]\nmod \w+;\n", "", source)
    return re.split(r"(?m)^#\[cfg\((?:all\()?test", source, maxsplit=1)[0].rstrip("\n") + "\n"


def without_sections(manifest: str, *names: str) -> str:
    """A manifest without the sections of these names."""
    parts = re.split(r"(?m)^(?=\[)", manifest)
    kept = [part for part in parts if part.partition("\n")[0].strip("[]") not in names]
    return "".join(kept).rstrip("\n") + "\n"


def copy_crate(source: Path, to: Path) -> None:
    for path in sorted([*source.glob("build.rs"), *source.joinpath("src").rglob("*")]):
        if path.is_dir() or path.stem == "tests" or path.stem.endswith("_tests"):
            continue
        target = to / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        target.write_text(without_tests(text) if path.suffix == ".rs" else text)
    manifest = without_sections(source.joinpath("Cargo.toml").read_text(), "dev-dependencies", "test")
    to.joinpath("Cargo.toml").write_text(NOT_COPIED.sub("", manifest))


def table(name: str, entries: dict) -> str:
    def value(of):
        if isinstance(of, dict):
            return "{ " + ", ".join(f"{key} = {value(inner)}" for key, inner in of.items()) + " }"
        if isinstance(of, bool):
            return str(of).lower()
        return "[" + ", ".join(map(value, of)) + "]" if isinstance(of, list) else f'"{of}"'

    return f"\n[{name}]\n" + "".join(f"{key} = {value(of)}\n" for key, of in entries.items())


def workspace(folder: Path, version: str) -> str:
    """The manifest of the workspace: of today's only what the crates use."""
    today = tomllib.loads((REPO / "Cargo.toml").read_text())["workspace"]
    used = set()
    for crate in CRATES:
        manifest = tomllib.loads((folder / crate / "Cargo.toml").read_text())
        used |= {f"instar-{crate.replace('/', '-')}", *manifest.get("dependencies", {})}
    members = [*CRATES, *([PLUGIN, f"{PLUGIN}/driver"] if (folder / PLUGIN).is_dir() else [])]
    return (
        f"# The crates that a plugin's author had when contract {version} was new, and a plugin built with them. Frozen: see README.md.\n"
        "[workspace]\n"
        f'resolver = "{today["resolver"]}"\n'
        "members = [" + ", ".join(f'"{member}"' for member in members) + "]\n"
        + table("workspace.package", today["package"])
        + table("workspace.dependencies", {name: of for name, of in today["dependencies"].items() if name in used})
        + table("workspace.lints.rust", today["lints"]["rust"])
        + table("workspace.lints.clippy", {"undocumented_unsafe_blocks": "deny"})
    )


def digest(folder: Path) -> str:
    """FNV-1a over the names and contents of all files, and their number: tests/crates/contract/tests/frozen.rs does the same."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = sorted(name for name in names if not name.startswith("target/"))
    value = 0xCBF2_9CE4_8422_2325
    for name in files:
        content = (folder / name).read_bytes()
        for byte in name.encode() + b"\0" + len(content).to_bytes(8, "little") + content:
            value = ((value ^ byte) * 0x100_0000_01B3) & 0xFFFF_FFFF_FFFF_FFFF
    return f"{len(files)} files, {value:016x}\n"


def is_released() -> bool:
    tags = subprocess.run(["git", "tag", "--list", "v[0-9]*"], cwd=REPO, capture_output=True, text=True, check=False)
    return bool(tags.stdout.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", help="major and minor version of the contract: 1.0")
    parser.add_argument("--again", action="store_true", help="replace a copy that exists, as long as nothing was released")
    arguments = parser.parse_args()
    version, folder = arguments.version, REPO / f"tests/compat/plugin-api-{arguments.version}"
    today = tomllib.loads((REPO / "plugin-api/Cargo.toml").read_text())["package"]["version"]
    if today.rpartition(".")[0] != version:
        fail(f"the contract of today is {today}, not {version}")
    exists = any((folder / crate).exists() for crate in CRATES)
    if exists and not arguments.again:
        fail(f"{folder.relative_to(REPO)} exists, and does not change; before the first release, --again makes it anew")
    if exists and is_released():
        fail("there is a release: what is frozen stays as it is")
    for name in ("guest", "plugin-api"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for crate in CRATES:
        copy_crate(REPO / crate, folder / crate)
    (folder / "Cargo.toml").write_text(workspace(folder, version))
    shutil.copy(REPO / "rustfmt.toml", folder)
    abi = (REPO / "guest/abi/src/module.rs").read_text()
    interface = ".".join(re.search(rf"MODULE_ABI_{part}: u32 = (\d+);", abi)[1] for part in ("MAJOR", "MINOR"))
    major = version.partition(".")[0]
    text = README.format(version=version, interface=interface, folder=folder.name, major=major)
    (folder / "README.md").write_text(text)
    # The versions that are locked today, less what the copy does not need.
    shutil.copy(REPO / "Cargo.lock", folder)
    locked = subprocess.run(
        ["cargo", "update", "--workspace", "--offline"], cwd=folder, capture_output=True, text=True, check=False
    )
    if locked.returncode != 0:
        fail(f"its Cargo.lock cannot be made:\n{locked.stderr}")
    found = digest(folder)
    folder.with_name(f"{folder.name}.digest").write_text(found)
    print(f"{folder.relative_to(REPO)}: {found}", end="")


if __name__ == "__main__":
    main()
