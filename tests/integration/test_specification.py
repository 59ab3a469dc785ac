"""SPECIFICATION.md: each number is that of the constant it names, and each test that it names exists."""

from __future__ import annotations

import re

import pytest
import test_unprivileged
from support import REPO

TEXT = (REPO / "SPECIFICATION.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| what |")]
UNITS = {"": 1, " s": 1, " KiB": 1 << 10, " MiB": 1 << 20, " GiB": 1 << 30}


def value(path, name):
    """The number that a constant or a field is set to: a product, a shift, seconds."""
    source = (REPO / path).read_text(encoding="utf-8")
    found = re.search(rf"(?m)\b{name}(?:: [\w:]+)? ?[:=] (?:Duration::from_secs\()?([0-9_]+)(?: (<<|\*) (\w+))?", source)
    assert found, f"{path} has no {name}"
    number, operator, second = int(found[1].replace("_", "")), found[2], found[3]
    if operator == "<<":
        return number << int(second)
    return number * {None: 1, "MIB": 1 << 20, "GIB": 1 << 30}[second]


@pytest.mark.parametrize("row", [row for row in ROWS if "::" in row[2]], ids=lambda row: row[2].strip("`"))
def test_a_number_is_that_of_its_constant(row):
    number, unit = re.fullmatch(r"(\d+)( \w+)?", row[1]).groups(default="")
    assert value(*row[2].strip("`").split("::")) == int(number) * UNITS[unit], row[0]


def test_there_are_numbers():
    assert sum("::" in row[2] for row in ROWS) >= 10


def test_every_test_that_is_named_exists():
    named = re.findall(r"`([a-z0-9_/.-]+\.(?:py|rs))(?:::(\w+))?`", TEXT)
    assert len(named) > 25
    for file, name in named:
        source = (REPO / file).read_text(encoding="utf-8")
        if name and not re.search(rf"(?m)^\s*(?:pub )?const {name}\b|^{name} =|\b{name}: ", source):
            assert re.search(rf"(?m)^\s*(?:def|fn) {name}\(", source), f"{file} has no {name}"


def places(folder, name):
    """Where a file lies that a page of `docs/formats` names, short of the folder of the plugin."""
    plugin = REPO / "plugins" / folder
    candidates = [REPO / name, plugin / name, plugin / name.replace("driver/", "driver/tests/", 1), plugin / name.replace("format/", "format/src/", 1)]
    return [path for path in candidates if path.is_file()]


@pytest.mark.parametrize("page", sorted((REPO / "docs/formats").glob("*.md")), ids=lambda page: page.stem)
def test_what_the_page_of_a_format_names_exists(page):
    """A claim about another vendor's program stands on the test that is named beside it."""
    text, folder = page.read_text(encoding="utf-8"), {"vpc": "vhd"}.get(page.stem, page.stem)
    tests = "".join(path.read_text(encoding="utf-8") for path in sorted((REPO / "tests/integration").glob("test_*.py")))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 5
    for name in named:
        assert re.search(rf"(?m)^def {name}\(", tests), name
    for name, function in re.findall(r"`([\w/-]+\.rs)`(?: \(`(\w+)…?`\))?", text):
        # Some pages name a Rust test file of another kind by its last name alone.
        found = places(folder, name) or sorted((REPO / "plugins" / folder).rglob(name))
        assert found, name
        if function:
            assert any(re.search(rf"\bfn {function}", path.read_text(encoding="utf-8")) for path in found), f"{name}: {function}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_line_is_held_by_something(row):
    assert re.search(r"`(?:[\w/.-]+\.(?:py|rs)(?:::\w+)?|make \w+)`", row[3]), row[0]
    for target in re.findall(r"`make (\w+)`", row[3]):
        assert re.search(rf"(?m)^{target}:", (REPO / "Makefile").read_text()), target


def test_the_exits_are_those_that_the_test_asks_for():
    exits = re.search(r"exits of the guest for 1 GiB in one piece \| (\d+)", TEXT)[1]
    assert f"exits < {exits}" in (REPO / "tests/integration/test_cli.py").read_text()
    states = re.search(r"`make crash` replays at least \| (\d+)", TEXT)[1]
    assert f"exit states < {states}" in (REPO / "Makefile").read_text()


def test_the_limits_are_those_that_are_tried():
    """The second of each pair in `test_limits` is enough; `docs/operations.md` names the same numbers."""
    tried = dict(pair.split("=") for _, pair, _ in test_unprivileged.LIMITS)
    mib = 1 << 20
    for what, number, unit in (("address space with", int(tried["AS"]) // mib, " MiB"), ("length of a file", int(tried["FSIZE"]) // mib, " MiB"),
                               ("descriptors with", int(tried["NOFILE"]), ""), ("processes of its user", int(tried["NPROC"]), "")):
        assert re.search(rf"(?m)^\| {what}.*? \| {number}{unit} \|", TEXT), what
    page = (REPO / "docs/operations.md").read_text(encoding="utf-8")
    assert f"{tried['NOFILE']} descriptors ({len(test_unprivileged.BUNDLED)} of them" in page
    assert "96 MiB of address space" in page and "files of 64 MiB" in page
