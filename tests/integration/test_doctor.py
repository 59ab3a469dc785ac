"""`instar doctor`: what is wrong with a machine, and what to do about it."""

from __future__ import annotations

import os
import shutil

import pytest
import support
from support import BUNDLED


def doctor(*args, **kwargs):
    result = support.run_instar("doctor", "--output", "json", *args, **kwargs)
    assert result.stderr == "", str(result)
    return result.rc, result.json


def parts(answer, name):
    return [part for part in answer["parts"] if part["part"] == name]


def without_kvm(script):
    """The doctor in a mount namespace of its own that a script has prepared."""
    become_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = f'{script} && exec "$0" doctor --sandbox kvm --output json'
    result = support.run("unshare", *become_root, "--mount", "sh", "-c", command, support.instar_binary())
    assert result.rc == 1 and result.stderr == "", str(result)
    assert result.json["state"] == "broken"
    [kvm] = parts(result.json, "kvm")
    assert kvm["state"] == "broken"
    # Everything else was looked at all the same.
    assert [part["state"] for part in parts(result.json, "plugin")] == ["ok"] * len(BUNDLED)
    return kvm


def test_a_machine_that_is_well():
    status, answer = doctor()
    assert status == 0 and answer["state"] in ("ok", "weak")
    names = {"kvm", "process", "landlock", "seccomp", "configuration", "plugin"}
    assert {part["part"] for part in answer["parts"]} == names
    for sandbox in support.SANDBOXES if support.KVM else ["process"]:
        [part] = parts(answer, sandbox)
        assert part["state"] == "ok" and "ring 3" in part["found"] and part["remedy"] is None
    assert [part["found"].split()[0] for part in parts(answer, "plugin")] == list(BUNDLED)
    human = support.run_instar("doctor")
    assert human.rc == 0 and human.stdout.endswith((f"Commits work here, in the sandbox {support.SANDBOX}.\n", "with the weaknesses above.\n"))
    assert f"ok       {support.SANDBOX}: a guest started" in human.stdout
    assert answer["sandbox"] == support.SANDBOX


def test_no_device():
    kvm = without_kvm("mount -t tmpfs none /dev")
    assert "does not exist" in kvm["found"] and ("modprobe" in kvm["remedy"] or "nested" in kvm["remedy"])


needs_kvm = pytest.mark.skipif(not support.KVM, reason="this machine has no /dev/kvm")


@needs_kvm
def test_a_device_that_is_none():
    kvm = without_kvm("mount --bind /dev/null /dev/kvm")
    assert "cannot run a virtual machine" in kvm["found"] and "is not the kernel's device" in kvm["remedy"]


@needs_kvm
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_no_permission(tmp_path):
    """Of a group that owns the device, the name is said."""
    node = tmp_path / "kvm"
    os.mknod(node, 0o020660, os.stat("/dev/kvm").st_rdev)
    os.chown(node, 0, 1)
    script = f"mount --bind {node} /dev/kvm"
    command = f'{script} && exec setpriv --reuid 65534 --regid 65534 --clear-groups "$0" doctor --sandbox kvm --output json'
    result = support.run("unshare", "--mount", "sh", "-c", command, support.instar_binary())
    assert result.rc == 1, str(result)
    [kvm] = parts(result.json, "kvm")
    assert "no permission" in kvm["found"] and "usermod -aG daemon" in kvm["remedy"]


def test_configuration_that_is_wrong(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(support.configuration("no = such = thing\n"))
    status, answer = doctor(env={"INSTAR_CONFIG": str(config)})
    [configuration] = parts(answer, "configuration")
    assert status == 1 and configuration["state"] == "broken" and str(config) in configuration["found"]
    assert configuration["remedy"]


def test_plugins_that_are_missing_or_skipped(tmp_path):
    alone = tmp_path / "instar"
    shutil.copy(support.instar_binary(), alone)
    result = support.run(alone, "doctor", env={"INSTAR_PLUGIN_PATH": ""})
    broken = "none is loaded" in result.stdout
    assert broken == (result.rc == 1), str(result)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "libinstar_plugin_bad.so").write_bytes(b"not a library")
    status, answer = doctor("--plugin-dir", tmp_path / "plugins")
    skipped = [part for part in parts(answer, "plugin") if part["state"] == "weak"]
    assert status == 0 and answer["state"] == "weak" and len(skipped) == 1
    assert "libinstar_plugin_bad.so" in skipped[0]["found"] and skipped[0]["remedy"]
