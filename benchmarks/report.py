"""What the benchmarks share: the machine's description and the result file."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """One line that says what a figure was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores, {device}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, Python {sys.version.split()[0]}"
    )


def _processor() -> str:
    """The processor's name, as far as the system tells, and the instructions that torch's kernels use on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


@contextmanager
def timed_calls(*places: tuple[Any, str]) -> Iterator[dict[str, float]]:
    """While open, the seconds spent in the functions that stand at `places`, as (module, name), by their names."""
    seconds = {name: 0.0 for _, name in places}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[name] += time.perf_counter() - start

        return run

    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(name, getattr(owner, name))))
        yield seconds


WARM_UP = 3
"""Rounds that are not timed."""


Step = Callable[[], object]


def seconds_on_gpu(step: Step) -> float:
    """Seconds between two CUDA events around a step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


LONG_ENOUGH = 0.02
"""Seconds; shorter steps are timed several in a row."""


Name = TypeVar("Name", bound=Hashable)


def in_turn(
    steps: Mapping[Name, Step], rounds: int, clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Step], float] | None = None,
) -> dict[Name, list[float]]:  # fmt: skip
    """Seconds of each step in each round; a round runs every step in turn, so that a busy machine slows all alike.

    The order is drawn anew in each round (always the same draws): the first step after another way's large one is
    slower by some percent. Each is timed right after a step of its own that is not, since that is how models train: the
    caches hold its own code and weights, not another way's. measure: the seconds of one step, in place of the clock's
    difference.
    """

    def by_the_clock(step: Step, count: int) -> float:
        step()
        start = clock()
        for _ in range(count):
            step()
        return (clock() - start) / count

    times: dict[Name, list[float]] = {name: [] for name in steps}
    count = dict.fromkeys(steps, 1)
    order, drawn = list(steps), random.Random(0)
    for i in range(rounds + WARM_UP):
        drawn.shuffle(order)
        for name in order:
            step = steps[name]
            seconds = measure(step) if measure else by_the_clock(step, count[name])
            if i >= WARM_UP:
                times[name].append(seconds)
            else:
                count[name] = max(1, int(LONG_ENOUGH / max(seconds, 1e-6)))
    return times


def keep_memory() -> None:
    """Let the C library keep what is freed, where it is glibc.

    Left alone it returns large blocks to the system, or doesn't, by what happens to lie behind them: in one process
    each step of backpropagation then has thousands of page faults, and is a tenth slower, and in the next one none.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**26), (mmap_max, 0)):
            library.mallopt(option, value)


def quartiles(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Low quartile, median and high quartile of the ratio within a round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, other, strict=True)], n=4)
    return low, middle, high


def ratio(mine: Sequence[float], other: Sequence[float]) -> str:
    """Median and quartiles of the ratio within a round."""
    low, middle, high = quartiles(mine, other)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def compared(
    title: str, times: Mapping[str, Sequence[float]], shown: Sequence[str], pairs: Sequence[tuple[str, str]],
    steps: int = 1,
) -> list[str]:  # fmt: skip
    """A row of a table: milliseconds a step of the ways `shown`, and of each pair the ratio of the one to the other.

    steps: that `times` hold together.
    """
    row = [title, *(f"{1000 * statistics.median(times[way]) / steps:.1f}" for way in shown)]
    row += [ratio(times[mine], times[base]) for mine, base in pairs]
    print(" | ".join(row), file=sys.stderr)
    return row


def header(shown: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The heads of the columns of `compared`, but the title's."""
    return [*(f"{way}, ms" for way in shown), *(f"{mine} / {base}" for mine, base in pairs)]


def load() -> str:
    """How busy the machine is, for the notes."""
    return f" Load at the end: {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores."


def conditions(options: argparse.Namespace) -> str:
    """What a reader of the times has to know, for the notes; options: `return_memory`, `clock`."""
    memory = "" if options.return_memory else " Freed memory is kept by the process."
    clock = "" if options.clock == "wall" else " CPU time of the process, not of the clock."
    return load() + memory + clock


def write(name: str, title: str, command: str, tables: list[str], notes: str = "") -> None:
    """Print the report and keep it as benchmarks/results/`name`.md."""
    parts = [f"# {title}", f"`{command}` on {machine()}.", *tables, notes]
    text = "\n\n".join(part for part in parts if part) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


@contextmanager
def pictures(name: str, count: int, width: float, height: float) -> Iterator[list[Any]]:
    """The axes of plots side by side, kept as benchmarks/results/`name`.png; width, height: of one, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(count * width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield [figure.add_subplot(1, count, i + 1) for i in range(count)]
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


@contextmanager
def picture(name: str, width: float, height: float) -> Iterator[Any]:
    """The axes of one plot; see `pictures`."""
    with pictures(name, 1, width, height) as (axes,):
        yield axes


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
