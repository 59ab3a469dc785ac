"""Every text that a user can be shown, taken from the sources: `python3 tests/tools/messages.py` writes tests/tools/messages anew.

They are read as a whole there, and a change shows as one line of a diff. Each source has a file of its own, so that new
code leaves those of the old alone. Test modules, comments and single words are left out.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SNAPSHOT = REPO / "tests/tools/messages"
#: Where texts for users come from, below the repository.
SOURCES = ["engine/src", "engine/cli/src", "plugin-api/src", "plugins", "guest"]
#: Not for users: tests, fuzzing, build scripts, and the crash generator of tests.
SKIPPED = re.compile(r"^/guest/(abi|build|protocol|testmod)/|/tests?/|_tests?\.rs$|/tests\.rs$|fuzzing\.rs$|build\.rs$|/crash\.rs$|/sdk/src/conformance/|/memory\.rs$|/testkit")

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


def collect() -> dict[str, str]:
    """The texts of each source that has any, one a line."""
    texts = {}
    for folder in SOURCES:
        for path in sorted((REPO / folder).rglob("*.rs")):
            name = path.relative_to(REPO).as_posix()
            if SKIPPED.search("/" + name):
                continue
            messages = [text for text in literals(path.read_text()) if is_message(text)]
            if messages:
                texts[name] = "\n".join([*messages, ""])
    return texts


def snapshot() -> dict[str, str]:
    """The same as it was when it was last read as a whole."""
    files = sorted(SNAPSHOT.rglob("*.txt"))
    return {path.relative_to(SNAPSHOT).as_posix().removesuffix(".txt"): path.read_text() for path in files}


if __name__ == "__main__":
    shutil.rmtree(SNAPSHOT, ignore_errors=True)
    texts = collect()
    for name, text in texts.items():
        path = SNAPSHOT / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.stdout.write(f"{SNAPSHOT.relative_to(REPO)}: the texts of {len(texts)} sources\n")
