"""The benchmark of the learning bars says what it measured, and what it missed."""

from __future__ import annotations

import json

import pytest

from benchmarks import bars, report


def test_a_missed_bar_is_shown_as_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    first, second = bars.BARS[0], bars.BARS[1]
    good = [{"lra-fdbk": 19.0, "backprop": 90.0}, {"lra-fdbk": 20.0, "backprop": 89.0}]
    assert bars.keep({first.title: good}) == []
    text = (tmp_path / "bars.md").read_text()
    assert "| 2 | lra-fdbk | ≤ 20 | 19.50 ± 0.71 | met |" in text
    assert "All bars are met." in text
    assert bars.keep({first.title: good, second.title: [{"lra-fdbk": 22.5}]}) == [second.title]
    text = (tmp_path / "bars.md").read_text()
    assert "| lra-fdbk | ≤ 22 | 22.50 | **missed** |" in text
    assert f"Missed: {second.title}." in text


def test_results_of_other_settings_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    first, second = bars.BARS[0], bars.BARS[1]
    bars.keep({first.title: [{"lra-fdbk": 19.0}], second.title: [{"lra-fdbk": 20.0}]})
    kept = json.loads((tmp_path / "bars.json").read_text())
    kept[second.title]["setting"] = "another net"
    (tmp_path / "bars.json").write_text(json.dumps(kept))
    assert bars.known_runs() == {first.title: [{"lra-fdbk": 19.0}]}


@pytest.mark.parametrize("bar", bars.BARS, ids=lambda bar: bar.title)
def test_every_limit_is_a_bound(bar):
    for limit in bar.limits:
        bound = limit.most if limit.most is not None else limit.least
        assert limit.met(bound)
        assert not limit.met(bound + (0.01 if limit.most is not None else -0.01))


def test_the_results_in_the_repository_are_those_of_the_table():
    runs = bars.known_runs()
    assert runs.keys() == {bar.title for bar in bars.BARS}
    text = (report.RESULTS / "bars.md").read_text()
    for bar in bars.BARS:
        lines, _ = bars.rows(bar, runs[bar.title])
        assert all(f"| {' | '.join(line)} |" in text for line in lines), bar.title
