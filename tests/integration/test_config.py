"""Configuration files: what they settle, where `instar config` says that it comes from, and what is refused."""

from __future__ import annotations

import os
import shutil

import pytest
import support
from support import MIB, REPO


@pytest.fixture
def home(tmp_path):
    """A home of its own; nothing of the machine's configuration counts but the system's file."""
    (tmp_path / "home/.config/instar").mkdir(parents=True)
    return tmp_path / "home"


def write(home, text):
    path = home / ".config/instar/config.toml"
    path.write_text(text)
    path.chmod(0o644)
    return path


def instar(home, *args, **more):
    """With the files, not without them as all other tests. (An absent variable is none: see `files` in the engine.)"""
    env = {key: value for key, value in os.environ.items() if key not in ("INSTAR_CONFIG", "XDG_CONFIG_HOME")}
    argv = ["env", "-i", *(f"{key}={value}" for key, value in {**env, "HOME": home, **more}.items())]
    return support.run(*argv, support.instar_binary(), *args)


def outside(pair, tmp_path):
    """A pair whose backing lies in another directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    support.create(elsewhere / "base.qcow2", 4 * MIB)
    support.create(pair.top, backing=str(elsewhere / "base.qcow2"))
    support.qemu_io(pair.top, "write -P 9 0 64k")
    return elsewhere


def test_a_directory_for_backings(pair, tmp_path, home):
    elsewhere = outside(pair, tmp_path)
    with support.untouched(pair.top, elsewhere / "base.qcow2"):
        support.assert_refused(instar(home, "commit", pair.top, "--output", "json"), "ERROR_WRITE_TARGET_NOT_ALLOWED")
    write(home, support.configuration(f'allow-backing-dirs = ["/no/such/directory", "{elsewhere}"]\n'))
    result = instar(home, "commit", pair.top)
    assert result.rc == 0, str(result)
    support.qemu_io(elsewhere / "base.qcow2", "read -P 9 0 64k")


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("allow-backing-dir = []\n", 0o644, ["line 1", "allow-backing-dir"]),
        ("plugin-dirs = [\"here\"]\n", 0o644, ["plugin-dirs", "absolute"]),
        ("\nnonsense\n", 0o644, ["line 2"]),
        ("plugin-dirs = []\n", 0o666, ["writable by others"]),
    ],
)
def test_a_file_that_is_refused(pair, home, text, mode, words):
    pair.make(top=["write -P 9 0 64k"])
    path = write(home, text)
    path.chmod(mode)
    with support.untouched(pair.top, pair.base):
        result = instar(home, "commit", pair.top)
    assert result.rc == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1, str(result)
    assert all(word in result.stderr for word in [str(path), *words]), result.stderr
    for command in (["plugins"], ["config"], ["info", pair.top]):
        assert instar(home, *command).stderr == result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(("mode", "word"), [(0o700, "cannot be read: Permission denied"), (0o755, "belongs to another user")])
def test_another_users_file_does_not_count(home, tmp_path, mode, word):
    """`sudo -u` without `-H`: HOME is that of whoever logged in."""
    path = write(home, 'plugin-dirs = ["/no/such"]\n')
    for directory in (home, *home.rglob("*")):
        os.chown(directory, 12345, 12345)
    home.chmod(mode)
    reach = [parent for parent in home.parents if parent.stat().st_mode & 0o005 != 0o005 and parent.stat().st_uid == 0]
    modes = {parent: parent.stat().st_mode & 0o7777 for parent in reach}
    try:
        for parent in reach:
            parent.chmod(0o755)
        program = tmp_path / "instar"
        shutil.copy(support.instar_binary(), program)
        who = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", program]
        human = support.run(*who, "config", env={"HOME": str(home), "INSTAR_CONFIG": ""})
        assert human.rc == 0 and human.stderr == "", "an empty name is no file"
        env = ["env", "-u", "INSTAR_CONFIG", "-u", "XDG_CONFIG_HOME", f"HOME={home}"]
        human = support.run(*env, *who, "config")
        assert human.rc == 0 and "/no/such" not in human.stdout, str(human)
        assert human.stderr.startswith("instar: warning: ") and word in human.stderr and str(path) in human.stderr
        assert "is ignored" in human.stderr and len(human.stderr.splitlines()) == 1
        result = support.run(*env, *who, "config", "--output", "json")
        assert result.rc == 0 and result.stderr == "" and word in result.json["warnings"][0], str(result)
        named = support.run("env", f"INSTAR_CONFIG={path}", *who, "config")
        assert named.rc == 1, "what is named is wanted: " + str(named)
    finally:
        for parent, was in modes.items():
            parent.chmod(was)


def test_plugins_of_a_directory(home, tmp_path):
    plugins = tmp_path / "plugins"
    plugins.mkdir(mode=0o755)
    shutil.copy(REPO / "target/release/libinstar_plugin_raw.so", plugins / "libinstar_plugin_other.so")
    write(home, f'plugin-dirs = ["{plugins}"]\n')
    found = instar(home, "plugins", "--output", "json").json
    assert str(plugins) in found["search-path"]
    # Two plugins claim raw now.
    assert "other" in str(found)


def test_where_values_come_from(home, tmp_path):
    path = write(home, 'allow-backing-dirs = ["/srv/images"]\nplugin-dirs = ["/opt/formats"]\n')
    args = ["config", "--allow-backing-dir", "/mnt", "--plugin-dir", "/given"]
    found = instar(home, *args, "--output", "json", INSTAR_PLUGIN_PATH="/environment").json
    origin = {key: {value["path"]: value["from"] for value in found[key]} for key in ("allow-backing-dirs", "plugin-dirs")}
    assert origin["allow-backing-dirs"] == {"/mnt": "--allow-backing-dir", "/srv/images": str(path)}
    plugins = origin["plugin-dirs"]
    assert list(plugins)[:3] == ["/given", "/environment", "/opt/formats"]
    assert [plugins[key] for key in ("/given", "/environment", "/opt/formats")] == [
        "--plugin-dir", "INSTAR_PLUGIN_PATH", str(path)]
    assert plugins["/usr/lib/instar/plugins"] == "built in"
    files = {file["path"]: file["read"] for file in found["files"]}
    assert files[str(path)] is True and "/etc/instar/config.toml" in files
    text = instar(home, *args).stdout
    assert f"/srv/images (from {path})" in text and "/mnt (from --allow-backing-dir)" in text


def test_a_file_that_is_named_has_to_be_there(home, tmp_path):
    for command in (["config"], ["doctor"], ["commit", tmp_path / "top"]):
        result = instar(home, *command, INSTAR_CONFIG=str(tmp_path / "absent"))
        assert result.rc == 1 and "INSTAR_CONFIG names it" in result.stdout + result.stderr, str(result)


def test_another_file_or_none(home, tmp_path):
    write(home, 'allow-backing-dirs = ["/srv/images"]\n')
    other = tmp_path / "other.toml"
    other.write_text('allow-backing-dirs = ["/srv/others"]\n')
    other.chmod(0o644)
    for variable, wanted in ((str(other), ["/srv/others"]), ("", [])):
        found = instar(home, "config", "--output", "json", INSTAR_CONFIG=variable).json
        assert [value["path"] for value in found["allow-backing-dirs"]] == wanted
    elsewhere = home / "xdg/instar"
    elsewhere.mkdir(parents=True)
    shutil.copy(other, elsewhere / "config.toml")  # with its mode
    found = instar(home, "config", "--output", "json", XDG_CONFIG_HOME=str(home / "xdg")).json
    assert [value["path"] for value in found["allow-backing-dirs"]] == ["/srv/others"]
