"""Every test that docs/threat-model.md names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_is_named_exists():
    text = (ROOT / "docs" / "threat-model.md").read_text()
    named = re.findall(r"`([a-z0-9_/.-]+\.(?:py|rs))(?:::(\w+))?`", text)
    assert len(named) > 30
    for file, test in named:
        source = (ROOT / file).read_text()
        if test:
            assert re.search(rf"^\s*(?:def|fn) {test}\(", source, re.MULTILINE), f"{file} has no {test}"
            assert file.endswith(".py") == test.startswith("test_"), test
