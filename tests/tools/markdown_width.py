#!/usr/bin/env python3
"""Lines of Markdown that are longer than 100 characters, and tables whose rows were joined. Run by `make lint`.

Tables, code, headings and lines that are one long link or word cannot be broken, and may be longer. `docs/performance.md` is
written by the benchmarks.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 100
GENERATED = ("docs/performance.md", "tests/compat/", "bench-results/")
#: What has no blank at which it could be broken, behind the indentation and the mark of a list.
UNBREAKABLE = re.compile(r"^\s*(?:[-*] |\d+\. )?(?:\S+|\[[^\]]*\]\(\S*\)\S*|`[^`]*`\S*)$")


#: The row below a table's head that does not stand alone: whatever broke the lines took the table for a paragraph.
JOINED = re.compile(r"\S.*\|---.*\|.*[^-|: ]|\|---[-|: ]*\|.*[^-|: ]")


def too_long(text: str) -> list[int]:
    found, code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(```|~~~)", line):
            code = not code
        elif len(line) > WIDTH and not code and not line.lstrip().startswith(("|", "#", "[")) and not UNBREAKABLE.match(line):
            found.append(number)
    return found


def joined(text: str) -> list[int]:
    """The lines of tables that were joined."""
    found, code = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(```|~~~)", line):
            code = not code
        elif not code and JOINED.search(re.sub(r"`[^`]*`", "", line)):
            found.append(number)
    return found


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if "target" not in path.parts]
    wrong = [
        f"{name}:{number}: longer than {WIDTH} characters"
        for name in names
        if not name.startswith(GENERATED)
        for number in too_long((ROOT / name).read_text(encoding="utf-8"))
    ]
    wrong += [f"{name}:{number}: rows of a table in one line" for name in names for number in joined((ROOT / name).read_text(encoding="utf-8"))]
    print("\n".join(wrong) or f"tests/tools/markdown_width: {len(names)} files", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
