"""What the JSON of each command has to look like: `docs/schemas`, as the tests use it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jsonschema

SCHEMAS = Path(__file__).resolve().parents[2] / "docs/schemas"
#: Of a longer array (the map of a large image), this many elements are examined at each end.
MANY = 500


@functools.cache
def published() -> dict[str, dict]:
    """The schemas by their names: of each command that prints JSON, and `error`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(SCHEMAS.glob("*.json"))}


@functools.cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """Made once: it is used hundreds of times."""
    return jsonschema.Draft202012Validator(published()[name])


def faults(name: str, value) -> list[str]:
    """What contradicts the schema of this name, one line each."""
    if isinstance(value, list) and len(value) > 2 * MANY:
        value = value[:MANY] + value[-MANY:]
    return [f"{fault.json_path}: {fault.message[:500]}" for fault in validator(name).iter_errors(value)]


def insist(name: str, value):
    """The value, which its schema has to allow."""
    found = faults(name, value)
    assert not found, f"docs/schemas/{name}.json does not allow it:\n" + "\n".join(found)
    return value
