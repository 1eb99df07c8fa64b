"""Axes: where a number lies on one, and where its ticks are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """From numbers between `low` and `high` to pixels between `start` and `end`; logarithmic if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def holds(self, value: float | None) -> bool:
        """Whether the value has a place: a finite number, above 0 on a logarithmic scale."""
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers within the scale."""
        return _log_ticks(self.low, self.high, most) if self.log else _ticks(self.low, self.high, most)


def scale(values: Iterable[float | None], start: float, end: float, *, log: bool = False, zero: bool = False) -> Scale:
    """A scale that holds all finite values with some room; from 0 on with `zero`."""
    fit = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(fit), max(fit)) if fit else (1.0, 1.0)
    if log:
        low, high = low / 1.2, high * 1.2
        if high / low < 4:
            low, high = low / 2, high * 2
    else:
        low = min(low, 0.0) if zero else low
        room = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
        low, high = low if zero else low - room, high + room
    return Scale(low, high, start, end, log)


def integers(most: int, start: float, end: float, first: int = 1) -> Scale:
    """A scale for whole numbers, of epochs, from `first` to `most`."""
    return Scale(first, max(most, first + 1), start, end)


def _ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**k for k in range(first, last + 1) for d in digits if low <= d * 10.0**k <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def label(value: float) -> str:
    """A tick's number: 0.01, 2500, 1e-05."""
    return f"{value:.6g}"
