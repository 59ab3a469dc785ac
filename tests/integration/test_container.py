"""The Dockerfile: that it agrees with the rest of the sources. `make container-root` follows all of its steps."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import container_root
import dockerfile
import pytest
import support
from support import REPO

MANIFEST = tomllib.loads((REPO / "Cargo.toml").read_text())
IGNORED = (REPO / ".dockerignore").read_text()


@pytest.fixture(scope="module")
def stages():
    return dockerfile.read(REPO / "Dockerfile")


def test_the_stages_are_of_one_debian_and_of_our_rust_version(stages):
    build, image = stages
    rust = MANIFEST["workspace"]["package"]["rust-version"]
    assert build.image == f"docker.io/library/rust:{rust}-slim-bookworm"
    assert image.image == "docker.io/library/debian:bookworm-slim"
    other = dockerfile.read(REPO / "Dockerfile", SUITE="trixie")
    assert [stage.image.endswith(("-trixie", ":trixie-slim")) for stage in other] == [True, True]


def test_the_image_runs_the_program_as_an_ordinary_user(stages):
    settings = stages[1].settings
    user, group = settings["USER"].split(":")
    assert int(user) > 0 and int(group) > 0, "Kubernetes believes only numbers (runAsNonRoot)"
    assert settings["ENTRYPOINT"] == ["instar"] and settings["CMD"] == ["--help"]
    assert settings["WORKDIR"] == "/images"


def test_what_is_copied_is_what_is_installed(stages, tmp_path):
    container_root.build(stages[0], tmp_path)
    targets = {}
    for step in stages[1].steps:
        for name in step.sources:
            source = container_root.source(stages, tmp_path, step, name)
            assert source.exists(), f"{step}: {source}"
            targets[step.target] = source
    assert {"/usr/bin/instar", "/etc/instar/config.toml", "/usr/share/doc/instar/copyright"} <= targets.keys()
    plugins = targets["/usr/lib/x86_64-linux-gnu/instar"] / "plugins"
    assert sorted(path.name for path in plugins.iterdir()) == [f"libinstar_plugin_{name}.so" for name in support.BUNDLED]
    # It is the same version of glibc and stripped: what was installed runs.
    assert support.run(targets["/usr/bin/instar"], "--version").rc == 0


def test_the_configuration_says_which_sandbox():
    config = REPO / "packaging/container.toml"
    answer = support.run_instar("config", "--output", "json", env={"INSTAR_CONFIG": str(config)}).json
    assert answer["sandbox"] == {"name": "auto", "from": str(config)}


def test_what_is_built_is_all_of_the_sources_and_nothing_else(tmp_path):
    for path in ("target", "target/release/instar", "engine/target/x", ".git/HEAD", ".venv/bin/python", "tests/tools/__pycache__/a.pyc"):
        assert dockerfile.ignored(IGNORED, path), path
    for path in ("Makefile", "packaging/packaging.mk", "docs/man/instar.1", "engine/build.rs", "guest/build/src/module.ld"):
        assert not dockerfile.ignored(IGNORED, path), path
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=False).stdout.split("\0")
    for name in filter(None, listed):
        if not dockerfile.ignored(IGNORED, name) and (REPO / name).exists():
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPO / name).read_bytes())
    # Every member of the workspace is there, and the lock file fits.
    metadata = support.run("cargo", "metadata", "--offline", "--locked", "--format-version", "1", "--no-deps", cwd=tmp_path)
    assert metadata.rc == 0, str(metadata)
    names = {Path(package["manifest_path"]).parent.relative_to(tmp_path) for package in metadata.json["packages"]}
    assert Path("engine/cli") in names and Path("packaging/assets") in names


def test_instructions_that_are_not_known_are_an_error():
    for text in ("FROM a\nADD x y", "FROM a\nENV A=b", "FROM a\nCOPY --chown=1 x y"):
        with pytest.raises((ValueError, AssertionError)):
            dockerfile.parse(text)
    [stage] = dockerfile.parse("ARG A=1\nFROM x:${A} AS y\n# no\nRUN a \\\n  b ${A}\nCOPY c d e/\n", A="2")
    assert (stage.image, stage.name) == ("x:2", "y")
    assert stage.steps == [dockerfile.Run("a b ${A}"), dockerfile.Copy(None, ["c", "d"], "e/")]
