"""The template of a plugin: it compiles and loads as it is, in a folder that has nothing to do with the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import support

ROOT = Path(__file__).resolve().parents[2]
NEW = ROOT / "examples" / "plugin-template" / "new.sh"
CRATES = ["instar-guest-abi", "instar-guest-build", "instar-guest-sdk", "instar-plugin-api"]


def generated(directory, *options, name="myformat"):
    """What `new.sh` makes, with the versions of the dependencies that the examples are built with."""
    subprocess.run([NEW, name, directory, *options], check=True, cwd=directory.parent)
    for path in directory.rglob("*"):
        assert not path.is_file() or "{{" not in path.read_text(), path
    shutil.copy(ROOT / "examples" / "qed-plugin" / "Cargo.lock", directory / "Cargo.lock")
    return directory


def packaged(directory):
    """The folders of the crates as they are published; `make release-check` names one with those that it made."""
    if "INSTAR_CRATES" in os.environ:
        return [folder.resolve() for folder in Path(os.environ["INSTAR_CRATES"]).glob("instar-*") if folder.is_dir()]
    which = [argument for crate in CRATES for argument in ("-p", crate)]
    subprocess.run(["cargo", "package", "--no-verify", "--allow-dirty", "--target-dir", directory, *which], check=True, cwd=ROOT,
                   capture_output=True)
    for archive in (directory / "package").glob("*.crate"):
        subprocess.run(["tar", "-xzf", archive, "-C", directory], check=True)
    return [folder for folder in directory.glob("instar-*") if folder.is_dir()]


def build(directory):
    return support.build_plugin(directory, "libinstar_plugin_myformat.so", directory)


def use(library, tmp_path):
    (tmp_path / "plugins").mkdir()
    shutil.copy(library, tmp_path / "plugins")
    listed = support.run_instar("plugins", "--output", "json", "--plugin-dir", tmp_path / "plugins").json
    assert "myformat" in [plugin["name"] for plugin in listed["plugins"]] and not listed["skipped"]
    image = tmp_path / "image"
    image.write_bytes(b"myformat image\n" + bytes(1000))
    shown = support.run_instar("info", "--output", "json", "--plugin-dir", tmp_path / "plugins", image).json
    assert shown["format"] == "myformat"
    refused = support.run_instar("commit", "--plugin-dir", tmp_path / "plugins", image)
    assert refused.rc == 1 and len(refused.stderr.splitlines()) == 1, str(refused)


def test_it_compiles_and_loads(tmp_path):
    assert ROOT not in tmp_path.resolve().parents
    use(build(generated(tmp_path / "plugin")), tmp_path)


def test_its_test_compiles(tmp_path):
    """It is to be filled in, and ignored until then."""
    support.run_plugin_tests(generated(tmp_path / "plugin"), "-p", "myformat-driver")


def test_with_published_crates(tmp_path):
    """Once they are published: the manifest names versions alone. Before, they stand in for the registry."""
    directory = generated(tmp_path / "plugin", "--published")
    manifest = directory / "Cargo.toml"
    assert "path" not in manifest.read_text().replace("crate-type", "") and "patch" not in manifest.read_text()
    patches = "".join(f'{folder.name.rpartition("-")[0]} = {{ path = "{folder}" }}\n' for folder in packaged(tmp_path / "crates"))
    manifest.write_text(f"{manifest.read_text()}\n[patch.crates-io]\n{patches}")
    use(build(directory), tmp_path)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    made = subprocess.run([NEW, "myformat", tmp_path], capture_output=True, text=True, check=False)
    assert made.returncode == 1 and "exists" in made.stderr and not list(tmp_path.iterdir())
    made = subprocess.run([NEW, "My/Format", tmp_path / "x"], capture_output=True, text=True, check=False)
    assert made.returncode == 2 and not (tmp_path / "x").exists()
