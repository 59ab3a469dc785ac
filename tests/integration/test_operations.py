"""The examples of docs/operations.md: each is taken out of the page, and what it runs is run as it says."""

from __future__ import annotations

import json
import re
import shlex

import allowed_calls
import container
import pytest
import support
import yaml
from inside import Inside, ORDINARY
from support import REPO

PAGE = (REPO / "docs/operations.md").read_text()
LIST_OF = {"RuntimeDefault": "containerd"}


def blocks(language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", PAGE)


def one(found):
    [value] = found
    return value


DOCUMENTS = [yaml.safe_load(text) for text in blocks("yaml")]


def kinds(kind):
    return one(document for document in DOCUMENTS if document.get("kind") == kind)


@pytest.fixture
def inside():
    with Inside.make() as made:
        yield made


def of_pod(spec):
    """The arguments of a pod's only container, and the options of a container that is held as the pod says."""
    only = one(spec["containers"])
    for_pod, for_container = spec["securityContext"], only["securityContext"]
    assert for_pod["runAsNonRoot"] is True and for_pod["runAsUser"] > 0
    assert for_pod["fsGroup"] == for_pod["runAsGroup"], "the volume is the user's"
    assert for_container == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                             "capabilities": {"drop": ["ALL"]}}
    volume, mounted = one(spec["volumes"]), one(only["volumeMounts"])
    assert volume["name"] == mounted["name"]
    where = mounted["mountPath"]
    # The image's own folder.
    assert f"WORKDIR {where}\n" in (REPO / "Dockerfile").read_text()
    options = ["--user", str(for_pod["runAsUser"]), "--list", LIST_OF[for_pod["seccompProfile"]["type"]],
               "--writable", where.lstrip("/"), "--cwd", where, "--proc"]
    return only["args"], options


def run_inside(inside, arguments, options):
    return support.run(*container.command(inside.root, "/usr/bin/instar", *arguments, options=options))


def test_the_job(inside):
    job = kinds("Job")
    arguments, options = of_pod(job["spec"]["template"]["spec"])
    inside.own(int(options[1]))
    done = run_inside(inside, arguments, options)
    assert done.rc == 0 and json.loads(done.stdout)["sandbox"] == "process", str(done)
    inside.assert_committed()
    # "A job that fails is safe to repeat": so is one that does not.
    assert run_inside(inside, arguments, options).rc == 0
    inside.assert_committed()


@pytest.mark.skipif(ORDINARY, reason="only root hands a device to another user")
@pytest.mark.skipif(not support.KVM, reason="this machine has no /dev/kvm")
def test_the_pod_with_kvm(inside):
    """Without the device it fails; with it, and the group that owns it, it works."""
    pod = kinds("Pod")
    arguments, options = of_pod(pod["spec"])
    inside.own(int(options[1]))
    resources = one(pod["spec"]["containers"])["resources"]["limits"]
    assert resources["devices.kubevirt.io/kvm"] == "1"
    with support.untouched(inside.base, inside.top):
        refused = run_inside(inside, arguments, options)
    assert refused.rc == 1 and support.error_of(refused.stderr)["name"] == "ERROR_KVM_MISSING", str(refused)
    [group] = pod["spec"]["securityContext"]["supplementalGroups"]
    done = run_inside(inside, arguments, [*options, "--kvm", str(group)])
    assert done.rc == 0 and json.loads(done.stdout)["sandbox"] == "kvm", str(done)
    inside.assert_committed()


def scripts():
    """The lines of the CI examples."""
    github = one(document for document in DOCUMENTS if "jobs" in document)["jobs"]["image"]
    gitlab = one(document for document in DOCUMENTS if "merge" in document)["merge"]
    assert gitlab["image"]["entrypoint"] == [""]
    ran = one(step["run"] for step in github["steps"] if "run" in step)
    return {"github": (ran.splitlines(), {}), "gitlab": (gitlab["script"], gitlab["variables"])}


@pytest.mark.parametrize("system", ["github", "gitlab"])
def test_the_ci_examples(inside, system):
    lines, variables = scripts()[system]
    if "INSTAR_CONFIG" in variables:
        inside.add(REPO / "packaging/container.toml", variables["INSTAR_CONFIG"].lstrip("/"))
    assert len(lines) >= 2
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "instar"
        done = inside.run(*arguments)
        assert done.rc == 0, str(done)
    inside.assert_committed()


def test_the_commands_of_docker(inside):
    """What stands behind the image's name is what the image is started with."""
    text = one(blocks("sh")).replace("\\\n", " ")
    build, run = [shlex.split(line) for line in text.splitlines()]
    assert build == ["docker", "build", "-t", "instar", "."]
    assert "/images" in one(word for word in run if word.startswith("$PWD")).split(":")
    inside.add(REPO / "packaging/container.toml", "etc/instar/config.toml")
    done = inside.run(*run[run.index("instar") + 1:])
    assert done.rc == 0 and json.loads(done.stdout)["sandbox"] == "process", str(done)
    inside.assert_committed()


