"""The zoo's records as Markdown tables, failures first."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import Any

from benchmarks import report

Record = dict[str, Any]


def tables(records: list[Record]) -> list[str]:
    failed = [record for record in records if record["status"] == "failed"]
    parts = [_summary(records), _times(records)]
    if failed:
        parts += ["## What fails", *map(_failure, failed)]
    for family, members in groupby(sorted(records, key=_family), _family):
        parts += [f"## {family}", _family_table(list(members))]
    refused = [record for record in records if record["status"] == "refused"]
    if refused:
        parts += ["## What is refused, and how", *map(_failure, refused)]
    return parts


def _family(record: Record) -> str:
    return record["id"].partition("/")[0]


def _summary(records: list[Record]) -> str:
    rows = []
    for family, members in groupby(sorted(records, key=_family), _family):
        group = list(members)
        count = {status: sum(r["status"] == status for r in group) for status in ("passed", "refused", "failed")}
        leaves = sum(bool(r["opaque"]) for r in group)
        recorded = sum(r["rung"] == "recording" for r in group)
        rows.append([family, str(len(group)), *map(str, count.values()), str(leaves), str(recorded)])
    header = ["family", "models", "pass", "refused, as they should be", "fail", "with opaque leaves", "recorded"]
    return report.table(header, rows)


def _times(records: list[Record]) -> str:
    ratios = sorted(x for r in records if (x := _of_export(r)) is not None)
    again = sorted(r["seconds_again"] / r["seconds_compile"] for r in records
                   if r["seconds_again"] and r["seconds_compile"])  # fmt: skip
    if not ratios or not again:
        return ""
    return (
        f"Tracing, the passes and emission take {statistics.median(ratios):.2f} times `torch.export.export` alone "
        f"(median; 90 % of the models below {ratios[int(0.9 * (len(ratios) - 1))]:.2f}), in the column `x export`; the "
        "self-check, a few real steps of the model, stands beside it. A second compilation of the same structure "
        f"takes {statistics.median(again):.2f} times the first."
    )


def _of_export(record: Record) -> float | None:
    """Compile time without the self-check, relative to the exporter alone."""
    export, compiled = record["seconds_export"], record["seconds_compile"]
    return (compiled - record["seconds_check"]) / export if export and compiled else None


def _family_table(records: list[Record]) -> str:
    header = ["model", "parameters", "traced by", "operations", "subgraphs", "equals autograd in", "second batch size",
              "compile s", "x export", "self-check s", "peak MB"]  # fmt: skip
    order = {"failed": 0, "refused": 1, "passed": 2}
    return report.table(header, [_row(r) for r in sorted(records, key=lambda r: (order[r["status"]], r["id"]))])


def _row(record: Record) -> list[str]:
    name = record["id"].partition("/")[2]
    if record["status"] != "passed":
        return [name, f"{record['parameters']:,}", f"**{record['status']}** at {record['stage']}", *[""] * 8]
    opaque = f", opaque: {' '.join(record['opaque'])}" if record["opaque"] else ""
    batch = {True: "same", None: "eager takes none"}[record["second_batch"]]
    ratio, seconds = _of_export(record), (record["seconds_compile"], record["seconds_check"])
    return [name, f"{record['parameters']:,}", record["rung"] + opaque, str(record["operations"]),
            str(len(record["subgraphs"])), record["dtype"], batch, f"{seconds[0]:.1f}",
            "" if ratio is None else f"{ratio:.2f}", f"{seconds[1]:.1f}", f"{record['peak_mb']:.0f}"]  # fmt: skip


def _failure(record: Record) -> str:
    return f"**{record['id']}**, at {record['stage']}:\n\n```\n{record['error'].strip()}\n```"
