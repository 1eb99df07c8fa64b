"""`Monitor`: what every subgraph learns while a model trains, step by step, for a log, TensorBoard and the terminal.

    monitor = graphlocal.Monitor(local, cross_entropy, every=50, run="run", tensorboard="tb")
    step = monitor.watch(graphlocal.train_step(local, cross_entropy, optimizer))
    with monitor:
        for x, y in loader:
            step(x, y)

or, around a training loop's own step, `with monitor.step(x, y): ...`. Observing changes nothing in the training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from graphlocal.alignment import Alignment, angles, gradients
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.meta import describe
from graphlocal.observation import Observation, numbers, observe, require_observable, square_sum
from graphlocal.run_log import RunLog
from graphlocal.runtime import LocalModule
from graphlocal.step import LossFunction
from graphlocal.tensorboard_view import TensorBoardView
from graphlocal.training_records import EpochRecord, StepRecord, View

Step = Callable[[Any, Any], Tensor]
SELDOM = 10
"""Angles and histograms are taken on every tenth observation, by default."""


class Monitor:
    """Observes the training of a compiled model.

    loss_fn: `loss_fn(output, y)`, as for `train_step`. every: steps from one observation to the next, which costs
    about one more step. angle_every: steps between alignment angles (None: every tenth observation; 0: never), each
    about another step by backpropagation. held: a batch (x, y) to measure angles on; else the batch of the step.
    run: folder of a run log (`graphlocal report` reads it); meta: what to keep beside it. resume: go on with that
    run's step numbers. tensorboard: folder for TensorBoard. views: further ones.

    steps: taken so far. overhead: seconds spent on observing.
    Raises InputError for options out of range, where the folder can't be written or is in use, and where TensorBoard
    is not installed.
    """

    def __init__(
        self, local: LocalModule, loss_fn: LossFunction, *, every: int = 50, angle_every: int | None = None,
        held: tuple[Any, Any] | None = None, run: str | Path | None = None, resume: bool = False,
        meta: dict[str, Any] | None = None, tensorboard: str | Path | None = None, views: Sequence[View] = (),
    ) -> None:  # fmt: skip
        if not isinstance(local, LocalModule):
            raise InputError("a monitor needs a compiled model", remedy="pass graphlocal.compile(model, ...)")
        require_observable(local)
        self.every, self.angle_every = every, SELDOM * every if angle_every is None else angle_every
        if every < 1 or self.angle_every % every:
            raise InputError(
                f"every={every}, angle_every={angle_every}", remedy="steps from 1 on, and a multiple of them (or 0)"
            )
        if resume and run is None:
            raise InputError("resume=True without a run", remedy="pass run=FOLDER, the folder of the run to go on with")
        self.local, self.loss_fn, self.held = local, loss_fn, held
        self.steps, self.overhead = 0, 0.0
        self.views: list[View] = []
        self._start = time.perf_counter()
        if tensorboard is not None:
            self.views.append(TensorBoardView(Path(tensorboard), local))
        if run is not None:
            log = RunLog(Path(run), local.graph, {**describe(local), **(meta or {})}, resume=resume)
            self.steps = log.step
            self.views.append(_Logged(log))
        self.views.extend(views)

    # Training.

    def watch(self, step: Step) -> Step:
        """The same training step, observed."""

        def watched(x: Any, y: Any) -> Tensor:
            with self.step(x, y):
                return step(x, y)

        return watched

    @contextmanager
    def step(self, x: Any, y: Any) -> Iterator[None]:
        """Put around one training step on the batch x, y."""
        number = self.steps + 1
        if number % self.every or not self.local.training:
            yield
            self.steps = number
            return
        begun = time.perf_counter()
        start = self._before(number, x, y)
        self.overhead += time.perf_counter() - begun
        yield
        self.steps, begun = number, time.perf_counter()
        record = self._after(number, *start)
        for view in self.views:
            view.on_step(record)
        self.overhead += time.perf_counter() - begun

    def epoch(
        self, epoch: int, loss: float, test_error: float | None = None, seconds: float | None = None, of: str = "local"
    ) -> None:
        """Note that an epoch ended. of: "local", or the name of a model that was trained beside this one."""
        for view in self.views:
            view.on_epoch(EpochRecord(of, epoch, self.steps if of == "local" else 0, loss, test_error, seconds))

    # Observing.

    def _before(self, number: int, x: Any, y: Any) -> tuple[Observation, Alignment | None, dict[str, Tensor]]:
        seen = observe(self.local, self.loss_fn, x, y)
        angle = self._angles(seen, x, y) if self.angle_every and number % self.angle_every == 0 else None
        weights = {n: p.detach().clone() for n, p in self.local.original.named_parameters() if p.requires_grad}
        return seen, angle, weights

    def _angles(self, seen: Observation, x: Any, y: Any) -> Alignment:
        if self.held is not None:
            x, y = self.held
            seen = observe(self.local, self.loss_fn, x, y)
        true = gradients(self.local, self.local.original, x, lambda output: self.loss_fn(output, y))
        return angles(self.local.graph, seen.updates, true)

    def _after(self, number: int, seen: Observation, angle: Alignment | None, before: dict[str, Tensor]) -> StepRecord:
        graph = self.local.graph
        now = dict(self.local.original.named_parameters())
        changes = {n: now[n].detach() - value for n, value in before.items() if n in now}
        trained = {s.name: [n for n in graph.trainable(s) if n in changes] for s in graph.subgraphs}
        squares: dict[str, Tensor | None] = {}
        for name, parameters in trained.items():
            if parameters:
                squares[f"weight {name}"] = square_sum([before[n] for n in parameters])
                squares[f"change {name}"] = square_sum([changes[n] for n in parameters])
        found = {name: math.sqrt(x) for name, x in numbers(squares).items()}
        weights = {name: found[f"weight {name}"] for name, parameters in trained.items() if parameters}
        return StepRecord(
            step=number,
            seconds=time.perf_counter() - self._start,
            loss=seen.loss,
            local_loss=seen.local_loss,
            update_norm=seen.update_norm,
            weight_norm=weights,
            step_ratio={n: found[f"change {n}"] / norm if norm else math.nan for n, norm in weights.items()},
            angle=angle.by_subgraph if angle else None,
            overall_angle=angle.overall if angle else None,
            credit_depth=_credit_depth(self.local),
            updates=seen.updates,
        )

    # Ending.

    def close(self, status: str = "finished") -> None:
        """Close the log and the views. status: why training ended, "finished" or "stopped"."""
        views, self.views = self.views, []
        for view in views:
            view.close(status)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "stopped")


class _Logged:
    """The run log as a view."""

    KEPT = ("step", "seconds", "loss", "local_loss", "update_norm", "weight_norm", "step_ratio", "angle",
            "overall_angle", "credit_depth")  # fmt: skip

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def on_step(self, record: StepRecord) -> None:
        known = ((name, getattr(record, name)) for name in self.KEPT)
        self.log.write({"kind": "step", **{name: value for name, value in known if value is not None}})

    def on_epoch(self, record: EpochRecord) -> None:
        self.log.write({"kind": "epoch", **{name: value for name, value in vars(record).items() if value is not None}})

    def close(self, status: str) -> None:
        self.log.write({"kind": "end", "status": status})


def _credit_depth(local: LocalModule) -> float | None:
    """The mean depth of credit assignment in the last step, where the rule lets samples stop."""
    try:
        depth = getattr(local, "credit_depth", None)
    except GraphLocalError:  # the rule lets none stop
        return None
    return None if depth is None else float(depth)
