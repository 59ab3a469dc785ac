"""The campaigns that take too long for a test: they count what they tried, look where code is, and fail when they should."""

from __future__ import annotations

import re
import tomllib

import every_state
import mutants
import pytest
from support import REPO

CONFIG = tomllib.loads((REPO / ".cargo/mutants.toml").read_text())


def states(*numbers):
    return b"".join(number.to_bytes(every_state.SUM, "little") for number in numbers)


def test_a_state_is_counted_once(tmp_path):
    (tmp_path / "1-0").write_bytes(b"3 1 0\n" + states(1, 2, 3))
    (tmp_path / "2-0").write_bytes(b"1 0 2\n" + states(3, 4))
    # A line feed within a sum ends nothing.
    (tmp_path / "2-1").write_bytes(b"0 0 0\n" + states(0x0A0A0A))
    found, flushes = every_state.add_up(tmp_path)
    assert (len(found), flushes) == (5, [4, 1, 2])


def test_a_record_that_is_cut_is_told(tmp_path):
    (tmp_path / "1-0").write_bytes(b"1 0 0\n" + states(1)[:-1])
    with pytest.raises(SystemExit, match="is cut"):
        every_state.add_up(tmp_path)


def test_few_states_and_failed_tests_are_failures(tmp_path, monkeypatch, capsys):
    writes = "printf '1 0 0\\n0123456789abcdef' > $INSTAR_EVERY_STATE_LOG/1; test $INSTAR_EVERY_STATE = 7 || exit 9; exit "
    for status, least, want in ((0, 1, 0), (1, 1, 1), (0, 2, 1)):
        monkeypatch.setattr(every_state, "tests", lambda _, status=status: ["sh", "-c", f"{writes}{status}"])
        monkeypatch.setattr("sys.argv", ["every_state", "--pieces", "7", "--least", str(least)])
        assert every_state.main() == want, (status, least)
        assert "1 different states" in capsys.readouterr().out


def test_every_driver_is_in_the_campaign():
    drivers = {path.parent.name for path in (REPO / "plugins").glob("*/driver")}
    assert drivers == set(every_state.FORMATS)


def test_each_glob_of_the_mutants_finds_code():
    for glob in CONFIG["examine_globs"] + [glob for glob in CONFIG["exclude_globs"] if not glob.startswith("**")]:
        assert any(REPO.glob(glob)), glob
    for part in ("plugins/qcow2/driver", "plugins/vdi/format", "engine/src/devices", "engine/src/confine", "engine/src/image"):
        assert any(path.is_relative_to(REPO / part) for glob in CONFIG["examine_globs"] for path in REPO.glob(glob)), part
    assert all(name in CONFIG for name in mutants.HOW) and CONFIG["test_tool"] == "nextest" and CONFIG["profile"] == "checked"


def test_each_mutant_that_is_left_out_has_a_reason():
    text = (REPO / ".cargo/mutants.toml").read_text()
    listed = text[text.index("exclude_re = ["):]
    lines = [line.strip() for line in listed.splitlines()[1:] if line.strip() not in ("", "]")]
    reason = False
    for line in lines:
        # A comment is the reason of what follows up to the next one.
        reason = reason or line.startswith("#")
        assert reason, f"no reason: {line}"
    assert lines and all(re.compile(pattern) for pattern in CONFIG["exclude_re"])


def test_the_sdk_is_mutated_with_its_tests():
    names = ["guest/sdk/src/extent.rs:1:1: replace + with - in f", "plugins/vdi/format/src/header.rs:2:3: replace < with > in g"]
    rest, sdk = mutants.runs(names, False, True)
    assert mutants.SDK_FEATURE in sdk and mutants.SDK_FEATURE not in rest
    assert [option for option in sdk if option.startswith("--file=")] == ["--file=guest/sdk/src/extent.rs"]
    assert f"--re=^{re.escape(names[1])}$" in rest and "--no-config" in rest
    whole, sdk = mutants.runs(names, True, False)
    assert whole == [f"--exclude={mutants.SDK}**"] and not any(option.startswith("--re") for option in sdk)
    manifest = tomllib.loads((REPO / "guest/sdk/Cargo.toml").read_text())
    assert mutants.SDK_FEATURE.rsplit("/", 1)[1] in manifest["features"]
