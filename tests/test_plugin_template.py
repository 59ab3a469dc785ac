"""The template of a plugin: it compiles and loads as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import support

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "examples" / "plugin-template"
# Where the published crates are until they are published; `make release-check` names a folder with what `cargo package` made.
CRATES = {name: ROOT / folder for name, folder in {
    "instar-plugin-api": "plugin-api", "instar-guest-build": "guest/build", "instar-guest-sdk": "guest/sdk"}.items()}
if "INSTAR_CRATES" in os.environ:
    CRATES = {folder.name.rpartition("-")[0]: folder.resolve()
              for folder in Path(os.environ["INSTAR_CRATES"]).glob("instar-*") if folder.is_dir()}


def generated(directory, name):
    """What cargo-generate makes of the template."""
    shutil.copytree(TEMPLATE, directory, ignore=shutil.ignore_patterns("target", "cargo-generate.toml"))
    for path in directory.rglob("*"):
        if path.is_file():
            text = path.read_text().replace("{{format}}", name)
            assert "{{" not in text, path
            path.write_text(text)
    patches = "".join(f'{crate} = {{ path = "{folder}" }}\n' for crate, folder in CRATES.items())
    with (directory / "Cargo.toml").open("a") as manifest:
        manifest.write(f"\n[patch.crates-io]\n{patches}")
    shutil.copy(ROOT / "examples" / "qed-plugin" / "Cargo.lock", directory / "Cargo.lock")


def test_it_compiles_and_loads(tmp_path):
    generated(tmp_path / "plugin", "myformat")
    environment = {**os.environ, "CARGO_TARGET_DIR": str(ROOT / "target" / "examples")}
    built = subprocess.run(
        ["cargo", "build", "--release"], cwd=tmp_path / "plugin", env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    assert "warning: unused" not in built.stderr, built.stderr
    (tmp_path / "plugins").mkdir()
    shutil.copy(ROOT / "target" / "examples" / "release" / "libinstar_plugin_myformat.so", tmp_path / "plugins")
    listed = support.run_instar("plugins", "--output", "json", "--plugin-dir", tmp_path / "plugins").json
    assert "myformat" in [plugin["name"] for plugin in listed["plugins"]] and not listed["skipped"]
    image = tmp_path / "image"
    image.write_bytes(b"myformat image\n" + bytes(1000))
    shown = support.run_instar("info", "--output", "json", "--plugin-dir", tmp_path / "plugins", image).json
    assert shown["format"] == "myformat"
    refused = support.run_instar("commit", "--plugin-dir", tmp_path / "plugins", image)
    assert refused.rc == 1 and len(refused.stderr.splitlines()) == 1, str(refused)
