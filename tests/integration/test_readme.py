"""What the README claims is what its sources say: measurements, formats, versions, limits, and the picture of the demo."""

from __future__ import annotations

import html
import re

import demo_picture
import pytest
import readme_numbers
import support
from support import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")


def section(title):
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def rows(text):
    """The cells of each row of the first table."""
    lines = re.search(r"(?m)(?:^\|.*\n)+", text).group().splitlines()
    return [readme_numbers.cells(line) for line in lines[2:]], readme_numbers.cells(lines[0])


def constant(path, name):
    """The value of a Rust constant that is a number, or a number shifted left."""
    text = (REPO / path).read_text(encoding="utf-8")
    value, shift = re.search(rf"const {name}: \w+ = ([0-9_]+)(?: << ([0-9]+))?;", text).groups()
    return int(value.replace("_", "")) << int(shift or 0)


def test_the_order_of_its_sections():
    wanted = ["Why", "Compared with other tools", "Numbers", "Install", "Use", "Formats", "Sandboxes", "Plugins",
              "What it is not for", "Safety", "Maturity", "Merge a layer, repoint its children, delete it", "Documents", "Licence"]
    assert re.findall(r"(?m)^## (.*)", README) == wanted


def test_the_numbers_are_those_of_the_last_measurement():
    assert readme_numbers.with_numbers(README) == README, "run `make readme-numbers`"
    assert len(rows(section("Numbers"))[0]) == len(readme_numbers.SHOWN)


def test_the_matrix_is_what_the_plugins_say():
    plugins = support.run_instar("plugins", "--output", "json").json["plugins"]
    bundled = re.search(r"(?m)^BUNDLED := (.*)", (REPO / "packaging/packaging.mk").read_text()).group(1).split()
    found = {plugin["name"]: set(plugin["roles"]) for plugin in plugins if plugin["name"] in bundled}
    table, head = rows(section("Formats"))
    roles = head[1:4]
    assert roles == ["source", "sink", "create"]
    assert all(set(row[1:4]) <= {"yes", "no"} for row in table)
    assert {row[0]: {role for role, cell in zip(roles, row[1:4]) if cell == "yes"} for row in table} == found


@pytest.mark.parametrize(("pattern", "value"), [
    (r"A chain may have (\d+) layers", constant("guest/abi/src/config.rs", "MAX_CHAIN_DEVICES")),
    (r"\| chain \| (\d+) layers", constant("guest/abi/src/config.rs", "MAX_CHAIN_DEVICES")),
    (r"Version ([\d.]+); ", re.search(r'(?m)^version = "(.*)"', (REPO / "Cargo.toml").read_text()).group(1)),
    (r"Linux ([\d.]+) with seccomp", re.search(r"Linux ([\d.]+) with seccomp", (REPO / "docs/operations.md").read_text()).group(1)),
    (r"tried with version ([\d.]+)", re.search(r"tried with `qemu-img commit` ([\d.]+)\.", (REPO / "docs/commit.md").read_text()).group(1)),
    (r'"code": (\d+), "name": "ERROR_NO_BACKING"', support.CODES["ERROR_NO_BACKING"]),
])
def test_a_figure_is_that_of_its_source(pattern, value):
    found = re.findall(pattern, README)
    assert found == [str(value)]


def test_the_contract_has_the_version_that_is_named():
    version = support.run_instar("plugins", "--output", "json").json["api-version"]
    assert re.findall(r"plugin contract ([\d.]+)", README) == [version.rsplit(".", 1)[0]]


def test_the_filter_of_the_process_sandbox_lets_so_many_calls_through():
    words = ["no", "one", "two", "three", "four", "five"]
    said = [word for word in re.findall(r"(\w+) system calls", README) if word in words]
    test = (REPO / "guest/starter/src/filter.rs").read_text()
    assert len(said) == 2 and set(said) == {"three"} and "fn three_calls_are_allowed_and_nothing_beside_them" in test


