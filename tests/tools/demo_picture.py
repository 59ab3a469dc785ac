#!/usr/bin/env python3
"""Draws `docs/demo.svg`, the terminal at the top of the README, from a real run of the demo: `make picture`.

The picture is text, so that it needs no tool but a browser, and a test compares it with a run of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

REPO = Path(__file__).resolve().parents[2]
PICTURE = REPO / "docs/demo.svg"
#: Widest line that is drawn, in characters; what is longer ends with an ellipsis.
COLUMNS = 104
#: Lines that only say what this machine is: where plugins lie, which kernel it has, how fast it is.
OF_THE_MACHINE = ("instar: plugin", "instar: confinement", "instar: time:", "instar: guest:")
FONT = 14
ADVANCE = 8.43
LEADING = 20
MARGIN = 20
TITLE_BAR = 34


def run() -> str:
    """What one run of the demo prints, with the sandbox that `INSTAR_TEST_SANDBOX` names."""
    program = os.environ.get("INSTAR_BIN", str(REPO / "target/release/instar"))
    done = subprocess.run([REPO / "tests/tools/demo.sh"], env={**os.environ, "INSTAR_BIN": program}, capture_output=True, text=True,
                          check=False)
    if done.returncode != 0:
        raise SystemExit(f"demo_picture: the demo failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def lines(output: str) -> list[str]:
    """The lines that are drawn, without what only says which machine this was."""
    drawn = ["$ make demo"]
    skipping = False
    for line in output.splitlines():
        # What `info` says of the features of the format is worth no seven lines here.
        skipping = line == "Format specific information:" or (skipping and line.startswith(" "))
        if skipping or line.startswith(OF_THE_MACHINE):
            continue
        line = re.sub(r"/\S*/instar-demo\.\w+/", "", line)
        drawn.append(line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…")
    return drawn


def kind(line: str, index: int, count: int) -> str:
    if line.startswith("$ "):
        return "command"
    return "title" if re.match(r"\d\. ", line) or index == count - 1 else "text"


def svg(drawn: list[str]) -> str:
    width = round(2 * MARGIN + COLUMNS * ADVANCE)
    height = TITLE_BAR + MARGIN + LEADING * len(drawn)
    rows = [
        f'<text class="{kind(line, index, len(drawn))}" x="{MARGIN}" y="{TITLE_BAR + LEADING * (index + 1)}">{escape(line)}</text>'
        for index, line in enumerate(drawn)
        if line
    ]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" xml:space="preserve">',
        "<title>A terminal: make demo creates two images, commits one into the other and compares what they read</title>",
        "<style>",
        f"text {{ font: {FONT}px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; white-space: pre; fill: #d0d7de }}",
        "text.command { fill: #7ee787 }",
        "text.title { fill: #ffffff; font-weight: bold }",
        "</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>',
        '<circle cx="20" cy="17" r="6" fill="#ff5f57"/><circle cx="40" cy="17" r="6" fill="#febc2e"/>'
        '<circle cx="60" cy="17" r="6" fill="#28c840"/>',
        *rows,
        "</svg>",
        "",
    ])


if __name__ == "__main__":
    PICTURE.write_text(svg(lines(run())), encoding="utf-8")
    sys.stdout.write(f"{PICTURE.relative_to(REPO)}\n")
