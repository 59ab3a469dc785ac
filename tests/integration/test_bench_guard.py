"""The counts of `make bench-guard`: no workload costs more than it did, and one that would is told."""

from __future__ import annotations

import importlib.util
import json

import pytest
import support

SPEC = importlib.util.spec_from_file_location("guard", support.REPO / "tests/bench/guard.py")
guard = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(guard)
KNOWN = json.loads(guard.FILE.read_text())


@pytest.mark.parametrize("name", guard.WORKLOADS)
def test_no_count_has_grown(name):
    now = guard.counted(guard.WORKLOADS[name])
    assert guard.complaints({name: KNOWN["counts"][name]}, {name: now}) == []
    # Who counts nothing finds nothing.
    assert now["exits"] > now["doorbells"] > 0 and now["requests"] > 0 and now["read"] > 0, now


def test_a_count_that_grows_is_told():
    name, counts = next(iter(KNOWN["counts"].items()))
    for what in guard.COUNTS:
        more = {**counts, what: guard.most(counts[what]) + 1}
        assert len(guard.complaints({name: counts}, {name: more})) == 1, what
        assert guard.complaints({name: counts}, {name: {**counts, what: guard.most(counts[what])}}) == []
        assert guard.gains({name: more}, {name: counts}) or counts[what] < 3
    assert guard.complaints({}, {name: counts}) == [f"{name}: it has no counts yet"]
    assert guard.complaints({name: counts}, {}) == [f"{name}: there is no such workload any more"]


def test_all_workloads_are_counted_and_each_change_has_a_reason():
    assert KNOWN["counts"].keys() == guard.WORKLOADS.keys()
    assert KNOWN["reasons"] and all(reason.strip() for reason in KNOWN["reasons"])


def test_a_blessing_keeps_the_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "FILE", tmp_path / "guard.json")
    counts = {"one": dict.fromkeys(guard.COUNTS, 5)}
    guard.bless("first", counts)
    guard.bless("then", counts)
    assert json.loads(guard.FILE.read_text()) == {"reasons": ["first", "then"], "counts": counts}
    assert len(guard.FILE.read_text().splitlines()) < 12
