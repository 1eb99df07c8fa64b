"""What stands in a report: each section is a function from a run to HTML, or to nothing if the run has none of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from graphlocal.report.charts import Frame, Series, dots, finite, lines
from graphlocal.report.clusters import Clusters
from graphlocal.report.heat import heat
from graphlocal.run_log import Record, Run

MULTIPLES = 12
"""With more subgraphs than this, heat maps take the place of small charts."""

Points = list[tuple[float, float | None]]


def headline(run: Run) -> str:
    """What was trained, and how well that went."""
    meta = run.meta
    names = {
        "data": "data",
        "optimizer": "optimizer",
        "lr": "learning rate",
        "batch_size": "batch size",
        "seed": "seed",
    }
    facts = [("rule", meta.get("rule", run.graph.rule)), ("partition", f"{len(run.graph.subgraphs)} subgraphs")]
    facts += [(name, meta[key]) for key, name in names.items() if key in meta]
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts)
    return f"<h1>{escape(str(meta.get('model', run.graph.name)))}</h1><dl class='facts'>{shown}</dl>{_status(run)}"


def _status(run: Run) -> str:
    ends = run.of("end")
    last = run.records[-1]
    notes = []
    if ends and ends[-1]["status"] != "finished":
        notes.append("Training was stopped before its end.")
    elif last["kind"] != "end":
        notes.append("The log has no end: training still goes on, or was cut off.")
    if run.damaged:
        notes.append("The log's last line is damaged and was left out.")
    return "".join(f"<p class='note'>{note}</p>" for note in notes)


def _epochs(run: Run) -> dict[str, list[Record]]:
    """The epochs of each model, the local one first, by the name that is shown."""
    found: dict[str, list[Record]] = {}
    rule = str(run.meta.get("rule_name", "local"))
    for record in sorted(run.of("epoch"), key=lambda record: record["of"] != "local"):
        name = str(record["of"])
        shown = rule if name == "local" else name if name != rule else f"{name} (autograd)"
        found.setdefault(shown, []).append(record)
    return found


def curves(run: Run) -> str:
    """Training loss and test error over the epochs, beside what was trained for comparison."""
    epochs = _epochs(run)
    steps = run.of("step")
    if not epochs:
        return ""
    names = list(epochs)

    def series(key: str) -> list[Series]:
        return [
            Series(name, [(r["epoch"], finite(r.get(key))) for r in records], f"s{i}")
            for i, (name, records) in enumerate(epochs.items())
        ]

    batches = [Series("batch", _batch_losses(run, steps), "s0", faint=True)] if steps else []
    losses = Frame("epoch", "training loss (mean of the epoch)", log=True, epochs=True)
    loss = lines([*batches, *series("loss")], losses, "training loss")
    error = lines(series("test_error"), Frame("epoch", "test error (%)", zero=True, epochs=True), "test error")
    notes = " The thin line is the loss of single batches." if batches else ""
    return _section(
        "Learning curves", f"{_key(names)}<div class='pair'>{loss}{error}</div>{_table(epochs)}",
        f"Training loss as the loss function gives it, on a logarithmic axis.{notes}",
    )  # fmt: skip


def _batch_losses(run: Run, steps: Sequence[Record]) -> Points:
    """The observed batches' losses, by the epoch that they are a part of."""
    ends = [(0, 0.0), *((r["step"], float(r["epoch"])) for r in run.of("epoch") if r["of"] == "local")]
    found: Points = []
    for record in steps:
        for (a, first), (b, last) in pairwise(ends):
            if a < record["step"] <= b:
                found.append((first + (record["step"] - a) / (b - a) * (last - first), finite(record["loss"])))
    return found


