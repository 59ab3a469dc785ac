"""What a Dockerfile says, as far as ours goes: its stages, with the steps of each, and their arguments filled in.

Not a container engine: one line, one instruction; no `ADD`, no `ENV`, no here-documents. What is not understood is an error, so
that whoever changes the Dockerfile sees that the tests no longer follow it.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

#: Instructions that set one thing of the image that is made.
SETTINGS = ("USER", "WORKDIR", "ENTRYPOINT", "CMD")


@dataclass
class Copy:
    """`COPY [--from=STAGE] SOURCE... TARGET`: without a stage, from the folder that is built."""

    stage: str | None
    sources: list
    target: str


@dataclass
class Run:
    """`RUN COMMAND`, for a shell."""

    command: str


@dataclass
class Stage:
    """What one `FROM` begins."""

    image: str
    name: str | None
    steps: list = field(default_factory=list)
    settings: dict = field(default_factory=dict)


def lines(text):
    """The instructions, without comments; a line that ends with a backslash goes on in the next one."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in re.sub(r"\s*\\\n\s*", " ", kept).splitlines() if line.strip()]


def words(value):
    """Of `ENTRYPOINT` and `CMD`: the list; a shell is not started."""
    parsed = json.loads(value)
    assert isinstance(parsed, list), f"a list is wanted: {value}"
    return parsed


def parse(text, **arguments):
    """The stages in their order. `arguments` hold instead of the defaults of `ARG`, as with `--build-arg`."""
    values, stages = {}, []
    for line in lines(text):
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name != "RUN":
            rest = re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], rest)
        match name:
            case "ARG" if not stages:
                key, _, default = rest.partition("=")
                values[key] = arguments.get(key, default)
            case "FROM":
                image, *named = rest.split()
                assert named[:1] in ([], ["AS"]), line
                stages.append(Stage(image, named[1] if named else None))
            case "RUN":
                stages[-1].steps.append(Run(rest))
            case "COPY":
                parts = shlex.split(rest)
                stage = parts.pop(0).removeprefix("--from=") if parts[0].startswith("--from=") else None
                assert not any(part.startswith("--") for part in parts), line
                stages[-1].steps.append(Copy(stage, parts[:-1], parts[-1]))
            case _ if name in SETTINGS:
                stages[-1].settings[name] = words(rest) if name in ("ENTRYPOINT", "CMD") else rest
            case _:
                raise ValueError(f"an instruction that is not known here: {line}")
    unknown = arguments.keys() - values.keys()
    assert not unknown, f"no such arguments: {unknown}"
    return stages


def read(path, **arguments):
    """The stages of a file."""
    return parse(Path(path).read_text(), **arguments)


def ignored(text, path):
    """Whether `.dockerignore` keeps a path, relative to the folder, out of what is built: the last pattern that fits decides."""
    result = False
    for line in lines(text):
        kept, pattern = line.startswith("!"), line.removeprefix("!")
        if re.match(as_expression(pattern), path):
            result = not kept
    return result


def as_expression(pattern):
    """A pattern of `.dockerignore` as an expression; what is below a folder that fits, fits."""
    parts = ["(?:.*/)?" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/" for part in pattern.split("/")]
    return "".join(parts).removesuffix("/") + "(?:/|$)"
