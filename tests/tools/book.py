#!/usr/bin/env python3
"""The documents as a book: `make book` runs this for the sources, mdbook, and this again for the links of the pages that were made.

`sources FOLDER` copies the documents as they stand, and makes the table of contents from docs/README.md, which stays the only index.
`links FOLDER` follows every link inside the pages of a built book.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import links

ROOT = links.ROOT
INDEX = "docs/README.md"
#: What the index does not list, because it is not in docs/: before and after its sections.
BEFORE = ["README.md", INDEX]
AFTER = ["CONTRIBUTING.md", "CHANGELOG.md", "GOVERNANCE.md", "CODE_OF_CONDUCT.md", "SECURITY.md"]
CONFIGURATION = """\
[book]
title = "instar"
description = "Merges copy-on-write disk images into their backings, in a sandbox"
language = "en"

[build]
create-missing = false

[output.html]
default-theme = "light"
no-section-label = true
"""
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def title(page: str) -> str:
    """What a page calls itself, without marks of Markdown, which a table of contents would show."""
    heading = re.search(r"(?m)^# (.+)$", (ROOT / page).read_text(encoding="utf-8"))
    return heading[1].replace("`", "") if heading else Path(page).stem


def sections() -> list[tuple[str, list[str]]]:
    """The sections of the index with the pages that they list, each page where it is listed first."""
    seen = set(BEFORE + AFTER)
    found: list[tuple[str, list[str]]] = []
    for part in re.split(r"(?m)^## ", (ROOT / INDEX).read_text(encoding="utf-8"))[1:]:
        name, _, text = part.partition("\n")
        listed = []
        for _, target in LINK.findall(text):
            page = os.path.normpath(f"docs/{target.partition('#')[0]}")
            if page.endswith(".md") and page not in seen:
                seen.add(page)
                listed.append(page)
        found.append((name.strip(), listed))
    return found


def pages() -> list[str]:
    return [*BEFORE, *(page for _, listed in sections() for page in listed), *AFTER]


def stored(page: str) -> str:
    """The name of a page in the book: mdbook makes an index.html of a README.md, and leaves links to README.html."""
    return re.sub(r"\bREADME\.md", "index.md", page)


def summary() -> str:
    """mdbook's table of contents."""
    lines = ["# Summary", "", *(f"[{title(page)}]({stored(page)})" for page in BEFORE)]
    for name, listed in [*sections(), ("The project", AFTER)]:
        lines += ["", f"# {name}", "", *(f"- [{title(page)}]({stored(page)})" for page in listed)]
    return "\n".join(lines) + "\n"


def for_book(page: str, held: set[str]) -> str:
    """A page as it stands, but for links to what only the sources have: their text stays."""
    def kept(match):
        target = match[2]
        if links.ELSEWHERE.match(target) or target.startswith("#"):
            return match[0]
        file = os.path.normpath(os.path.join(os.path.dirname(page), unquote(target.partition("#")[0])))
        return f"[{match[1]}]({stored(target)})" if file in held else match[1]

    text = (ROOT / page).read_text(encoding="utf-8")
    # Code that looks like a link is none.
    parts = re.split(r"(?ms)(^```.*?^```$|`[^`\n]+`(?!\]))", text)
    return "".join(part if number % 2 else LINK.sub(kept, part) for number, part in enumerate(parts))


def sources(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pictures = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.svg")]
    schemas = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/schemas").glob("*.json")]
    held = {*pages(), *pictures, *schemas}
    for name in held:
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            (folder / "src" / stored(name)).write_text(for_book(name, held), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / name, folder / "src" / name)
    (folder / "src/SUMMARY.md").write_text(summary(), encoding="utf-8")
    (folder / "book.toml").write_text(CONFIGURATION, encoding="utf-8")


class Page(HTMLParser):
    """The links of a page, and what can be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag in ("a", "img", "link", "script"):
                self.targets.append(value)


def broken(folder: Path) -> list[str]:
    """A line for each link inside the book that leads nowhere."""
    found = {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    wrong = []
    for path, page in found.items():
        # It is shown for any address, so its links begin at the root of a site.
        if path.name in ("404.html", "toc.html"):
            continue
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            where = f"{path.relative_to(folder)}: {target}"
            if not file.exists():
                wrong.append(f"{where}: there is no such file")
            elif parts.fragment and file in found and unquote(parts.fragment) not in found[file].anchors:
                wrong.append(f"{where}: there is no such place")
    return wrong


def main() -> int:
    work, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    if work == "sources":
        sources(folder)
        return 0
    wrong = broken(folder)
    count = len(list(folder.rglob("*.html")))
    print("\n".join(wrong) or f"tests/tools/book: {count} pages", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong or count < len(pages()) else 0


if __name__ == "__main__":
    sys.exit(main())
