"""A monitor's records in the terminal: a table that renews itself, or plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from graphlocal.ir import LocalGraph
from graphlocal.training_records import EpochRecord, StepRecord

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-:=+*#"
WIDTH = 24
"""Observations in a sparkline."""
AROUND_THE_ROWS = 12
"""Lines of the terminal that the table's rows can't have."""


class LiveView:
    """Shows each subgraph's local loss with its course, step ratio and angle; the newest `WIDTH` observations.

    A model with more subgraphs than the terminal has lines shows those with the largest angles (or the first).
    """

    def __init__(self, console: Console, graph: LocalGraph) -> None:
        self.console, self.graph = console, graph
        self.losses: dict[str, deque[float]] = {}
        self.angle: dict[str, float] = {}
        self.last: StepRecord | None = None
        self.progress: Progress | None = None
        self._live: Live | None = None

    @contextmanager
    def around(self, progress: Progress) -> Iterator[None]:
        """Show the table, with the progress bars above it, while open; the last one stays on the screen."""
        if not self.console.is_terminal:
            with progress:
                yield
            return
        self.progress = progress
        with Live(get_renderable=self._rendered, console=self.console, refresh_per_second=4) as self._live:
            try:
                yield
            finally:
                self._live = None

    def on_step(self, record: StepRecord) -> None:
        self.last = record
        self.angle.update(record.angle or {})
        for name, loss in record.local_loss.items():
            self.losses.setdefault(name, deque(maxlen=WIDTH)).append(loss)
        if self._live is None and record.seldom:
            self.console.print(self._line(record), markup=False)

    def on_epoch(self, record: EpochRecord) -> None:
        """The command prints a line for each epoch itself."""

    def close(self, status: str) -> None:
        """The table is left to `around`."""

    def _line(self, record: StepRecord) -> str:
        parts = [f"step {record.step}: loss {record.loss:.4f}"]
        for name in self._shown(6):
            parts.append(f"{name} {_number(record.local_loss.get(name))} {_angle(self.angle.get(name))}")
        hidden = len(self.losses) - 6
        return " | ".join([*parts, *([f"and {hidden} more"] if hidden > 0 else [])])

    def _rendered(self) -> Group:
        parts: list[RenderableType] = [self.progress] if self.progress else []
        return Group(*parts, *([self.table()] if self.last else []))

    def _shown(self, most: int) -> Sequence[str]:
        if len(self.losses) <= most:
            return list(self.losses)
        worst = sorted(self.losses, key=lambda name: -_known(self.angle.get(name)))[:most]
        return [name for name in self.losses if name in worst]

    def table(self) -> Table:
        """The table of the last observation."""
        assert self.last is not None
        record = self.last
        rows = self._shown(max(3, self.console.height - AROUND_THE_ROWS))
        depth = "" if record.credit_depth is None else f", credit depth {record.credit_depth:.2f} subgraphs"
        more = f", {len(rows)} of {len(self.losses)} subgraphs" if len(rows) < len(self.losses) else ""
        table = Table(title=f"step {record.step}, loss {record.loss:.4f}{depth}{more}", title_justify="left")
        table.add_column("subgraph", overflow="ellipsis", no_wrap=True, max_width=40)
        table.add_column("local loss", justify="right", no_wrap=True)
        table.add_column("its course", no_wrap=True)
        table.add_column("step / weights", justify="right", no_wrap=True)
        table.add_column("angle", justify="right", no_wrap=True)
        bars = BARS if (self.console.encoding or "").lower().startswith("utf") else ASCII_BARS
        for name in rows:
            losses = self.losses[name]
            angle = self.angle.get(name)
            table.add_row(
                Text(name), _number(losses[-1]), sparkline(losses, bars), _number(record.step_ratio.get(name)),
                Text(_angle(angle), style=_style(angle)),
            )  # fmt: skip
        return table


def sparkline(values: Sequence[float] | deque[float], bars: str = BARS) -> str:
    """One character a value, from the smallest to the largest of those that are finite; a space for the others."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    scale: Callable[[float], int] = lambda v: round((v - low) / span * (len(bars) - 1)) if span else 0  # noqa: E731
    return "".join(bars[scale(value)] if math.isfinite(value) else " " for value in values)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _angle(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0f}°"


def _known(angle: float | None) -> float:
    return -1.0 if angle is None or math.isnan(angle) else angle


def _style(angle: float | None) -> str:
    """Red where the update ascends, green where it is close to the gradient."""
    if angle is None or math.isnan(angle):
        return ""
    return "red" if angle >= 90 else "green" if angle < 45 else ""
