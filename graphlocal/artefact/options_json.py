"""The compiler's options as JSON: the rule by its name and fields, the partition policy, skip-errors."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graphlocal.artefact.document import Doc
from graphlocal.artefact.values import decode, encode
from graphlocal.compiler import TARGETS, Options
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.ir import LocalGraph, Operation
from graphlocal.passes.policies import Policy
from graphlocal.rules import RULES, Rule


def options_document(options: Options, graph: LocalGraph) -> dict[str, Any]:
    """A callable partition is stored as its answers for the operations of `graph`."""
    rule = options.rule
    named: tuple[Field[Any], ...] = fields(rule) if is_dataclass(rule) else ()
    return {
        "rule": {
            "name": str(getattr(rule, "name", "")),
            "class": type(rule).__qualname__,
            "options": {field.name: encode(getattr(rule, field.name)) for field in named},
        },
        "partition": _partition_document(options.partition, graph),
        "skip_errors": [list(pair) for pair in options.skip_errors],
        "streams": options.streams,
        "target": options.target,
        **({"recompute": options.recompute} if options.recompute else {}),
    }


def _partition_document(policy: Policy, graph: LocalGraph) -> Any:
    if isinstance(policy, (str, int)):
        return policy
    if isinstance(policy, Assigned):
        return {"assigned": policy.boxes}
    if callable(policy):
        return {"assigned": {op.name: policy(op) for op in graph.operations}}
    return list(policy)


class Assigned:
    """A partition policy that was a callable when the model was saved: the box of each operation by its name.

    Raises InputError for an operation that the saved graph did not have.
    """

    def __init__(self, boxes: dict[str, str | None]) -> None:
        self.boxes = boxes

    def __call__(self, op: Operation) -> str | None:
        if op.name not in self.boxes:
            raise InputError(
                f"the stored partition has no box for the operation {op.name!r}",
                where=op.source or op.module,
                why="the partition was a function, and a file keeps its answers for the saved graph only",
                remedy="pass it again: graphlocal.load(path, model=my_model, partition=my_function)",
            )
        return self.boxes[op.name]


def read_options(doc: Doc, rule: Rule | None, partition: Callable[[Operation], str | None] | None) -> Options:
    """The stored options. rule, partition: the user's own, for what a file can't hold.

    Raises FileFormatError, and InputError if a rule that is not graphlocal's own is stored and none is given.
    """
    recomputes = isinstance(doc.value, dict) and "recompute" in doc.value  # left out by older versions, and where False
    names = ("rule", "partition", "skip_errors", "streams", "target", *(["recompute"] if recomputes else []))
    stored_rule, stored_partition, skip_errors, streams, target, *recompute = doc.fields(*names)
    pairs = []
    for pair in skip_errors.array():
        ends = [end.text() for end in pair.array(2)]
        if len(ends) != 2:
            raise pair.error("expected a pair of names")
        pairs.append((ends[0], ends[1]))
    policy = _read_partition(stored_partition)
    return Options(
        _read_rule(stored_rule, rule),
        partition or policy,
        tuple(pairs),
        streams.number(1, 1024),
        target.one_of(TARGETS),
        _read_recompute(recompute[0]) if recompute else False,
    )


def _read_recompute(doc: Doc) -> bool | tuple[str, ...]:
    return doc.flag() if isinstance(doc.value, bool) else tuple(glob.text() for glob in doc.array())


def _read_partition(doc: Doc) -> Policy:
    if isinstance(doc.value, str):
        return doc.text()
    if isinstance(doc.value, list):
        return [glob.text() for glob in doc.array()]
    if isinstance(doc.value, dict):
        (boxes,) = doc.fields("assigned")
        return Assigned({name: None if box.value is None else box.text() for name, box in boxes.items()})
    return doc.number(1)


def _read_rule(doc: Doc, given: Rule | None) -> Rule:
    name, kind, options = doc.fields("name", "class", "options")
    if given is not None:
        if type(given).__qualname__ != kind.text():
            raise InputError(
                f"rule={type(given).__name__} is given, but the model was saved with {kind.text()!r:.100}",
                remedy="pass the rule that it was compiled with, or compile the loaded model anew: "
                "graphlocal.compile(local.original, ...)",
            )
        return given
    known = RULES.get(name.text())
    if known is None or known.__qualname__ != kind.text():
        raise InputError(
            f"the model was saved with the rule {kind.text()!r:.100}, which is not graphlocal's own",
            why="a file names no code to import",
            remedy="pass the rule: graphlocal.load(path, rule=MyRule())",
        )
    hints = get_type_hints(known)
    values = {}
    for key, value in options.items():
        key = Doc(key, options.place).one_of([field.name for field in fields(known)])  # type: ignore[arg-type]
        values[key] = decode(value)
        if not _fits(values[key], hints[key]):
            raise value.error(f"{values[key]!r:.60} is no {hints[key]}")
    try:
        return known(**values)
    except GraphLocalError as error:
        raise doc.error(str(error.message)) from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: a plain one, a Literal, `tuple[X, ...]`, or a union."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(x) and value == x for x in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(_fits(part, get_args(hint)[0]) for part in value)
    return type(value) is hint or (hint is float and type(value) is int)
