"""Rates and times as people write them: `10Gb`, `1.6TB/s`, `5us`, `19.5T`."""

from __future__ import annotations

import math
import re

from graphlocal.errors import InputError

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"\s*(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*"
_BANDWIDTH = re.compile(_NUMBER + r"(?P<prefix>[kKMGTP]?)(?P<unit>b|B|bit|byte)(?:/s|ps)?\s*")
_TIME = re.compile(_NUMBER + r"(?P<unit>ns|us|µs|ms|s)\s*")
_RATE = re.compile(_NUMBER + r"(?P<prefix>[kKMGTP]?)\s*(?:FLOPS?|FLOP/s|flops?|flop/s)?\s*")


def bandwidth(text: str | float, name: str = "bandwidth") -> float:
    """Bytes a second: `10Gb` is 10 gigabits a second, `10GB` gigabytes; a number is taken as bytes a second."""
    match = _match(_BANDWIDTH, text, name, "10Gb (gigabits a second) or 1.25GB (gigabytes a second)")
    if match is None:
        return _positive(float(text), name)
    bits = 8 if match["unit"] in ("b", "bit") else 1
    return _positive(float(match["number"]) * _PREFIX[match["prefix"]] / bits, name)


def seconds(text: str | float, name: str = "latency") -> float:
    """Seconds: `5us`, `0.1ms`; a number is taken as seconds, and 0 is allowed."""
    match = _match(_TIME, text, name, "5us, 0.1ms or 1s")
    value = float(text) if match is None else float(match["number"]) * _SECONDS[match["unit"]]
    if not math.isfinite(value) or value < 0:
        raise InputError(f"{name} is {text!r}", remedy="give a time of 0 or more")
    return value


def rate(text: str | float, name: str = "flops") -> float:
    """Floating-point operations a second: `19.5T`, `100GFLOPS`; a number is taken as it is."""
    match = _match(_RATE, text, name, "19.5T or 100GFLOPS")
    value = float(text) if match is None else float(match["number"]) * _PREFIX[match["prefix"]]
    return _positive(value, name)


def _match(pattern: re.Pattern[str], text: str | float, name: str, example: str) -> re.Match[str] | None:
    """None for a number."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return None
    match = pattern.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{name} is {text!r}, which is not understood", remedy=f"write {example}")
    return match


def _positive(value: float, name: str) -> float:
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{name} is {value:g}", remedy="give a number above 0")
    return value


def time_label(value: float) -> str:
    """`1.50 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def bytes_label(value: float) -> str:
    """`1.5 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
