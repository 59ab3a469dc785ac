"""The published JSON Schemas, `docs/schemas`: of every command, and as strict as what is promised.

That each command prints what its schema allows, all tests that read JSON examine (`support.Result.json` and `.error`).
"""

from __future__ import annotations

import copy
import json
import os
import re

import jsonschema
import pytest
import qcow2_bytes
import schemas
import support
from support import KIB, MIB, REPO, run_instar

#: Keys that are only there where there is something to say: besides these, each that is missing has to be noticed.
OPTIONAL = {
    "adoption": {"dry_run", "stale", "warnings"},
    "commit": {"stale", "relinked", "warnings", "bitmaps", "overlay_bytes_wiped", "verified_bytes", "overlay_deleted", "atomic", "backup",
               "digest", "undo_log_bytes", "undo_free_bytes", "lacking_bytes"},
    "check": {"image-end-offset", "total-clusters", "fragmented-clusters", "compressed-clusters", "corruptions", "leaks",
              "allocated-clusters", "unused-tail", "leaks-fixed", "corruptions-fixed", "leaks-fixable", "corruptions-fixable",
              "not-repaired"},
    "map": {"offset"},
    "info": {"icount", "backing-filename-format", "snapshots", "cluster-size", "encrypted", "format-specific",
             "full-backing-filename", "notes"},
    "measure": {"bitmaps", "sandbox", "atomic", "undo-log", "undo-free", "lacking"},
    "config": {"warnings"},
    "error": {"file", "role", "errno", "offset", "step"},
    "progress": {"error", "finding", "warning"},
    "rebase": {"warnings", "result", "error", "file", "role"},
}
#: Keys that the few images here do not have: other tests have such.
RARE = {"commit": {"backup", "undo_free_bytes", "lacking_bytes"}, "measure": {"undo-free", "lacking"}, "progress": {"warning"}, "rebase": {"errno", "offset", "step"}, "convert": {"warnings"}, "info": {"icount", "encrypted", "notes"}, "config": {"warnings"}, "error": {"offset", "step"}}
#: The keys of a format, which are its plugin's and not the program's; and a result that has a schema of its own.
OPEN = {"format-specific", "result"}


