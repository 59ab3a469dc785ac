"""What OSS-Fuzz is given (fuzz/oss-fuzz): every program, target, option and file that it names exists here."""

from __future__ import annotations

import os
import re
import subprocess

from support import REPO

FOLDER = REPO / "fuzz/oss-fuzz"
BUILD = (FOLDER / "build.sh").read_text()
MAKEFILE = (REPO / "Makefile").read_text()
FUZZER = (REPO / "fuzz/src/main.rs").read_text()


def test_the_script_is_a_script():
    assert os.access(FOLDER / "build.sh", os.X_OK)
    checked = subprocess.run(["bash", "-n", FOLDER / "build.sh"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_it_builds_what_make_builds():
    goals = re.findall(r"(?m)^make (\S+)", BUILD)
    assert goals == ["fuzzer"] and "\nfuzzer:\n" in MAKEFILE
    # Every sanitizer of the project is one that make knows.
    project = (FOLDER / "project.yaml").read_text()
    sanitizers = re.search(r"(?m)^sanitizers:\n((?:  - \w+\n)+)", project)[1].split()[1::2]
    assert sanitizers and all(f"SANITIZE_{name} := " in MAKEFILE for name in sanitizers)
    # The program is where the Makefile's own runner looks for it.
    place = re.search(r"fuzzer=\$PWD/(\S+)", BUILD)[1]
    assert place == re.search(r"fuzzer=\$PWD/(\S+)", (REPO / "fuzz/run.sh").read_text())[1]


def test_a_program_is_a_target_by_its_name():
    prefix = re.search(r"program=\$OUT/(\S+)\$name", BUILD)[1]
    assert f'strip_prefix("{prefix}")' in FUZZER
    for variable in set(re.findall(r"\bFUZZ_[A-Z]+(?==)", BUILD)):
        assert f'"{variable}"' in FUZZER, variable
    # The limits are those of `make fuzz`.
    run = (REPO / "fuzz/run.sh").read_text()
    for name in ("timeout", "rss_limit_mb"):
        assert re.search(rf"{name} = (\d+)", BUILD)[1] == re.search(rf"-{name}=(\d+)", run)[1]


def test_the_image_copies_files_of_this_folder():
    docker = (FOLDER / "Dockerfile").read_text()
    for name in re.findall(r"(?m)^COPY (\S+) ", docker):
        assert (FOLDER / name).is_file(), name
    assert re.search(r"(?m)^WORKDIR \$SRC/(\S+)", docker)[1] == re.search(r'(?m)^cd "\$SRC/(\S+)"', BUILD)[1]
    # What the build calls is installed there, or comes with the base image.
    installed = set(re.search(r"--no-install-recommends ([\w -]+?) &&", docker)[1].split())
    assert installed == {"make", "zip"} and all(re.search(rf"(?m)^ *{tool} ", BUILD) for tool in installed)


def test_who_is_asked_is_who_maintains_it():
    contact = re.search(r'primary_contact: "([^"]+)"', (FOLDER / "project.yaml").read_text())[1]
    assert f"<{contact}>" in (REPO / "MAINTAINERS").read_text()
