"""All texts for users, as a whole: a snapshot, and the rules that hold for each."""

from __future__ import annotations

import re

import messages
import pytest

#: How texts do not read, and how they do.
RULES = {
    r"\?$|\? ": "a message asks nobody anything",
    r"\bfree space on its\b": "reads as a noun: make room on",
    r"\b(recogni|normali|initiali|minimi|optimi)s(e|ed|es|ing)\b|\blicence\b|\bcolour\b": "American spelling",
    r"\bwithout a word\b|\bwhich means nothing\b|\bno part of a commit\b": "see the snapshot for how it reads",
    r"\bhelper\b|design\.md": "names what a user does not have",
    r"\bos error \{": "the system's reason, without Rust's number",
}
#: Not everybody has them.
QEMU_TOOLS = re.compile(r"`qemu-")
#: Formats of QEMU may name its tools. Other formats do where instar cannot read the image, or not mend it.
MAY_NAME_THEM = ("plugins/qcow2/", "plugins/qcow/", "plugins/vdi/driver/src/mend.rs", "plugins/vmdk/format/src/extent.rs",
                 "plugins/parallels/src/facts.rs")


def lines():
    return [(path, line) for path, text in messages.collect().items() for line in text.splitlines()]


def test_the_snapshot_has_every_text():
    assert messages.snapshot() == messages.collect(), "python3 tests/tools/messages.py writes it anew: read the difference"


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    broken = [f"{path}: {line}" for path, line in lines() if re.search(rule, line, re.IGNORECASE)]
    # The two texts about locks and formats that are unknown are QEMU's words.
    broken = [line for line in broken if "Is another process using" not in line and "the format is not recognised" not in line]
    assert not broken, RULES[rule] + "\n" + "\n".join(broken)


def test_only_a_format_names_a_tool_for_it():
    broken = [f"{path}: {line}" for path, line in lines() if QEMU_TOOLS.search(line) and not path.startswith(MAY_NAME_THEM)]
    assert not broken, "\n".join(broken)


def test_the_collector_sees_what_it_should():
    source = '''
    /// "not a message here"
    let a = "the file is \\
             gone";
    let b = format!("cannot be opened: {error} (\\"x\\")"); // "nor this one here"
    let c = ["word", "--option", "{\\"json\\": 1}"];
    #[error("guest panic: {0}")]
    #[cfg(test)]
    mod tests { const X: &str = "only in a test"; }
    '''.replace("    #[cfg", "#[cfg")
    found = [text for text in messages.literals(source) if messages.is_message(text)]
    assert found == ["the file is gone", 'cannot be opened: {error} (\\"x\\")', "guest panic: {0}"]
