#!/usr/bin/env python3
"""Links in Markdown that lead nowhere: files that are missing, and headings that have another name. Run by `make lint`.

Names of headings become anchors as GitHub makes them. Links to other hosts are not followed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]
#: Frozen copies keep the links of the place where they were.
SKIPPED = ("tests/compat/", "bench-results/")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s+<?(\S+?)>?$", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:|^//")


def prose(text: str) -> str:
    """The text without code: blocks keep their lines, so that numbers of lines stay right."""
    kept, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and (fence is None or line.strip().startswith(fence)):
            fence = None if fence else mark.group(1)
            kept.append("")
        else:
            kept.append("" if fence else line)
    return "\n".join(kept)


def anchors(text: str) -> set[str]:
    """The anchors of all headings."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#{1,6}\s+(.*?)\s*#*$", prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number, name = 0, slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found


def broken(page: Path, root: Path = ROOT) -> list[str]:
    """A line for each link of a page that leads nowhere."""
    text = prose(page.read_text(encoding="utf-8"))
    without_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", lambda match: " " * len(match.group()), text)
    wrong = []
    for match in [*LINK.finditer(without_code), *REFERENCE.finditer(without_code)]:
        target = match.group(1)
        if ELSEWHERE.match(target):
            continue
        where = f"{page.relative_to(root)}:{text[:match.start(1)].count(chr(10)) + 1}: {target}"
        name, _, anchor = unquote(target).partition("#")
        file = page if not name else page.parent / name
        if not file.exists():
            wrong.append(f"{where}: there is no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{where}: there is no such heading")
    return wrong


def pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if "target" not in path.parts]
    return [ROOT / name for name in names if not name.startswith(SKIPPED) and (ROOT / name).exists()]


def main() -> int:
    found = pages()
    wrong = [line for page in found for line in broken(page)]
    print("\n".join(wrong) or f"tests/tools/links: {len(found)} files", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