def commands() -> list[str]:
    """The commands that print JSON, by their own word."""
    listed = run_instar("--help").stdout.split("Commands:\n")[1].split("\n\n")[0]
    names = set(re.findall(r"^  (\w+)  ", listed, re.MULTILINE)) - {"help"}
    assert {"commit", "create"} <= names
    return sorted(name for name in names if re.search(r"^ +--output <", run_instar(name, "--help").stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """What the program prints: for each schema, values that have all of its keys between them."""
    folder = tmp_path_factory.mktemp("samples")
    support.create(folder / "base", 4 * MIB)
    support.create(folder / "mid", backing="base", cwd=folder)
    support.qemu_img("snapshot", "-c", "before", folder / "mid")
    support.create(folder / "top", backing="mid", cwd=folder)
    support.qemu_io(folder / "top", "write -P 5 64k 192k", "write -z 1M 64k", "write -P 6 2M 64k")
    support.create(folder / "other-base", MIB)
    support.create(folder / "other-top", backing="other-base", cwd=folder)
    support.create(folder / "adopted", MIB)
    support.create(folder / "adopter", backing="adopted", cwd=folder)
    support.create(folder / "bitmaps", MIB)
    support.qemu_img("bitmap", "--add", folder / "bitmaps", "b")
    support.create(folder / "damaged", MIB)
    support.qemu_io(folder / "damaged", "write -P 5 0 128k", "write -c 256k 64k", "write -P 5 512k 64k")
    with (folder / "damaged").open("r+b") as file:
        file.seek(2 * 64 * KIB)  # the refcount block: corrupt where it is too low, leaking where it is too high
        file.write(b"\0\0" * 3 + b"\0\1" * 100)
        file.truncate(64 * 64 * KIB)
    support.copy(folder / "damaged", folder / "mended")
    support.create(folder / "torn", MIB)
    support.qemu_io(folder / "torn", "write 0 64k")
    torn = qcow2_bytes.Image(folder / "torn")
    torn.poke64(torn.l2_at(), torn.end)
    support.create(folder / "long", MIB)
    os.truncate(folder / "long", 64 * MIB)

    (folder / "config.toml").write_text('sandbox = "auto"\nallow-backing-dirs = ["/srv"]\nplugin-dirs = ["/opt"]\nundo-dir = "/var"\n')

    def ask(*args, **env):
        result = run_instar(args[0], "--output", "json", *args[1:], cwd=folder, env=env)
        return result.json if result.stdout else {"error": result.error}

    support.qemu_img("create", "-q", "-f", "qcow2", folder / "unmarked.qcow2", "1M")
    support.qemu_img("create", "-q", "-f", "qcow2", "-b", "unmarked.qcow2", "-F", "qcow2", folder / "marked.qcow2")
    support.qemu_img("bitmap", "--add", folder / "marked.qcow2", "one")
    def progress(*args):
        return [json.loads(line) for line in run_instar(*args, cwd=folder).stderr.splitlines() if line.startswith('{"type"')]

    (folder / "other").mkdir()
    (folder / "other/libinstar_plugin_other.so").write_bytes(b"no library")
    (folder / "recovered").write_bytes(bytes(512))
    (folder / ".recovered.instar-undo").touch(0o600)
    return {
        "adoption": [ask("commit", "--by-adoption", "--dry-run", "-b", "base", "top"), ask("commit", "--by-adoption", "-b", "adopted", "adopter")],
        "commit": [ask("commit", "--dry-run", "top"), ask("commit", "--dry-run", "-b", "base", "top"),
                   ask("commit", "--dry-run", "--relink", "top", "mid"), ask("commit", "-d", "-b", "base", "top"),
                   ask("commit", "--dry-run", "--bitmaps", "marked.qcow2"), ask("commit", "--wipe", "--verify", "--delete-overlay", "other-top"),
                   ask("commit", "--atomic", "--digest", "--dry-run", "top")],
        "recover": [ask("recover", "recovered")],
        "check": [ask("check", "top"), ask("check", "damaged"), ask("check", "long"),
                  ask("check", "-r", "all", "--dry-run", "mended"), ask("check", "-r", "all", "mended"),
                  ask("check", "-r", "all", "torn")],
        "map": [ask("map", "top"), ask("map", "base"), ask("map", "-l", "0", "top")],
        "info": [ask("info", "top"), ask("info", "mid"), ask("info", "--backing-chain", "top"),
                 ask("info", "-f", "raw", "base")],
        "measure": [ask("measure", "-O", "qcow2", "bitmaps"), ask("measure", "--size", "1M"), ask("measure", "--commit", "top"),
                    ask("measure", "--commit", "--atomic", "top")],
        "compare": [ask("compare", "base", "mid"), ask("compare", "base", "top"),
                    ask("compare", "-s", "base", "bitmaps"), ask("compare", "-s", "bitmaps", "damaged")],
        "resize": [ask("resize", "--dry-run", "base", "+1M"), ask("resize", "base", "+0")],
        "rebase": [ask("rebase", "--dry-run", "-b", "base", "-F", "qcow2", "top"),
                   ask("rebase", "--dry-run", "-u", "-b", "none", "-F", "qcow2", "top"), ask("rebase", "--dry-run", "-b", "", "top"),
                   ask("rebase", "--dry-run", "-b", "", "top", "mid"), ask("rebase", "-b", "other-base", "-F", "qcow2", "mid", "top")],
        "convert": [ask("convert", "-O", "vhdx", "top", "converted")],
        "doctor": [ask("doctor"), ask("doctor", "--plugin-dir", "other")],
        "explain": [ask("explain"), ask("explain", "16")],
        "plugins": [ask("plugins"), ask("plugins", "--plugin-dir", "other")],
        "config": [ask("config"), ask("config", INSTAR_CONFIG=str(folder / "config.toml"))],
        "progress": [*progress("commit", "--progress=json", "-d", "-b", "base", "top"),
                     *progress("compare", "--progress=json", "base", "top"), *progress("commit", "--progress=json", "none"),
                     *progress("check", "--progress=json", "damaged")],
        "error": [ask("commit", "none"), ask("map", "--nonesuch"), ask("info", "-f", "vmdk", "top")],
    }


def test_every_command_that_prints_json_has_one_and_only_these():
    assert set(schemas.published()) == {*commands(), "adoption", "error", "progress"}


@pytest.mark.parametrize("name", schemas.published())
def test_each_is_a_schema_that_says_what_its_keys_are(name):
    schema = schemas.published()[name]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema" and schema["$id"] == f"urn:instar:schema:{name}"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] and schema["description"]
    for where, part in parts(schema):
        for key, of_key in part.get("properties", {}).items():
            assert of_key.get("description") or "$ref" in of_key, f"{where}: {key} has no description"
            if "description" in of_key and re.search(r"size|offset|bytes|length|growth|space|^required$", key) and number(of_key):
                assert re.search(r"\b[Bb]ytes?\b", of_key["description"]), f"{where}: {key} has no unit"
        if "properties" in part:
            assert part["additionalProperties"] is (where.endswith("/data")), where
            assert set(part["required"]) <= set(part["properties"]), where


def number(of_key) -> bool:
    return "integer" in of_key.get("type", "")


def parts(schema, where=""):
    """All objects within a schema, with where they are."""
    if isinstance(schema, dict):
        yield where, schema
        for key, value in schema.items():
            yield from parts(value, f"{where}/{key}")
    elif isinstance(schema, list):
        for value in schema:
            yield from parts(value, where)


@pytest.mark.parametrize("name", schemas.published())
def test_what_is_printed_fits_and_has_every_key(name, samples):
    assert not [fault for value in samples[name] for fault in schemas.faults(name, value)]
    told = {key for part in parts(samples[name]) for key in part[1]}
    known = {key for _, part in parts(schemas.published()[name]) for key in part.get("properties", {})}
    missing = known - told - RARE.get(name, set())
    assert not missing, f"no sample has {missing}"


@pytest.mark.parametrize("name", schemas.published())
def test_a_key_that_is_taken_away_or_added_is_noticed(name, samples):
    tried = 0
    for value in samples[name]:
        for keys in objects(value):
            changed = copy.deepcopy(value)
            at(changed, keys)["surplus"] = 1
            assert schemas.faults(name, changed), f"{keys}: a key was added"
            for key in at(value, keys):
                changed = copy.deepcopy(value)
                was = at(changed, keys).pop(key)
                noticed = schemas.faults(name, changed)
                assert noticed or key in OPTIONAL.get(name, ()) or key == backing_name(changed, keys), f"{keys}: {key} is missing"
                at(changed, keys)[key] = [was]
                assert schemas.faults(name, changed), f"{keys}: {key} is of another type"
                tried += 1
    assert tried > 1


def backing_name(value, keys):
    """The recorded name of a backing may be missing where nothing else is said about it."""
    others = {"full-backing-filename", "backing-filename-format"}
    return None if others & set(at(value, keys)) else "backing-filename"


def objects(value, keys=()):
    """Where the objects are in a value whose keys are the program's, of a long array in its first elements."""
    if isinstance(value, dict):
        yield keys
        items = value.items()
    else:
        items = list(enumerate(value))[:8] if isinstance(value, list) else ()
    for key, inner in items:
        if key not in OPEN:
            yield from objects(inner, (*keys, key))


def at(value, keys):
    for key in keys:
        value = value[key]
    return value


def test_what_the_schema_forbids_fails_the_tests_that_read_json(samples):
    """Without this, a schema that nobody looks at would do."""
    printed = support.Result(["/x/instar", "compare"], 0, '{"virtual-sizes": [1, 2], "sandbox": "kvm", "difference": null}', "")
    assert printed.json["difference"] is None
    printed.stdout = printed.stdout.replace("null", '{"kind": "size", "offset": 3}')
    with pytest.raises(AssertionError, match="compare.json does not allow"):
        assert printed.json
    with pytest.raises(AssertionError, match="error.json does not allow"):
        support.error_of('{"error": {"code": 2, "name": "ERROR_NO_BACKING"}}')
    many = samples["map"][0] * 2000
    assert not schemas.faults("map", many)
    del many[-1]["length"]
    assert schemas.faults("map", many)


def test_the_words_of_the_schemas_are_those_of_the_sources():
    error = schemas.published()["error"]["properties"]["error"]["properties"]
    source = (REPO / "engine/src/error.rs").read_text()
    assert error["role"]["enum"] == re.findall(r'Self::\w+ => "(\w+)",', source)
    part = schemas.published()["doctor"]["properties"]["parts"]["items"]["properties"]["part"]
    source = (REPO / "engine/src/doctor.rs").read_text().split("mod tests")[0]
    words = re.findall(r'Diagnosis::(?:good|bad)\(\s*"(\w+)"|one\(\s*"(\w+)"', source)
    assert set(part["enum"]) == {word for pair in words for word in pair if word} | set(support.SANDBOXES)
    assert all(re.fullmatch(error["name"]["pattern"], name) for name in support.CODES)


def test_the_documentation_names_each():
    page = (REPO / "docs/json.md").read_text()
    for name in schemas.published():
        assert f"](schemas/{name}.json)" in page, name
    assert "](docs/json.md)" in (REPO / "README.md").read_text()
