"""The documents as a book: the tutorials are run as they stand, the reference pages are what the program says."""

from __future__ import annotations

import re
import subprocess

import book
import links
import pytest
import support
from support import REPO

DOCS = REPO / "docs"


def blocks(page, language):
    """The blocks of code in a language, in their order."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"))


def follow(page, directory, skip=()):
    """Runs all shell blocks of a page one after the other in one shell, and returns what it printed."""
    return support.in_shell("set -x\n" + "\n".join(block for block in blocks(page, "sh") if not block.startswith(tuple(skip))), directory)


def test_the_first_commit(tmp_path):
    said = follow("tutorial-first-commit.md", tmp_path)
    where = tmp_path / "first-commit"
    assert said.count("Images are identical.") == 3 and said.count("Content mismatch at offset 0!") == 1, said
    assert said.count("Image committed.") == 1 and "Would commit 16 clusters" in said and "No errors were found" in said, said
    assert "instar: '" not in said, said
    assert (where / "before.raw").read_bytes()[: 1 << 20] == b"O" * (1 << 20) and support.holds_no_clusters(where / "overlay.qcow2")
    assert support.content_hash(where / "base.qcow2") == support.content_hash(where / "before.raw", "raw")


def test_a_hostile_image(tmp_path):
    said = follow("tutorial-hostile-image.md", tmp_path)
    where = tmp_path / "hostile"
    assert said.count("(ERROR_WRITE_TARGET_NOT_ALLOWED)") == 2 and not (where / "stolen.raw").exists(), said
    assert said.count("(ERROR_OVERLAY_CORRUPT)") == 1 and "past the end of the file" in said, said
    assert "base.qcow2: OK" in said and "bent.qcow2: OK" in said, said
    assert said.count("(ERROR_OVERLAY_LARGER_THAN_BACKING)") == 1 and "No errors were found" in said, said
    assert (tmp_path / "secret.raw").read_bytes().startswith(b"a secret of the host\n")


def test_a_plugin_in_an_afternoon(tmp_path):
    """The pieces of the page, put together as it says."""
    page = (DOCS / "tutorial-plugin.md").read_text(encoding="utf-8")
    source = tmp_path / "toy"
    subprocess.run([REPO / "examples/plugin-template/new.sh", "toy", source], check=True)
    for name, code in re.findall(r"(?ms)^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", page):
        (source / name).write_text(code, encoding="utf-8")
    manifest = (source / "Cargo.toml").read_text()
    line = blocks("tutorial-plugin.md", "toml")[0]
    (source / "Cargo.toml").write_text(manifest.replace("[dependencies]\n", f"[dependencies]\n{line}"))
    (source / "Cargo.lock").write_bytes((REPO / "examples/qed-plugin/Cargo.lock").read_bytes())
    plugins = tmp_path / "plugins"
    plugins.mkdir(mode=0o755)
    support.build_plugin(source, "libinstar_plugin_toy.so", plugins)
    subprocess.run(["python3", source / "make_toy.py", tmp_path / "a.toy"], check=True)
    script = blocks("tutorial-plugin.md", "sh")
    assert [block.split()[0] for block in script] == ["examples/plugin-template/new.sh", "python3", "cargo", "cp"]
    said = ""
    for command in (line for block in script[2:] for line in block.splitlines()):
        if command.startswith("instar "):
            result = support.run_instar(*command.split()[1:], cwd=tmp_path, env={"INSTAR_PLUGIN_PATH": str(plugins)})
            said += result.stdout + result.stderr
        elif command.startswith(("cp a.toy", "printf")):
            subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert said.count("Images are identical.") == 2 and "file format: toy" in said, said
    assert "the entry of cluster 0" in said and "(at offset 32)" in said and "(ERROR_OVERLAY_CORRUPT)" in said, said
    assert not (tmp_path / "bent.raw").exists()
    subprocess.run(["qemu-img", "convert", "-O", "raw", tmp_path / "a.qcow2", tmp_path / "a.raw"], check=True)
    assert (tmp_path / "a.raw").read_bytes() == b"A" * 65536 + bytes(65536) + b"C" * 65536


def test_the_page_of_error_codes_has_those_of_the_code():
    source = (REPO / "guest/abi/src/error.rs").read_text()
    codes = [(number, name, meaning.rstrip("."))
             for meaning, number, name in re.findall(r"///\s(.*)\n\s+\w+ = (\d+), (ERROR_\w+);", source)]
    assert len(codes) == len(support.CODES)
    listed = re.findall(r"(?m)^\| (\d+) \| `(\w+)` \| (.*?) \| (.*?) \|$", (DOCS / "errors.md").read_text())
    assert [row[:3] for row in listed] == codes, "docs/errors.md is not guest/abi/src/error.rs"
    explained = support.run_instar("explain", "--output", "json").json["codes"]
    assert [(row[2], row[3]) for row in listed] == [(code["meaning"].rstrip("."), code["remedy"].rstrip(".")) for code in explained]


@pytest.mark.parametrize("word", ["16", "ERROR_NO_SPACE", "no-space"])
def test_a_code_is_explained(word):
    shown = (DOCS / "explain.md").read_text(encoding="utf-8").split("\n```\n\n```\n")[1].split("```")[0]
    result = support.run_instar("explain", word)
    assert (result.rc, result.stdout) == (0, shown)


def test_a_code_that_does_not_exist_is_bad_usage():
    result = support.run_instar("explain", "ERROR_NO_SPCAE")
    assert result.rc == 2 and "the nearest one is ERROR_NO_SPACE" in result.stderr and result.stderr.count("\n") == 1, str(result)


@pytest.mark.parametrize("command", [["commit"], ["info"], ["check"], ["map"], ["rebase", "-b", ""], ["convert"], ["resize"], ["compare"]])
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(tmp_path, command):
    support.create(tmp_path / "overlay.qcow2", "1M")
    support.create(tmp_path / "base.qcow2", "1M")
    more = {"convert": ["copy.raw"], "resize": ["2M"], "compare": ["base.qcow2"]}.get(command[0], [])
    result = support.run_instar(*command, "overlya.qcow2", *more, cwd=tmp_path)
    assert "'overlya.qcow2': does not exist; 'overlay.qcow2' does (ERROR_IMAGE_NOT_FOUND)" in result.stderr, str(result)
    assert "does not exist (" in support.run_instar(*command, "elsewhere.raw", *more, cwd=tmp_path).stderr


@pytest.mark.parametrize("command", ["commit", "rebase", "resize", "convert", "check", "info", "map", "compare", "measure", "create"])
def test_instead_of_qemu_img(command):
    """The options that the page calls the same: both programs have them, in their help."""
    row = re.search(rf"(?m)^\| `{command}` \| [^|]* \| `([^`]*)` \|", (DOCS / "instead-of-qemu-img.md").read_text()).group(1)
    ours = support.run_instar(command, "--help").stdout
    theirs = subprocess.run(["qemu-img", command, "--help"], capture_output=True, text=True, check=False).stdout
    for option in row.split():
        word = re.compile(rf"(?<![\w-]){option}(?![\w-])")
        assert word.search(ours), f"instar {command} has no {option}"
        assert word.search(theirs), f"qemu-img {command} has no {option}"


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name == "README.md" or f"]({name}" in index, f"docs/README.md does not name {name}"


@pytest.mark.parametrize(("text", "found"), [
    ("[a](there.md) [b](there.md#a-heading-with-code) [c](#here-it-is)\n# Here, it is!\n", 0),
    ("[a](missing.md)", 1),
    ("[a](there.md#no-such-heading)", 1),
    ("[a](#nowhere)", 1),
    ("`[a](missing.md)`\n```\n[b](missing.md)\n```\n", 0),
    ("[a][b]\n\n[b]: missing.md\n", 1),
    ("[a](https://example.invalid/missing)", 0),
])
def test_the_checker_of_links(tmp_path, text, found):
    (tmp_path / "there.md").write_text("# A heading with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(text)
    assert len(links.broken(page, tmp_path)) == found


def test_the_book_is_made_from_the_index(tmp_path):
    """`make book` has no table of contents of its own: each page that the index names is in it once, and so is every page of docs/."""
    listed = book.pages()
    assert len(listed) == len(set(listed)), "a page is there twice"
    assert {path.relative_to(REPO).as_posix() for path in DOCS.rglob("*.md")} <= set(listed)
    assert [name for name, pages in book.sections() if pages] == ["Tutorials", "How-to", "Reference", "Explanation"]
    book.sources(tmp_path)
    named = re.findall(r"\]\(([^)]+)\)", (tmp_path / "src/SUMMARY.md").read_text())
    assert len(named) == len(listed) and all((tmp_path / "src" / name).is_file() for name in named)
    wrong = [line for page in (tmp_path / "src").rglob("*.md") for line in links.broken(page, tmp_path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("page", "found"), [
    ('<a href="other.html">x</a>', 0), ('<a href="other.html#place">x</a>', 0), ('<a href="https://example.org/nowhere">x</a>', 0),
    ('<a href="nowhere.html">x</a>', 1), ('<a href="other.html#nowhere">x</a>', 1), ('<a href="#nowhere">x</a>', 1), ('<img src="none.svg">', 1),
])
def test_the_checker_of_the_book(tmp_path, page, found):
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "other.html").write_text('<h1 id="place">x</h1>')
    assert len(book.broken(tmp_path)) == found
