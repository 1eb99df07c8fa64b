"""The record of a training run: a folder that is written while a model trains, and read by `graphlocal report`.

    run/meta.json     what was trained: model, rule, optimizer, versions, the command
    run/graph.json    the partition (`graphlocal.text.to_document`)
    run/log.jsonl     one JSON object a line, only ever appended to

Each line has a `kind`: `start` (with the `schema` of the log and the step that it goes on from), `step` (what a
`Monitor` observed), `epoch` (mean training loss, test error; `of` says of which model), and `end` (why training
ended). Numbers that are not finite are written as null. A run that was cut off in the middle of a line can be read,
and be continued.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphlocal.errors import InputError
from graphlocal.files import write
from graphlocal.ir import LocalGraph
from graphlocal.text import from_document, to_document

SCHEMA = 1
LOG, META, GRAPH = "log.jsonl", "meta.json", "graph.json"

Record = dict[str, Any]


class RunLog:
    """Writes a run's folder.

    resume: go on with the run that is there. step: the step that the log goes on from; records of later steps count
    no longer.

    Raises InputError for a folder that holds a run already (or, to resume, none of this partition), and where it
    can't be written.
    """

    def __init__(self, folder: Path, graph: LocalGraph, meta: Record, *, resume: bool = False) -> None:
        self.folder, self.step = folder, 0
        if resume:
            self.step = self._continued(graph)
        elif (folder / LOG).exists():
            raise InputError(f"{folder} holds a run already", remedy="give another folder, or remove this one")
        else:
            write(folder / META, _json(meta, indent=1))
            write(folder / GRAPH, _json(to_document(graph)))
        if resume and not _ends_whole(folder / LOG):
            self._append(b"\n")  # closes the damaged line
        self.write({"kind": "start", "schema": SCHEMA, "step": self.step})

    def _continued(self, graph: LocalGraph) -> int:
        run = read_run(self.folder)
        if [s.name for s in run.graph.subgraphs] != [s.name for s in graph.subgraphs]:
            raise InputError(
                f"the run in {self.folder} is one of another partition",
                why=f"it has the subgraphs {', '.join(s.name for s in run.graph.subgraphs)}",
                remedy="compile the model as then, or log to another folder",
            )
        return max((record["step"] for record in run.of("step", "epoch") if "step" in record), default=0)

    def write(self, record: Record) -> None:
        """Append one record; handed to the system when this returns, whatever becomes of the process."""
        self._append(_json(record) + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            with (self.folder / LOG).open("ab") as file:
                file.write(line)
        except OSError as error:
            raise InputError(f"{self.folder / LOG} can't be written", why=str(error)) from error


@dataclass(frozen=True)
class Run:
    """A run that was read. damaged: the last line was cut off, and is left out."""

    folder: Path
    meta: Record
    graph: LocalGraph
    records: tuple[Record, ...]
    damaged: bool = False

    def of(self, *kinds: str) -> list[Record]:
        """The records of these kinds, in the order of writing."""
        return [record for record in self.records if record["kind"] in kinds]


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises InputError for a folder without a run, a log of another schema, and a damaged line that is not the last
    one before the end or before the run was continued.
    """
    if not (folder / LOG).is_file():
        raise InputError(
            f"{folder} holds no run", why=f"there is no {LOG}", remedy="write one: graphlocal train --run FOLDER"
        )
    lines = _read(folder / LOG).decode("utf-8", "replace").splitlines()
    parsed = [_record(line) for line in lines]
    for number, (record, after) in enumerate(zip(parsed, [*parsed[1:], None], strict=True), 1):
        if record is None and number < len(parsed) and (after is None or after["kind"] != "start"):
            raise InputError(f"{folder / LOG}, line {number}: no record of a run", remedy="remove that line")
    damaged = bool(parsed) and parsed[-1] is None
    records = [record for record in parsed if record is not None]
    if not records or records[0]["kind"] != "start":
        raise InputError(f"{folder / LOG} does not begin with a record of kind 'start'")
    for record in records:
        if record["kind"] == "start" and record.get("schema") != SCHEMA:
            raise InputError(
                f"{folder / LOG} has schema {record.get('schema')!r}; this graphlocal reads schema {SCHEMA}",
                remedy="read it with the graphlocal that wrote it",
            )
    graph = from_document(_document(folder / GRAPH))
    return Run(folder, _document(folder / META), graph, tuple(_valid(records)), damaged)


def _valid(records: list[Record]) -> Iterator[Record]:
    """The records without those that a continued run took back, by starting from an earlier step."""
    limit = math.inf
    kept = []
    for record in reversed(records):
        mine = record["kind"] == "step" or (record["kind"] == "epoch" and record.get("of") == "local")
        if not mine or record.get("step", 0) <= limit:
            kept.append(record)
        if record["kind"] == "start":
            limit = min(limit, record.get("step", 0))
    return reversed(kept)


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read", why=str(error)) from error


def _document(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON", why=str(error)) from error


def _ends_whole(path: Path) -> bool:
    content = _read(path)
    return not content or content.endswith(b"\n")


def _json(value: Any, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else None
    return json.dumps(_finite(value), indent=indent, separators=separators, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
