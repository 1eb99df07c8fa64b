"""The pass pipeline: runs passes in order, verifies between them, and keeps a log of what each one did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graphlocal.errors import VerifyError
from graphlocal.ir import LocalGraph
from graphlocal.text import difference
from graphlocal.verify import verify


class Pass(Protocol):
    """A pass is a frozen dataclass with a name; its fields are its options. It never changes its argument."""

    @property
    def name(self) -> str: ...

    def apply(self, graph: LocalGraph) -> LocalGraph: ...


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. seconds: its own time, without the verifier's."""

    name: str
    before: LocalGraph
    after: LocalGraph
    seconds: float

    def __str__(self) -> str:
        """The pass with the difference that it made to the graph's text."""
        return f"=== {self.name} ({self.seconds:.3f} s)\n{difference(self.before, self.after)}"


def run(graph: LocalGraph, passes: Sequence[Pass]) -> tuple[LocalGraph, tuple[PassRecord, ...]]:
    """Apply the passes in order, verifying the graph before the first and after each.

    Raises VerifyError, naming the pass after which the graph broke a rule.
    """
    verify(graph)
    records: list[PassRecord] = []
    for step in passes:
        start = time.perf_counter()
        after = step.apply(graph)
        records.append(PassRecord(step.name, graph, after, time.perf_counter() - start))
        try:
            verify(after)
        except VerifyError as error:
            done = ", ".join(record.name for record in records[:-1]) or "none"
            error.add_note(f"  after the pass {step.name!r} (passes before it: {done})")
            raise
        graph = after
    return graph, tuple(records)
