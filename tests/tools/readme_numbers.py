#!/usr/bin/env python3
"""Copies the measurements of `docs/performance.md` that the README shows into it: `make readme-numbers`.

`make bench` measures; nobody types a number into the README. A test fails where the two differ.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = REPO / "README.md"
RESULTS = REPO / "docs/performance.md"
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
#: The rows that are shown, the good and the bad, by their first cell.
SHOWN = [
    "empty overlay (start-up)",
    "1 GiB sequential, into new clusters",
    "64 MiB in 16,384 scattered 4 KiB clusters of 16 GiB",
    "1 GiB of compressed clusters (zstd)",
    "4 GiB sequential on XFS, which shares extents",
    "1 GiB sequential on tmpfs, over existing clusters",
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def measured() -> dict[str, list[str]]:
    """The rows of the first table of results, by their workload."""
    table = RESULTS.read_text(encoding="utf-8").split("| workload |", 1)[1].split("\n\n", 1)[0]
    return {row[0]: row for row in map(cells, table.splitlines()[2:])}


def table() -> str:
    """The README's table: median times, without their ranges."""
    rows = measured()
    lines = ["| workload | instar | qemu-img | instar / qemu-img | peak memory, instar / qemu-img |", "|---|---|---|---|---|"]
    for workload in SHOWN:
        row = rows[workload]
        ours, theirs = (re.sub(r" \(.*\)", "", cell) for cell in row[1:3])
        lines.append(f"| {workload} | {ours} | {theirs} | {row[3]} | {row[7]} |")
    return "\n".join(lines)


def with_numbers(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_numbers(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write("README.md\n")
