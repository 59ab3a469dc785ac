"""The campaigns that take too long for a test: they count what they tried, and fail when they should."""

from __future__ import annotations

import every_state
import pytest
from support import REPO


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
