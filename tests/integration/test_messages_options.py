"""Every option that a message advises exists, in the command in which the message appears or in the one that it names."""

from __future__ import annotations

import functools
import re

import messages
import pytest
from support import run_instar

OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*[a-z]|-[A-Za-z])(?![\w-])")
LONG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])")
#: A command that a message names, up to the end of the quote.
NAMED = re.compile(r"`instar ([a-z]+)([^`]*)`")
#: Options of other programs, each with the words before it.
FOREIGN = re.compile(
    r"`(?!instar )[^`]* -[^`]*`|`-(?:-device|-group-add)[^`]*`|blockdev --setrw|as --object secret|--device /dev/kvm --group-add \S+|--group-add \S+"
)
COMMANDS = ["check", "commit", "compare", "config", "convert", "create", "doctor", "explain", "info", "map", "measure", "plugins", "rebase",
            "recover", "resize"]
#: The commands of sources whose folder or file is not called like the command. Messages of all others may appear in every command that
#: opens images in the sandbox.
OF = {"adopt": ["commit"], "others": ["commit"], "progress_args": ["check", "commit", "compare", "convert", "rebase", "resize"],
      "unsupported": ["compare", "convert", "rebase", "resize"], "map_text": ["map"], "map_picture": ["map"], "new_file": ["convert"],
      # The log of an atomic commit.
      "undo_directory": ["commit", "recover"],
      # Of a commit, and of the copy of a backing into which bitmaps go.
      "bitmaps": ["commit"], "foreign_sink": ["commit", "convert"]}
OPENING = ["check", "commit", "compare", "convert", "map", "measure", "rebase", "resize"]
#: Options that a shared source advises only where one command comes by.
ONLY_OF = {
    ("engine/src/image/undo_directory.rs", "--atomic"): ["commit"],
    ("engine/src/doctor.rs", "--plugin-dir"): OPENING,
    ("guest/sdk/src/ffi/wire.rs", "--bitmaps"): ["commit"], ("guest/sdk/src/traits.rs", "--bitmaps"): ["commit"],
    ("plugins/qcow2/driver/src/bitmaps/made.rs", "--bitmaps"): ["commit"], ("plugins/qcow2/driver/src/bitmaps/merge.rs", "--bitmaps"): ["commit"],
    ("plugins/qcow2/driver/src/bitmaps/list.rs", "--bitmaps"): ["commit"],
}
#: Texts of `instar explain`: each is about the commands in which the code appears, which it names where these are few.
EXPLAIN = "engine/cli/src/explain_text.rs"
#: Options that are refused: the message says what to do instead.
REFUSED = {"--object", "--image-opts", "--source-image-opts", "--target-image-opts"}


@functools.cache
def options(command):
    text = run_instar(command, "--help").stdout
    return {*re.findall(r"(?<![\w-])(--[a-z][a-z-]*|-[A-Za-z])(?![\w-])", text)} | {"--help"}


def commands_of(path):
    """The commands in which a text of this source may appear."""
    parts = re.split(r"[/.]", path)
    for part in reversed(parts):
        for name in (part, part.partition("_")[0]):
            if part in OF:
                return OF[part]
            if name in COMMANDS and not path.startswith(("plugins/", "guest/sdk/")):
                return [name]
    return OPENING


def unknown(path, text):
    """Options that a text advises, and that a command lacks in which it may appear."""
    found = []
    for command, rest in NAMED.findall(text):
        if command not in COMMANDS:
            found.append(f"`instar {command}`")
        else:
            found += [f"{option} of {command}" for option in OPTION.findall(rest.split("'")[0]) if option not in options(command)]
    rest = FOREIGN.sub("", NAMED.sub("", text))
    # Letters mean the same in most commands, and stand for a role (-b, -d) in messages about it.
    for option in set(LONG.findall(rest)) - REFUSED:
        if path == EXPLAIN:
            commands = [command for command in COMMANDS if option in options(command)][:1] or ["any command"]
        else:
            commands = ONLY_OF.get((path, option), commands_of(path))
        found += [f"{option} of {command}" for command in commands if command == "any command" or option not in options(command)]
    return found


@pytest.fixture(scope="module")
def texts():
    return [(path, line) for path, text in messages.collect().items() for line in text.splitlines()]


def test_every_option_that_a_message_advises_exists(texts):
    broken = [f"{path}: {', '.join(sorted(unknown(path, line)))}: {line}" for path, line in texts if unknown(path, line)]
    assert not broken, "\n".join(broken)


def test_it_would_notice():
    assert unknown("engine/src/rebase/open.rs", "wait with --wait SECONDS, or commit with --atomic") == ["--atomic of rebase"]
    assert unknown("engine/src/image/x.rs", "see `instar check --nonesuch`, or `instar mend`") == ["--nonesuch of check", "`instar mend`"]
    assert unknown("engine/src/image/x.rs", "see `instar check -r all`, and give --wait 3") == []
    assert unknown("engine/src/create/x.rs", "wait with --wait 3") == ["--wait of create"]


def test_most_texts_with_options_are_looked_at(texts):
    assert sum(bool(OPTION.search(line)) for _, line in texts) > 80
