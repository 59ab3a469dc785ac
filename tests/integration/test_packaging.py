"""What is made for packages: manual pages, completions, and what `make install` puts where."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import support
from support import BUNDLED, REPO, run, run_instar

ASSETS = REPO / "target" / "assets"
MAN = ASSETS / "man"
COMPLETIONS = {shell: ASSETS / "completions" / path for shell, path in
               {"bash": "bash/instar", "zsh": "zsh/_instar", "fish": "fish/instar.fish"}.items()}


def help_of(*command):
    result = run_instar(*command, "--help")
    assert result.rc == 0, str(result)
    return result.stdout


def commands():
    listed = help_of().split("Commands:\n")[1].split("\n\n")[0]
    names = re.findall(r"^  (\w+)  ", listed, re.MULTILINE)
    names.remove("help")
    assert {"commit", "create"} <= set(names)
    return names


def options_of(command):
    """Long and short options, as `--help` lists them."""
    listed = re.findall(r"^ +(?:(-\w)(?:, |$| ))?(--[\w-]+)?", help_of(*command).split("Options:\n")[1], re.MULTILINE)
    names = {name for pair in listed for name in pair if name}
    assert "--help" in names
    return names


def text_of(page):
    """A page without the formatter's escapes."""
    return re.sub(r"\\f[BIRP]", "", (MAN / page).read_text()).replace("\\-", "-")


@pytest.fixture(scope="module", autouse=True)
def made():
    assert MAN.is_dir(), "run `make instar`"


def test_every_command_and_option_is_in_its_page_and_in_the_completions():
    completions = {shell: path.read_text() for shell, path in COMPLETIONS.items()}
    for command in commands():
        page = text_of(f"instar-{command}.1")
        assert f"instar-{command}(1)" in text_of("instar.1")
        for option in options_of([command]):
            assert re.search(rf"(?m)^(-\w, )?{option}\b", page), f"{option} is not in instar-{command}.1"
        for shell, text in completions.items():
            assert re.search(rf"\b{command}\b", text), f"{command} is not completed in {shell}"
        for option in options_of([command]):
            assert option in bash_offers(completions["bash"], command), f"{command} {option} is not completed in bash"
            assert option in zsh_offers(completions["zsh"], command), f"{command} {option} is not completed in zsh"
            assert fish_offers(completions["fish"], command, option), f"{command} {option} is not completed in fish"


def bash_offers(text, command):
    return re.search(rf'instar__subcmd__{command}\)\n\s+opts="([^"]*)"', text)[1].split()


def zsh_offers(text, command):
    block = re.search(rf"(?ms)^\s*\({command}\)$(.*?)^;;$", text)[1]
    return set(re.findall(r"(?m)^'(?:\([^)]*\))?\*?(--?[\w-]+?)[=+\[]", block))


def fish_offers(text, command, option):
    flag = rf"-l {option[2:]}\b" if option.startswith("--") else rf"-s {option[1:]}\b"
    return re.search(rf'(?m)__fish_instar_using_subcommand {command}".*{flag}', text)


def test_completions_of_bash_work():
    script = f'source {COMPLETIONS["bash"]}; COMP_WORDS=(instar commit --res) COMP_CWORD=2; ' \
        '_instar instar --res commit; echo "${COMPREPLY[@]}"'
    result = run("bash", "-c", script)
    assert (result.stdout, result.stderr) == ("--resize-backing\n", ""), str(result)


