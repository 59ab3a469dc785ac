"""Every text that a user can be shown, taken from the sources: `python3 tests/tools/messages.py` writes tests/tools/messages.txt anew.

They are read as a whole there, and a change shows as one line of a diff. Test modules, comments and single words are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SNAPSHOT = REPO / "tests/tools/messages.txt"
#: Where texts for users come from, below the repository.
SOURCES = ["engine/src", "engine/cli/src", "plugin-api/src", "plugins", "guest/commit/src", "guest/check/src", "guest/map/src", "guest/core/src", "guest/sdk/src"]
#: Not for users: tests, fuzzing, build scripts, and the crash generator of tests.
SKIPPED = re.compile(r"/tests?/|_tests?\.rs$|/tests\.rs$|fuzzing\.rs$|build\.rs$|/crash\.rs$|/memory\.rs$|/testkit")

TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<char>b?'(?:\\.[^']*|[^\\'])')|(?P<raw>b?r(?P<hash>\#*)".*?"(?P=hash))|b?"(?P<text>(?:[^"\\]|\\.)*)\"""",
    re.DOTALL | re.VERBOSE,
)


def without_tests(source: str) -> str:
    """The source up to its test module, which is the last item of a file."""
    return re.split(r"(?m)^#\[cfg\((?:all\()?test", source, maxsplit=1)[0]


def literals(source: str):
    """The text literals of a source, as the compiler joins their lines."""
    for token in TOKEN.finditer(without_tests(source)):
        if token["text"] is not None:
            yield re.sub(r"\\\n\s*", "", token["text"])


def is_message(text: str) -> bool:
    """A clause of words, not a name, an option or a piece of JSON."""
    words = re.findall(r"(?<![\w\\{-])[A-Za-z]{2,}(?![\w}])", text)
    return len(words) >= 2 and " " in text.strip() and "\\x7f" not in text and not text.lstrip().startswith(("{\\\"", "\\\""))


def collect() -> str:
    lines = []
    for folder in SOURCES:
        for path in sorted((REPO / folder).rglob("*.rs")):
            name = path.relative_to(REPO).as_posix()
            if SKIPPED.search("/" + name):
                continue
            messages = [text for text in literals(path.read_text()) if is_message(text)]
            if messages:
                lines += [f"# {name}", *messages, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    SNAPSHOT.write_text(collect())
    sys.stdout.write(f"{SNAPSHOT.relative_to(REPO)}: {len(SNAPSHOT.read_text().splitlines())} lines\n")
