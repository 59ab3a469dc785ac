#!/usr/bin/env python3
"""What a program can hold of the rules of language in CONTRIBUTING.md. Run by `make lint`, and with `--subject FILE` by the hook
`commit-msg`.

Phrases that were written again and again and say nothing, misspellings, and British spelling, in Markdown, in manual pages and in
the comments of crates. A rule that finds something in a text that is right is wrong: make it narrower.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import links

ROOT = links.ROOT
#: What to avoid, as a regular expression, and what to write instead.
PHRASES = {
    r"\bwhat is there\b": "name the thing",
    r"\bthose that are there\b": "name the thing",
    r"\bwithout a word\b": "say what did not happen",
    r"\bas if one after the other\b": "in order",
    r"\bare done again\b|\bis done anew\b|\bmeasures? them anew\b": "repeat",
    r"\bsaid there\b": "described under …",
    r"\bin order to\b": "to",
    r"\bplease note\b|\bnote that\b|\bit should be noted\b": "say it",
    r"\bsimply\b|\bobviously\b|\bof course\b": "leave it away",
    r"\butili[sz]e": "use",
    r"\bin case of\b": "if, or on",
    r"\bresp\.": "or",
    r"\binformations\b|\badvices\b|\bsoftwares\b": "has no plural",
    r"\b(?:what|those) there (?:is|are)\b|\bthat there (?:is|are)(?=[.,;:)]|$)": "name the thing",
    r"\bso many (?!(?:\w+ ){0,4}that\b|as\b)": "this many, or `count`",
    r"\bwhoever\b": "name the one who acts",
    r"\ball the same(?=[.,;:)])": "nevertheless",
    r"\banew\b": "again",
    r"\bin the box\b": "bundled",
    r"\bis (?:not )?to matter\b": "must not depend on",
    r"\bfor the sake of\b": "for",
    r"\ballows to\b|\bpermits to\b": "lets you …",
}
SPELLINGS = {
    "behaviour": "behavior", "colour": "color", "neighbour": "neighbor", "honour": "honor", "favour": "favor", "labour": "labor",
    "recognis": "recogniz", "optimis": "optimiz", "serialis": "serializ", "initialis": "initializ", "virtualis": "virtualiz",
    "organis": "organiz", "minimis": "minimiz", "normalis": "normaliz", "summaris": "summariz", "centre": "center", "catalogue": "catalog",
    "analyse": "analyze", "artefact": "artifact", "teh ": "the ", "recieve": "receive", "seperate": "separate", "occured": "occurred",
    "existant": "existent", "accross": "across", "paramter": "parameter", "lenght": "length", "wether": "whether", "dependant": "dependent",
}
#: Texts that quote what is to be avoided, and frozen ones.
SKIPPED = ("CONTRIBUTING.md", "CHANGELOG.md")
#: Crates whose comments are held to the same phrases.
COMMENTED = ("plugin-api/", "guest/", "engine/", "plugins/", "examples/", "fuzz/", "packaging/", "tests/crates/")
COMMENT = re.compile(r"^\s*//[/!]? ?(.*)$")
SUBJECT_WIDTH = 72
#: First words of a change that are no imperative.
NO_IMPERATIVE = re.compile(r"^(?:\w+ed|\w+ing|the|a|an|it|this|that|what|which|who|now|there)\b", re.IGNORECASE)
#: Ends in "-ed" or "-ing", and is an imperative all the same.
IMPERATIVES = {"bring", "embed", "feed", "need", "proceed", "ring", "seed", "shed", "speed", "spring", "string"}


def faults(text: str) -> list[tuple[int, str]]:
    """The lines of a text in which a phrase or a spelling is to be replaced, and by what."""
    found = []
    plain = re.sub(r"`[^`\n]*`|https?://\S+", "", links.prose(text))
    for number, line in enumerate(plain.splitlines(), 1):
        for phrase, better in PHRASES.items():
            match = re.search(phrase, line, re.IGNORECASE)
            if match:
                found.append((number, f'"{match.group()}": {better}'))
        for wrong, right in SPELLINGS.items():
            if re.search(rf"(?i)\b(?:un|re|de)?{wrong}", line):
                found.append((number, f'"{wrong}": {right}'))
    return found


def comments(source: str) -> str:
    """The comments of a source that have lines of their own; its other lines are empty, so that numbers of lines stay right."""
    found = (COMMENT.match(line) for line in source.splitlines())
    return "\n".join(match[1] if match else "" for match in found)


def subject_faults(message: str) -> list[str]:
    """What is wrong with a commit message: `component: imperative`, at most 72 columns, then an empty line and why."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    while lines and not lines[-1].strip():
        lines.pop()
    subject = lines[0] if lines else ""
    if subject.startswith(("Merge ", "Revert ", "fixup! ", "squash! ")):
        return []
    wrong = []
    match = re.fullmatch(r"[a-z0-9][\w./ ,-]*: (\S+)(.*)", subject)
    if len(subject) > SUBJECT_WIDTH:
        wrong.append(f"the subject has {len(subject)} columns, not {SUBJECT_WIDTH} at most")
    if not match:
        wrong.append("the subject is not `component: what the commit does`")
    elif NO_IMPERATIVE.match(match.group(1)) and match.group(1).lower() not in IMPERATIVES:
        wrong.append(f'"{match.group(1)}" is no imperative: say what the commit does, as an order')
    if subject.endswith("."):
        wrong.append("the subject ends with a full stop")
    if len(lines) > 1 and lines[1].strip():
        wrong.append("there is no empty line between subject and body")
    if len(lines) < 3:
        wrong.append("the body is missing: say why")
    wide = [line for line in lines[2:] if len(line) > SUBJECT_WIDTH and " " in line.strip()]
    if wide:
        wrong.append(f"the body is wrapped at {SUBJECT_WIDTH} columns: {wide[0][:40]}…")
    return wrong


def documents() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "docs/man/*", "packaging/assets/sections/*"], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    pages = [page for page in links.pages() if page.name not in SKIPPED]
    return pages + [ROOT / name for name in listed.stdout.split()]


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *(f"{folder}*.rs" for folder in COMMENTED)], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    return [ROOT / name for name in listed.stdout.split()]


def main() -> int:
    if sys.argv[1:2] == ["--subject"]:
        wrong = [f"commit message: {fault}" for fault in subject_faults(Path(sys.argv[2]).read_text(encoding="utf-8"))]
    else:
        wrong = [f"{page.relative_to(ROOT)}:{number}: {fault}" for page in documents()
                 for number, fault in faults(page.read_text(encoding="utf-8"))]
        wrong += [f"{source.relative_to(ROOT)}:{number}: {fault}" for source in sources()
                  for number, fault in faults(comments(source.read_text(encoding="utf-8")))]
    print("\n".join(wrong) or "tests/tools/wording: nothing found", file=sys.stderr if wrong else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