def test_the_two_commands_at_its_top():
    """CI reads the command of the tests here."""
    block = README.split("```sh\n", 1)[1].split("```", 1)[0]
    assert re.findall(r"(?m)^(make \w+)", block) == ["make demo", "make test"]
    makefile = (REPO / "Makefile").read_text()
    for target in ("demo", "test"):
        assert re.search(rf"(?m)^{target}:.*## ", makefile)


def test_the_json_is_what_a_commit_prints(tmp_path):
    support.create(tmp_path / "base.qcow2", "64M")
    support.create(tmp_path / "overlay.qcow2", backing="base.qcow2", cwd=tmp_path)
    support.qemu_io(tmp_path / "overlay.qcow2", "write -P 7 0 1M")
    printed = support.run_instar("commit", "--output", "json", "overlay.qcow2", cwd=tmp_path).stdout
    shown = README.split("```json\n", 1)[1].split("```", 1)[0]
    places = re.compile(r'"/[^"]*/')
    sandbox = re.compile(r'"sandbox": "\w+"')
    assert sandbox.sub("", places.sub('"/', printed)).split() == sandbox.sub("", places.sub('"/', shown)).split()


def test_what_is_to_be_pasted_works_in_an_empty_directory(tmp_path):
    block = section("Use").split("```sh\n", 1)[1].split("```", 1)[0]
    commands = [line.split()[1] for line in block.splitlines() if line.startswith("instar ")]
    assert commands == ["create", "convert", "info", "commit", "commit", "compare"]
    said = support.in_shell(f"set -e\n{block}", tmp_path)
    assert said.endswith("Image committed.\nImages are identical.\n") and "Would commit 16 clusters of 'overlay.qcow2', 1048576 bytes (1 MiB)" in said, said
    assert support.content_hash(tmp_path / "base.qcow2") == support.content_hash(tmp_path / "disk.raw", "raw")


def test_every_command_is_shown():
    shown = set(re.findall(r"(?m)^instar (\w+)", section("Use")))
    listed = support.run_instar("--help").stdout.split("Commands:\n")[1].split("\n\n")[0]
    known = set(re.findall(r"^  (\w+)  ", listed, re.MULTILINE)) - {"help", "plugins", "config", "doctor"}
    assert shown == known and all(f"`instar {name}" in README for name in ("plugins", "config", "doctor"))


def test_the_recipe_takes_a_layer_out_of_a_chain(tmp_path):
    recipe = section("Merge a layer, repoint its children, delete it").split("```sh\n", 1)[1].split("```", 1)[0]
    support.create(tmp_path / "base.qcow2", "4M")
    support.create(tmp_path / "middle.qcow2", backing="base.qcow2", cwd=tmp_path)
    support.qemu_io(tmp_path / "middle.qcow2", "write -P 7 0 1M")
    support.create(tmp_path / "top.qcow2", backing="middle.qcow2", cwd=tmp_path)
    support.qemu_io(tmp_path / "top.qcow2", "write -P 8 1M 1M")
    before = support.content_hash(tmp_path / "top.qcow2")
    for line in recipe.splitlines():
        command = line.split("#")[0].split()
        if command[0] == "instar":
            assert support.run_instar(*command[1:], cwd=tmp_path).rc == 0, line
        else:
            assert command == ["rm", "middle.qcow2"]
            (tmp_path / "middle.qcow2").unlink()
    assert support.content_hash(tmp_path / "top.qcow2") == before


def test_the_picture_is_of_a_real_run():
    """But for numbers that the machine decides: lengths on its disk. What the images read is compared to the last digit."""
    def stable(lines):
        hashes = re.compile(r"\b(?=\w*[a-f])[0-9a-f]{64}\b")
        return [line if hashes.search(line) else re.sub(r"[\d.]+", "N", re.sub(r" +", " ", line)) for line in lines if line]

    texts = re.findall(r"<text [^>]*>(.*?)</text>", demo_picture.PICTURE.read_text(encoding="utf-8"))
    drawn = [html.unescape(text).replace("--sandbox process", "--sandbox kvm") for text in texts]
    now = [line.replace("--sandbox process", "--sandbox kvm") for line in demo_picture.lines(demo_picture.run())]
    assert stable(drawn) == stable(now), "run `make picture`"