def unit(text):
    """The settings of [Service], each with all of its values."""
    settings = {}
    for line in text.partition("[Service]\n")[2].splitlines():
        key, _, value = line.partition("=")
        settings.setdefault(key, []).append(value)
    return settings


def held_by(service):
    """What systemd makes of a unit, as options of a container. The list of system calls is written where the second says."""
    yes = {key for key, values in service.items() if values == ["yes"]}
    assert {"NoNewPrivileges", "LockPersonality", "RestrictNamespaces", "MemoryDenyWriteExecute"} <= yes
    assert service["CapabilityBoundingSet"] == [""] and service["ProtectSystem"] == ["strict"]
    [errno] = service["SystemCallErrorNumber"]
    [address_families] = service["RestrictAddressFamilies"]
    names, more = service["SystemCallFilter"]
    assert (errno, address_families, names) == ("EPERM", "none", "@system-service")
    allowed = (allowed_calls.LISTS / "systemd-system-service.txt").read_text().replace("default kill", "default errno 1")
    # systemd.exec(5) on LockPersonality=, RestrictNamespaces= and RestrictAddressFamilies=.
    allowed = re.sub(r"\b(clone|clone3|personality|socket)\s", "", allowed)
    allowed += "\npersonality where argument 0 in 0x0 0xffffffff\nclone where argument 0 without 0x7e020000\n"
    allowed += f"clone3 errno 38\nsocket errno 97\n{more}\n"
    [writable] = service["ReadWritePaths"]
    return allowed, ["--writable", writable.lstrip("/"), "--deny-write-execute", "--proc"]


def run_unit(inside, tmp_path, service, *options):
    """Run what a unit runs, of the images in its folder."""
    allowed, held = held_by(service)
    listed = tmp_path / "list"
    listed.write_text(allowed)
    program, *arguments = shlex.split(service["ExecStart"][-1].replace("%i", "top"))
    assert program == "/usr/bin/instar"
    folder = service["ReadWritePaths"][0].lstrip("/")
    (inside.root / folder).parent.mkdir(parents=True, exist_ok=True)
    inside.images = inside.images.rename(inside.root / folder)
    inside.base, inside.top = inside.images / "base.qcow2", inside.images / "top.qcow2"
    done = run_inside(inside, arguments, ["--list", str(listed), *held, *options])
    assert done.rc == 0, str(done)
    inside.assert_committed()
    return json.loads(done.stdout)


UNITS = [unit(text) for text in blocks("ini")]


def test_the_unit(inside, tmp_path):
    assert run_unit(inside, tmp_path, UNITS[0])["sandbox"] == "process"


def test_the_unit_says_why_its_list_is_longer(inside, tmp_path):
    """With @system-service alone there is no sandbox."""
    listed = tmp_path / "list"
    listed.write_text(held_by(UNITS[0])[0].replace(UNITS[0]["SystemCallFilter"][1], ""))
    with support.untouched(inside.base, inside.top):
        refused = inside.run("commit", "--sandbox", "process", "top.qcow2", options=["--list", str(listed)])
    assert refused.rc == 1 and "setting up seccomp" in refused.stderr, str(refused)


@pytest.mark.skipif(ORDINARY, reason="only root hands a device to another user")
@pytest.mark.skipif(not support.KVM, reason="this machine has no /dev/kvm")
def test_the_unit_with_kvm(inside, tmp_path):
    """What the drop-in sets holds instead."""
    main, drop = UNITS
    assert drop["ExecStart"][0] == "" and drop["DeviceAllow"] == ["/dev/kvm rw"]
    assert drop["PrivateDevices"] == drop["PrivateUsers"] == ["no"]
    service = main | drop
    assert run_unit(inside, tmp_path, service, "--kvm", "107")["sandbox"] == "kvm"


def test_systemd_understands_the_units(tmp_path):
    """Where systemd is installed: it knows every setting, and thinks well of them."""
    if support.run("sh", "-c", "command -v systemd-analyze").rc != 0:
        pytest.skip("systemd is not installed")
    path = tmp_path / "instar-commit@top.service"
    path.write_text(blocks("ini")[0].replace("/usr/bin/instar", str(support.instar_binary())))
    verified = support.run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path)
    told = [line for line in verified.stderr.splitlines() if path.name in line]
    assert not told, str(verified)
    rated = support.run("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", path)
    assert rated.rc == 0, str(rated)


def test_every_name_in_the_table_is_one():
    named = set(re.findall(r"ERROR_\w+", PAGE))
    assert {"ERROR_SANDBOX_UNUSABLE", "ERROR_SANDBOX_LOST"} <= named <= support.CODES.keys()