def _table(epochs: dict[str, list[Record]]) -> str:
    rows = []
    for name, records in epochs.items():
        errors = [r["test_error"] for r in records if r.get("test_error") is not None]
        seconds = [r["seconds"] for r in records if r.get("seconds") is not None]
        cells = [
            name, str(len(records)), _cell(records[-1].get("loss"), "{:.4f}"),
            _cell(errors[-1] if errors else None, "{:.2f} %"), _cell(min(errors, default=None), "{:.2f} %"),
            _cell(sum(seconds) / len(seconds) if seconds else None, "{:.1f}"),
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = ("rule", "epochs", "training loss", "test error", "lowest", "seconds an epoch¹")
    heads = "".join(f"<th>{name}</th>" for name in head)
    note = "<p class='small'>¹ of the local model with the time that observing it took</p>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def subgraphs(run: Run) -> str:
    """Local losses, angles and step ratios of the subgraphs over time."""
    steps = run.of("step")
    names = [s.name for s in run.graph.subgraphs if any(s.name in r["local_loss"] for r in steps)]
    if not names:
        return ""
    parts = [
        _group(names, steps, "local_loss", "Local loss", "L = ½|e|² a sample", "Half the squared norm of the error "
               "that feeds a subgraph's update, by sample: it falls as representations meet their local targets. "
               "Logarithmic; comparable over time, and between subgraphs that learn in the same way.", log=True),
        _group(names, steps, "angle", "Angle to the true gradient", "angle (degrees)", "Between a subgraph's local "
               "update and backpropagation's gradient on the same batch. Below 90° (dashed) an update descends; 0° is "
               "the gradient itself.", limits=(0, 180), line_at=90),
        _group(names, steps, "step_ratio", "Step over weights", "|Δθ| / |θ|", "Norm of what one optimizer step "
               "changed over the norm of the subgraph's parameters. Logarithmic.", log=True),
        _depth(steps),
    ]  # fmt: skip
    return "".join(parts)


def _group(names: Sequence[str], steps: Sequence[Record], key: str, title: str, y_label: str, about: str,
           log: bool = False, limits: tuple[float, float] | None = None, line_at: float | None = None,
           ) -> str:  # fmt: skip
    series = {name: [(r["step"], finite(r[key].get(name))) for r in steps if key in r] for name in names}
    values = [y for points in series.values() for _, y in points if y is not None and (y > 0 or not log)]
    if not values:
        return ""
    limits = limits or (min(values) / 1.3, max(values) * 1.3)
    if len(names) > MULTIPLES:
        frame = Frame("step", y_label, width=960, log=log, limits=limits, line_at=line_at)
        return _section(title, heat(list(series.items()), frame, title, diverging=line_at is not None), about)
    ticks = (0.0, 45.0, 90.0, 135.0, 180.0) if line_at is not None else None
    frame = Frame("step", y_label, 250, 170, log, limits=limits, line_at=line_at, y_ticks=ticks)
    cells = [
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f"{lines([Series(name, points, 's0')], frame, f'{title}: {name}')}</figure>"
        for name, points in series.items()
    ]
    return _section(title, f"<div class='multiples'>{''.join(cells)}</div>", about)


def _depth(steps: Sequence[Record]) -> str:
    points: Points = [(r["step"], finite(r["credit_depth"])) for r in steps if "credit_depth" in r]
    if not points:
        return ""
    chart = lines([Series("depth", points, "s0")], Frame("step", "subgraphs reached", 640, 240, zero=True), "depth")
    about = "Of how many subgraphs the mean sample's error reached the error neuron."
    return _section("Depth of credit assignment", chart, about)


def representations(found: Sequence[Clusters], classes: Sequence[str], missing: str = "") -> str:
    """t-SNE of what the subgraphs make of test samples, before and after training."""
    title = "Representations of test samples"
    if missing:
        return _section(title, f"<p class='note'>{escape(missing)}</p>")
    if not found:
        return ""
    rows = []
    for epoch in dict.fromkeys(one.epoch for one in found):
        when = "before training" if epoch == 0 else f"after epoch {epoch}"
        cells = [
            f"<figure><figcaption>{escape(one.subgraph)}</figcaption>"
            f"{dots(one.points, classes, 250, f't-SNE of {one.subgraph}, {when}')}</figure>"
            for one in found if one.epoch == epoch
        ]  # fmt: skip
        rows.append(f"<h3>{when}</h3><div class='multiples'>{''.join(cells)}</div>")
    count = len(found[0].points)
    about = (
        f"t-SNE of {count} test samples (perplexity {min(30, (count - 1) // 3)}, of the first 50 principal components; "
        "BatchNorm and dropout as in training). Colours and names are the classes. Only nearness means something: not "
        "axes, sizes or distances between clusters."
    )
    return _section(title, "".join(rows), about)


def details(run: Run) -> str:
    """Everything that the run says of itself."""
    rows = "".join(
        f"<tr><th>{escape(str(k))}</th><td>{escape(_plain(v))}</td></tr>" for k, v in sorted(run.meta.items())
    )
    table = f"<table class='meta'>{rows}</table>"
    return f"<section><details><summary>How this run was made</summary>{table}</details></section>"


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _key(names: Sequence[str]) -> str:
    keys = "".join(
        f"<span><svg class='swatch' viewBox='0 0 26 8'><line class='line s{i}' x1='1' x2='25' y1='4' y2='4'/></svg>"
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    )
    return f"<p class='key'>{keys}</p>"


def _section(title: str, content: str, about: str = "") -> str:
    note = f"<p class='about'>{about}</p>" if about else ""
    return f"<section><h2>{title}</h2>{note}{content}</section>"