@pytest.mark.parametrize(
    ("words", "offered"),
    [(["commit", ""], {"image one", "images"}), (["commit", "-q", ""], {"image one", "images"}), (["check", "im"], {"image one", "images"}),
     (["commit", "-f", ""], {"parallels", "qcow", "qcow2", "raw", "vdi", "vhdx", "vmdk", "vpc"}), (["create", "--backing-format", "v"], {"vdi", "vhdx", "vmdk", "vpc"}),
     (["commit", "-b", "image "], {"image one"}), (["commit", "-r", "im"], {"im"}), (["doctor", "--o"], {"--output"}),
     (["map", "--output", ""], {"human", "json"}), (["explain", "error_no_s"], {"ERROR_NO_SPACE"}), (["wor"], set()), (["explain", "--o"], {"--output"})],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_completions_of_bash_offer_what_is_meant(tmp_path, words, offered):
    """Files where an image is wanted, formats for a format, never a lone `-`."""
    (tmp_path / "image one").touch()
    (tmp_path / "images").mkdir()
    script = f'compopt() {{ :; }}; source {COMPLETIONS["bash"]}; COMP_WORDS=(instar "$@") COMP_CWORD=$#; ' \
        '_instar instar "${!#}" "${COMP_WORDS[COMP_CWORD-1]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    result = run("bash", "-c", script, "bash", *words, cwd=tmp_path)
    assert (set(result.stdout.split("\n")) - {""}, result.stderr) == (offered, ""), str(result)


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [(["info", ""], -1, {"base.qcow2", "sub"}), (["info", "note"], -1, {"notes.txt"}), (["compare", "b"], -1, {"base.qcow2"}),
     (["rebase", "-b", ""], -1, {"base.qcow2", "sub"}), (["commit", "--relink", "s"], -1, {"sub"}), (["convert", "-O", "vh"], -1, {"vhd", "vhdx"}),
     (["commit", "-b", ""], -1, {"base.qcow2", "sub"}), (["commit", "sub/top\\ one.qcow2", "-b", ""], -1, {"mid.qcow2", "../base.qcow2"}),
     (["commit", "-b", "", "sub/top\\ one.qcow2"], 3, {"mid.qcow2", "../base.qcow2"}), (["commit", "sub/mid.qcow2", "-b", ".."], -1, {"../base.qcow2"}),
     (["measure", "--commit", "sub/mid.qcow2", "--base", ""], -1, {"../base.qcow2"}),
     (["create", "-f", "vmdk", "-o", "sub"], -1, {"subformat="}), (["create", "-o", "pre", "-f", "qcow2"], 3, {"preallocation="}),
     (["create", "-f", "qcow2", "-o", "cluster_size", "=", "64k,comp"], -1, {"64k,compat=", "64k,compression_type="}),
     (["create", "-f", "qcow2", "-o", "cluster_size", "=", ""], -1, set()), (["convert", "-O", "qcow2", "-o", "ref"], -1, {"refcount_bits="}),
     (["measure", "--target-format", "=", "qcow2", "--options", "=", "ref"], -1, {"refcount_bits="}),
     (["measure", "-O", "qcow2", "--options", "="], -1, {"cluster_size=", "compat=", "refcount_bits=", "lazy_refcounts=", "compression_type=",
                                                        "extended_l2=", "preallocation="})],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_completions_of_bash_ask_the_program(tmp_path, words, at, offered):
    """Images before other files, the formats that are installed under all their names, and for -b what is below the overlay."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "notes.txt").touch()
    support.create(tmp_path / "base.qcow2", support.MIB)
    support.create(tmp_path / "sub/mid.qcow2", backing="../base.qcow2")
    support.create(tmp_path / "sub/top one.qcow2", backing="mid.qcow2")
    (tmp_path / "instar").symlink_to(support.instar_binary())
    script = f'compopt() {{ :; }}; source {COMPLETIONS["bash"]}; program=$1; at=$2; shift 2; COMP_WORDS=("$program" "$@"); ' \
        '((COMP_CWORD = at < 0 ? $# : at)); _instar "$program" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    result = run("bash", "-c", script, "bash", tmp_path / "instar", str(at), *words, cwd=tmp_path)
    assert (set(result.stdout.split("\n")) - {""}, result.stderr) == (offered, ""), str(result)


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "offered"),
    [("create -f vmdk -o sub", {"subformat="}), ("create -f qcow2 -o cluster_size=64k,comp", {"cluster_size=64k,compat=", "cluster_size=64k,compression_type="}),
     ("convert --target-format=qcow2 --options=ref", {"--options=refcount_bits="}), ("explain ERROR_NO_S", {"ERROR_NO_SPACE"}), ("wor", set()),
     ("measure -O qcow2 -o ref", {"refcount_bits="}), ("rebase -F vh", {"vhd", "vhdx"})])
def test_completions_of_fish_ask_the_program(tmp_path, line, offered):
    (tmp_path / "instar").symlink_to(support.instar_binary())
    script = f"set -x PATH {tmp_path} $PATH; source {COMPLETIONS['fish']}; complete -C 'instar {line}'"
    result = run("fish", "--no-config", "-c", script, cwd=tmp_path)
    assert ({word.split("\t")[0] for word in result.stdout.splitlines()}, result.stderr) == (offered, ""), str(result)


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "completed"),
    [("create -f vmdk -o sub", "create -f vmdk -o subformat="), ("create -f qcow2 -o cluster_size=64k,ref", "-o cluster_size=64k,refcount_bits="),
     ("convert --target-format=qcow2 -o ref", "-o refcount_bits="), ("explain error_no_s", "ERROR_NO_SPACE ")])
def test_completions_of_zsh_ask_the_program(tmp_path, line, completed):
    (tmp_path / "instar").symlink_to(support.instar_binary())
    (tmp_path / ".zshrc").write_text(f"PROMPT='ready> '; fpath=({COMPLETIONS['zsh'].parent} $fpath); path=({tmp_path} $path)\n"
                                     "autoload -Uz compinit; compinit -u -D\n")
    master, slave = pty.openpty()
    shell = subprocess.Popen(["zsh", "-i"], stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, start_new_session=True,
                             env={**os.environ, "ZDOTDIR": str(tmp_path), "TERM": "dumb"})
    os.close(slave)
    try:
        shown = until(master, "ready> ")
        os.write(master, f"instar {line}\t".encode())
        assert completed in until(master, completed), shown
    finally:
        shell.kill()
        shell.wait()
        os.close(master)


def until(terminal, words, seconds=20):
    """What a terminal shows until it shows these words, or time is up."""
    shown, end = "", time.monotonic() + seconds
    while words not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 1 << 16).decode().replace("\r", "")
    return shown


def test_completions_of_other_shells_offer_formats():
    for shell in ("zsh", "fish"):
        text = COMPLETIONS[shell].read_text()
        assert "qcow2" in text and "_default'" not in text, shell
    assert not [shell for shell, path in COMPLETIONS.items() if "worker" in path.read_text()]


def test_pages_render_without_a_warning():
    pages = sorted(MAN.iterdir())
    assert len(pages) >= len(commands()) + 1 + len(BUNDLED)
    for page in pages:
        result = run("mandoc", "-T", "lint", page)
        # It looks for the pages that an mdoc page names on this machine: ours have to be here, others need not be installed.
        named = re.findall(r"referenced manual not found: Xr (instar\S*) (\d)", result.stdout)
        assert all((MAN / ".".join(other)).exists() for other in named), str(result)
        told = [line for line in result.stdout.splitlines() if "referenced manual not found" not in line]
        assert not told, str(result)


def test_pages_that_are_referred_to_are_there():
    there = {page.name for page in MAN.iterdir()}
    for page in there:
        for name, section in re.findall(r"\b(instar[\w-]*)\s?\((\d)\)", re.sub(r"(?m)^\.BR ", "", text_of(page))):
            assert f"{name}.{section}" in there, f"{page} refers to {name}({section})"


def test_the_page_of_commit_has_its_sections_and_all_error_codes():
    page = text_of("instar-commit.1")
    for section in ("SYNOPSIS", "OPTIONS", "EXIT STATUS", "ERRORS", "ENVIRONMENT", "FILES", "EXAMPLES", '"SEE ALSO"'):
        assert re.search(rf"(?m)^\.SH {section}$", page.replace(".SH SEE ALSO", '.SH "SEE ALSO"')), section
    missing = [name for name, code in support.CODES.items() if f".B {code} {name}\n" not in page]
    assert not missing and support.CODES


def test_pages_of_plugins_say_what_the_plugins_say():
    plugins = {plugin["name"]: plugin for plugin in run_instar("plugins", "--output", "json").json["plugins"]}
    for name in BUNDLED:
        page = text_of(f"instar-plugin-{name}.7")
        plain = " ".join(page.split())
        assert f"instar-plugin-{name} - {plugins[name]['description']}, for instar" in plain
        for option in plugins[name]["create-options"]:
            value = option["help"][0].upper() + option["help"][1:]
            assert re.search(rf"\.B {option['name']} {re.escape(value)}", plain, re.IGNORECASE), option
        assert "@" not in page


def test_the_configuration_names_every_key_and_is_accepted(tmp_path):
    text = (REPO / "packaging" / "config.toml").read_text()
    assert tomllib.loads(text) == {}, "everything is commented out"
    bare = re.sub(r"(?m)^#(?=[a-z-]+ = )", "", text)
    config = tmp_path / "config.toml"
    config.write_text(bare)
    config.chmod(0o644)
    result = support.run_instar("config", "--output", "json", env={"INSTAR_CONFIG": str(config)})
    assert result.rc == 0, str(result)
    keys = set(result.json) - {"files"}
    assert set(tomllib.loads(bare)) == keys
    for key in keys:
        # Directories are a list; there is one sandbox.
        values = result.json[key] if isinstance(result.json[key], list) else [result.json[key]]
        assert any(value["from"] == str(config) for value in values), key


def make(*arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "INSTAR_BIN")}
    done = subprocess.run(["make", "--no-print-directory", "-C", REPO, *arguments], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_installed_works_where_it_is_and_is_removed_again(tmp_path):
    where = [f"DESTDIR={tmp_path}/root", "PREFIX=/opt/instar"]
    assert "cargo build" not in make("install", *where), "installing must not need a tool chain"
    prefix = tmp_path / "root/opt/instar"
    program = prefix / "bin/instar"
    listed = run(program, "plugins", "--output", "json").json
    assert {plugin["path"] for plugin in listed["plugins"]} == \
        {str(prefix / f"lib/instar/plugins/libinstar_plugin_{name}.so") for name in BUNDLED} and not listed["skipped"]
    for args in (["-f", "raw", "base", "1M"], ["-f", "qcow2", "-b", "base", "-F", "raw", "top"]):
        assert run(program, "create", "-q", *args, cwd=tmp_path).rc == 0
    support.qemu_io(tmp_path / "top", "write -P 7 64k 4k")
    assert run(program, "commit", "-q", tmp_path / "top").rc == 0
    assert (tmp_path / "base").read_bytes() == bytes(65536) + b"\7" * 4096 + bytes((1 << 20) - 65536 - 4096)
    for path in ("share/man/man1/instar-commit.1", "share/man/man7/instar-plugin-vmdk.7", "share/doc/instar/docs/commit.md",
                 "share/doc/instar/docs/schemas/commit.json", "share/bash-completion/completions/instar", "share/zsh/site-functions/_instar"):
        assert (prefix / path).is_file(), path
    config = tmp_path / "root/etc/instar/config.toml"
    with config.open("a") as file:
        file.write("plugin-dirs = []\n")
    changed = config.read_text()
    make("install", *where)
    make("uninstall", *where)
    left = [path for path in (tmp_path / "root").rglob("*") if not path.is_dir()]
    assert left == [config] and config.read_text() == changed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_installs_below_a_prefix_of_their_own():
    """As README.md says: without root, and so without a configuration in /etc."""
    user = ["setpriv", "--reuid=61001", "--regid=61001", "--clear-groups"]
    if run(*user, "test", "-r", REPO / "Makefile").rc != 0:
        pytest.skip("another user cannot read this checkout")
    with tempfile.TemporaryDirectory(prefix="instar-user.") as home:
        os.chown(home, 61001, 61001)
        made = run(*user, "make", "-s", "-C", REPO, "install", f"PREFIX={home}/.local", env={"HOME": home})
        assert made.rc == 0, str(made)
        listed = run(*user, f"{home}/.local/bin/instar", "plugins", "--output", "json", env={"HOME": home}).json
        assert {plugin["name"] for plugin in listed["plugins"]} == set(BUNDLED) and not listed["skipped"]


def test_documentation_that_is_installed_leads_nowhere_else(tmp_path):
    """Links of the installed README.md and docs/*.md are to what is installed with them; in the sources they lead somewhere."""
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/usr")
    root = tmp_path / "usr/share/doc/instar"
    pages = [path.relative_to(root) for path in root.rglob("*.md")]
    assert {"README.md", "SECURITY.md", "docs/commit.md"} <= {str(page) for page in pages}
    for page in pages:
        for where in (root, REPO):
            for target in re.findall(r"\]\((?!https?:)([^)#:]+)[^)]*\)", (where / page).read_text()):
                assert (where / page.parent / target).exists(), f"{where / page}: {target}"
