"""What contributors are told: rules of language that a program holds, jobs of CI that run here, folders that exist."""

from __future__ import annotations

import re
import subprocess

import pytest
import wording
from support import REPO

MAKEFILES = "\n".join((REPO / name).read_text() for name in ("Makefile", "packaging/packaging.mk"))
WORKFLOWS = sorted((REPO / ".github/workflows").glob("*.yml"))
#: What a job may run besides make: to set up a runner, which a developer's machine is already.
SET_UP = re.compile(r"^(?:sudo )?(?:apt-get (?:update|install)|dnf install)|^cargo install \S+ --version [\d.]+ --locked$|^gh release create")
#: How a job runs make as root, with the runner's own Rust.
AS_ROOT = r'(?:sudo --preserve-env=HOME env PATH="\$PATH" )?'


@pytest.mark.parametrize(("text", "found"), [
    ("We look at what is there.", 1),
    ("The behaviour is the same.", 1),
    ("It is `behaviour` in their code.", 0),
    ("```\nbehaviour\n```", 0),
    ("The parser reads the header and refuses what it cannot hold.", 0),
    ("Please note that this is simply so.", 2),
    ("Whoever lacks one does without.", 1),
    ("A disk of so many bytes.", 1),
    ("It has so many files that a list is slow.", 0),
    ("All names that there are.", 1),
    ("It commits all the same, and says so.", 1),
    ("Two images of all the same size.", 0),
])
def test_phrases(text, found):
    assert len(wording.faults(text)) == found


def test_comments_are_held_to_the_same_phrases():
    source = "//! Whoever asks.\nlet whoever = 1; // A trailing one is short.\n    /// Made anew.\n"
    assert wording.comments(source) == "Whoever asks.\n\nMade anew."
    assert [line for line, _ in wording.faults(wording.comments(source))] == [1, 3]
    assert len(wording.sources()) > 100


@pytest.mark.parametrize(("message", "found"), [
    ("commit: verify what was written\n\nA crash could hide it.\n", 0),
    ("commit: verified what was written\n\nA crash could hide it.\n", 1),
    ("commit: what was written is verified\n\nA crash could hide it.\n", 1),
    ("verify what was written\n\nA crash could hide it.\n", 1),
    ("commit: verify what was written.\n\nA crash could hide it.\n", 1),
    ("commit: verify what was written\n", 1),
    ("commit: verify what was written\nA crash could hide it.\n", 2),
    (f"commit: verify {'x' * 80}\n\nA crash could hide it.\n", 1),
    (f"commit: verify what was written\n\nA crash {'could ' * 20}\n", 1),
    ("commit: verify what was written\n\nWhy.\n# A comment of git\n", 0),
    ("Merge branch 'main'\n", 0),
])
def test_commit_subjects(message, found):
    assert len(wording.subject_faults(message)) == found


def test_the_hooks_hold_them():
    hooks = (REPO / ".pre-commit-config.yaml").read_text()
    assert "wording.py --subject" in hooks and "stages: [commit-msg]" in hooks
    assert all(f"tests/tools/{tool}.py" in MAKEFILES for tool in ("links", "wording", "markdown_width"))


def test_every_job_of_ci_runs_here():
    assert len(WORKFLOWS) == 3
    for workflow in WORKFLOWS:
        text = workflow.read_text()
        commands = re.findall(r"(?m)^\s+(?:- )?run: (.*)$", text)
        assert commands and text.count("run:") == len(commands), f"{workflow.name}: one line each"
        for command in commands:
            for part in command.split(" && "):
                target = re.match(rf"{AS_ROOT}make (\S+)", part)
                if target is None:
                    assert SET_UP.match(part), f"{workflow.name}: {part}"
                elif target[1].startswith("$"):
                    targets = re.search(r"target: \[(.*)\]", text)[1].split(", ")
                    assert targets and all(re.search(rf"(?m)^{name}:.*## ", MAKEFILES) for name in targets)
                else:
                    assert re.search(rf"(?m)^{target[1]}:.*## ", MAKEFILES), f"{workflow.name}: no target {target[1]}"


def test_actions_are_pinned_and_jobs_may_only_read():
    """A tag can be moved, a commit cannot. Only the job that drafts a release may write, and it runs no code of the checkout."""
    for workflow in WORKFLOWS:
        text = workflow.read_text()
        used = re.findall(r"uses: (.*)", text)
        assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used), used
        assert text.count("actions/checkout@") == text.count("with: {persist-credentials: false}")
        assert re.search(r"(?m)^permissions:\n  contents: read\n", text)
        jobs = re.split(r"(?m)^  (?=[\w-]+:$)", text.split("\njobs:\n")[1])
        for job in filter(None, jobs):
            assert "timeout-minutes:" in job, f"{workflow.name}: {job.splitlines()[0]} may run for hours"
            assert ": write" not in job or ("run: make" not in job and "actions/checkout@" not in job), f"{workflow.name}: {job}"


def test_the_oldest_rust_is_that_of_the_manifest():
    version = re.search(r'(?m)^rust-version = "(.*)"', (REPO / "Cargo.toml").read_text())[1]
    assert set(re.findall(r"rust:([\d.]+)-slim", (REPO / ".github/workflows/ci.yml").read_text())) == {version}
    assert f"Rust {version} or later" in (REPO / "CONTRIBUTING.md").read_text()


def test_the_folders_and_targets_that_contributors_are_sent_to_exist():
    text = (REPO / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:engine|guest|plugins|plugin-api|docs|tests|packaging)(?:/[\w.-]+)*)`", text):
        if "NAME" not in name and "COMMAND" not in name:
            assert (REPO / name).exists(), name
    for target in re.findall(r"`?make ([a-z-]+)", text):
        assert target in ("targets",) or re.search(rf"(?m)^{target}:", MAKEFILES), target
    for crate in re.findall(r"-p (instar-[a-z0-9-]+)", text):
        known = subprocess.run(["git", "grep", "-l", f'^name = "{crate}"', "--", "*Cargo.toml"], cwd=REPO, capture_output=True, text=True, check=False)
        assert known.stdout, crate


#: Traits without an example of their own: those of private modules, one that only runs in a guest, and two that the examples of what uses them have.
WITHOUT_EXAMPLE = {"Seek", "Processor", "Place", "Task", "Exit", "Builder", "Decoder"}


def test_each_public_trait_has_an_example():
    found, without = 0, set()
    for folder in ("plugin-api/src", "guest/sdk/src", "guest/core/src", "engine/src"):
        for source in sorted((REPO / folder).rglob("*.rs")):
            for documented, name in re.findall(r"(?m)((?:^ *(?:///.*|#\[.*)\n)*)^ *pub trait (\w+)", source.read_text(encoding="utf-8")):
                found += 1
                if "/// ```" not in documented:
                    without.add(name)
    assert found > 20 and without == WITHOUT_EXAMPLE
