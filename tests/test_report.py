"""The report of a run: what is kept for it, and what a real Chromium makes of the page."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_page import BUNDLED, CHROMIUM, FLAGS
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
from graphlocal import cli
from graphlocal.errors import InputError
from graphlocal.report import document, report
from graphlocal.report.charts import Frame, Series, lines
from graphlocal.report.heat import heat, ramp
from graphlocal.report.scales import Scale, scale
from graphlocal.run_log import LOG, read_run
from graphlocal.snapshots import COMPONENTS, Keeper, kept, principal_components, read, representations
from graphlocal.targets.page.document import page

X, Y = torch.randn(48, 6, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 60), nn.BatchNorm1d(60), nn.Tanh(), nn.Linear(60, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, beside backprop, with representations."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    local = graphlocal.compile(net(), example_inputs=(X[:8],))
    step = graphlocal.train_step(local, cross_entropy, torch.optim.Adam(local.parameters(), 0.01))
    meta = {"optimizer": "adam", "command": "graphlocal train <here>"}
    with graphlocal.Monitor(local, cross_entropy, every=2, angle_every=4, run=folder, meta=meta) as monitor:
        monitor.epoch(1, 0.9, test_error=30.0, of="backprop")
        keeper = Keeper(folder, local, X, Y, ("ant", "bee", "<cat>"), 8)
        keeper.keep(0)
        watched = monitor.watch(step)
        for epoch in (1, 2):
            for x, y in zip(X.split(8), Y.split(8), strict=True):
                watched(x, y)
            monitor.epoch(epoch, 1.0 / epoch, test_error=40.0 / epoch, seconds=0.1)
            keeper.keep(epoch)
    return folder


@pytest.fixture(scope="module")
def written(run: Path) -> str:
    return report(run)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


# Representations.


def test_representations_are_those_of_the_forward_pass_and_leave_the_model_as_it_is() -> None:
    model = net()
    local = graphlocal.compile(model, example_inputs=(X[:8],)).eval()
    before = {name: value.clone() for name, value in local.state_dict().items()}
    names = [s.name for s in local.graph.subgraphs]
    found = representations(local, X[:20], names, 8)
    assert not local.training
    assert all(torch.equal(value, before[name]) for name, value in local.state_dict().items())
    model.train()
    expected = torch.cat([model(x) for x in X[:16].split(8)])
    torch.testing.assert_close(found[names[-1]], expected.detach())
    assert [len(found[name]) for name in names] == [16] * len(names)


def test_principal_components_keep_distances() -> None:
    values = torch.randn(20, 300)
    torch.testing.assert_close(torch.cdist(principal_components(values), principal_components(values)),
                               torch.cdist(values.double(), values.double()), atol=1e-5, rtol=1e-5)  # fmt: skip
    assert principal_components(torch.randn(80, 300)).shape == (80, COMPONENTS)


def test_a_run_keeps_a_small_sample_of_each_epoch(run: Path, tmp_path: Path) -> None:
    known = kept(copied(run, tmp_path / "copy"))
    assert known is not None
    about, files = known
    assert sorted(files) == [0, 1, 2]
    assert about["labels"] == Y.tolist()
    tensors = read(files[2])
    assert set(tensors) == set(about["subgraphs"])
    assert all(value.shape[0] == 48 and value.shape[1] <= COMPONENTS for value in tensors.values())
    files[1].write_bytes(b"no tensors")
    with pytest.raises(InputError, match="can't be read"):
        read(files[1])


# The page.


def test_the_report_holds_curves_measurements_and_the_command(written: str) -> None:
    for title in ("Learning curves", "Local loss", "Angle to the true gradient", "Step over weights", "Partition"):
        assert f"<h2>{title}</h2>" in written
    assert "graphlocal train &lt;here&gt;" in written
    assert "<td>rec-lra</td><td>2</td><td>0.5000</td><td>20.00 %</td><td>20.00 %</td><td>0.1</td>" in written
    assert "<td>backprop</td><td>1</td><td>0.9000</td><td>30.00 %</td>" in written
    assert "&lt;cat&gt;" in written
    assert "<cat>" not in written
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", written)


def test_without_the_bundled_libraries_the_partition_is_drawn_or_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> str:
        raise InputError("missing <libraries>")

    monkeypatch.setattr(document, "clusters", lambda folder: ([], []))
    monkeypatch.setattr(document, "page", missing)
    monkeypatch.setattr(document, "svg", lambda graph: "<?xml?><svg><style>a{}</style></svg>")
    drawn = report(run)
    assert "<svg><style>a{}</style></svg>" in drawn
    assert document._hash("a{}") in drawn
    monkeypatch.setattr(document, "svg", missing)
    assert "missing &lt;libraries&gt;" in report(run)


def test_a_missing_scikit_learn_is_told_in_the_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    written = report(run)
    assert "pip install &#x27;graphlocal[demo]&#x27;" in written
    assert "<h2>Learning curves</h2>" in written


def test_a_run_that_was_cut_off_has_a_report_that_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document, "clusters", lambda folder: ([], []))
    monkeypatch.setattr(document, "page", lambda *args, **options: page(*args, **options) if BUNDLED else "")
    folder = copied(run, tmp_path / "copy")
    log = folder / LOG
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[:-3]) + whole[-3][:-9])
    written = report(folder)
    assert "last line is damaged" in written
    assert "no end" in written
    log.write_bytes(whole[0])
    assert "neither observed a step nor ended an epoch" in report(folder)


def test_the_command_writes_the_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(document, "clusters", lambda folder: ([], []))
    out = tmp_path / "new" / "page.html"
    monkeypatch.setattr(sys, "argv", ["graphlocal", "report", str(run), "--out", str(out), "--title", "My <run>"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "<title>My &lt;run&gt;</title>" in out.read_text()
    monkeypatch.setattr(sys, "argv", ["graphlocal", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "holds no run" in capsys.readouterr().err


def test_training_from_the_command_line_is_logged_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, events = tmp_path / "run", tmp_path / "tb"
    options = ["--epochs", "1", "--batch-size", "200", "--backprop", "--every", "2", "--live"]
    command = ["graphlocal", "train", *options, "--run", str(folder), "--tensorboard", str(events)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "step 2: loss" in printed
    assert "observing every 2 steps took" in printed
    found = read_run(folder)
    assert found.meta["command"].endswith(str(events))
    assert (found.meta["data"], found.meta["batch_size"], found.meta["callable"]) == (
        "digits", 200, "graphlocal.demo:digits_mlp",
    )  # fmt: skip
    assert [r["step"] for r in found.of("step")] == [2, 4, 6, 8]
    assert [(r["of"], r["epoch"]) for r in found.of("epoch")] == [("backprop", 1), ("local", 1)]
    assert found.of("end") == [{"kind": "end", "status": "finished"}]
    known = kept(folder)
    assert known is not None
    assert sorted(known[1]) == [0, 1]
    assert list(events.iterdir())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "holds a run already" in capsys.readouterr().err


# Charts.


def test_scales_hold_their_values_and_ticks_are_round() -> None:
    linear = scale([0.3, None, 7.1, float("nan")], 0, 100, zero=True)
    assert linear(0) == 0
    assert linear(7.1) < 100
    assert linear.ticks(5) == [0, 2, 4, 6]
    log = Scale(0.02, 300, 0, 100, log=True)
    assert log.ticks(6) == [0.1, 1, 10, 100]
    assert not log.holds(0.0)
    assert scale([], 0, 1).ticks()
    assert scale([5.0], 0, 1)(5.0) == pytest.approx(0.5)


def test_a_line_stops_where_there_is_no_value() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, None), (4.0, 1.0), (5.0, 3.0)]
    drawn = lines([Series("a", points, "s0")], Frame("step", "loss (nats)"), "a loss")
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 4
    assert ">loss (nats)</text>" in drawn


def test_a_heat_map_has_a_cell_for_every_value() -> None:
    rows = [(f"block{i}", [(10.0, i / 10), (20.0, None if i == 3 else 1.0)]) for i in range(20)]
    drawn = heat(rows, Frame("step", "loss", width=900), "losses")
    assert len(re.findall("<rect[^>]*><title>", drawn)) == 39
    assert (ramp(0.0), ramp(1.0), ramp(0.5, diverging=True)) == ("#440154", "#fde725", "#d6d6d6")


# In a browser.


Open = Callable[..., Any]


@pytest.fixture
def show(tmp_path: Path) -> Iterator[Open]:
    """Opens a page; at the end it may have logged nothing, failed in nothing, and asked for nothing but itself."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not BUNDLED or CHROMIUM is None:
        pytest.skip("needs Chromium and the bundled libraries (make test fetches them with npm)")
    said: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def open_page(html: str, scheme: str = "light") -> Any:
            path = tmp_path / "report.html"
            path.write_text(html, encoding="utf-8")
            opened = browser.new_context(viewport={"width": 1100, "height": 800}, color_scheme=scheme).new_page()
            opened.on("console", lambda message: said.append(message.text))
            opened.on("pageerror", lambda error: said.append(str(error)))
            opened.on("request", lambda request: asked.append(request.url))
            opened.goto(path.as_uri())
            opened.frame_locator("iframe").locator("html[data-ready]").wait_for(timeout=60_000)
            return opened

        yield open_page
        browser.close()
    assert said == []
    assert len(asked) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_with_all_charts_and_the_partition(show: Open, written: str, scheme: str) -> None:
    opened = show(written, scheme)
    assert opened.locator("h1").inner_text() == "Sequential"
    subgraphs = 3
    assert opened.locator("section .pair .chart polyline").count() >= 3
    assert opened.locator(".multiples .chart polyline.line").count() >= 3 * subgraphs
    assert opened.locator(".multiples circle.point").count() == 2 * subgraphs * 48
    inner = opened.frame_locator("iframe")
    assert inner.locator(".card.subgraph").count() == subgraphs
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(244, 246, 249)", "dark": "rgb(16, 21, 27)"}[scheme]
    wide = opened.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1100
