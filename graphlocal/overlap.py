"""`step.run(batches)`: training steps that overlap, with the results of one after another.

A batch that was fetched and whose forward pass may have begun is **ahead**. What it changes before its turn, that is
buffers and the state of torch's random numbers, is taken back whenever the user's code looks: at every loss, and when
the run ends early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphlocal import autocast as amp
from graphlocal.arguments import call_of
from graphlocal.compiler import Compiled
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.execution import Run
from graphlocal.finite import require_finite
from graphlocal.norms import UpdateNorms
from graphlocal.runtime import LocalModule
from graphlocal.targets.eager import Apply
from graphlocal.targets.lanes import Flight, Lanes, Part, Waits
from graphlocal.targets.overlap import Alone, Overlap, task, tensors

MOST_STALENESS = 64
UNDER_AUTOCAST = "autocast is on, which is a state of one thread, while steps overlap on several"


class Step(Protocol):
    """A fused training step; `graphlocal.step.TrainStep` is one."""

    local: LocalModule

    def __call__(self, x: Any, y: Any) -> Tensor: ...

    def _loss(
        self, compiled: Compiled, outputs: Any, y: Any, empty: bool = False
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]: ...

    def _norms(self, compiled: Compiled) -> UpdateNorms: ...

    def _updates(self, compiled: Compiled, norms: UpdateNorms) -> Apply: ...


def overlapped(step: Step, batches: Iterable[tuple[Any, Any]], staleness: int) -> Iterator[Tensor]:
    """The losses of training steps on the batches; see `TrainStep.run`."""
    options = step.local.options
    overlaps = options.target == "streams" and options.rule.engine == "schedule" and options.rule.calibration is None
    if not isinstance(staleness, int) or isinstance(staleness, bool) or not 0 <= staleness <= MOST_STALENESS:
        raise InputError(f"staleness={staleness!r}", remedy=f"pass a number of updates from 0 to {MOST_STALENESS}")
    if staleness and not overlaps:
        raise InputError(
            f"staleness={staleness} with target {options.target!r} and rule {options.rule.name!r}",
            why="forward passes come before updates only where steps overlap",
            remedy='pass target="streams" to graphlocal.compile, with a rule without calibration steps',
        )
    devices = {tensor.device.type for tensor in (*step.local.original.parameters(), *step.local.original.buffers())}
    if staleness and devices != {"cpu"}:
        raise _not_stale(staleness, f"the model is on {', '.join(sorted(devices))}, and steps overlap on a CPU alone")
    if not isinstance(batches, Iterable):
        raise InputError(f"batches is a {type(batches).__name__}", remedy="pass pairs (x, y), such as a DataLoader")
    return _Run(step, batches, staleness).losses() if overlaps else (step(*pair(batch)) for batch in batches)


def _not_stale(staleness: int, why: str) -> InputError:
    return InputError(f"staleness={staleness}, where steps can't overlap", why=why, remedy="leave staleness at 0")


def pair(batch: Any) -> tuple[Any, Any]:
    """The two parts of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(
            f"a batch is a {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""),
            remedy="let batches yield pairs (x, y); x may be a tuple or a dict of the model's inputs",
        )
    return batch[0], batch[1]


@dataclass(eq=False)
class _Ahead:
    """A batch that is ahead. started: its forward pass; None where it can't overlap, and is trained on by itself.

    random: the state of torch's random numbers before and after the batch was fetched. buffers: those that its forward
    pass changes, with their values before. watch: what is to be closed after the forward pass.
    """

    number: int
    x: Any
    y: Any
    random: tuple[Tensor, Tensor]
    started: _Started | None = None
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    watch: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True, eq=False)
class _Started:
    compiled: Compiled
    run: Run
    plan: Overlap
    flight: Flight


class _Run:
    """One call of `TrainStep.run`.

    ahead: batches in their order. learning: the error pass that runs. asking: the fetching of the next batch, while it
    is not over. presented: whether the user's code has the word.
    """

    def __init__(self, step: Step, batches: Iterable[Any], staleness: int) -> None:
        self.step, self.local, self.most = step, step.local, staleness + 1
        self.batches = iter(batches)
        self.lanes = Lanes(step.local.options.streams)
        self.ahead: deque[_Ahead] = deque()
        self.learning: Flight | None = None
        self.asking: Flight | None = None
        self.number = 0
        self.closed = self.presented = False
        self.error: Exception | None = None
        self._known_waits: dict[tuple[Part, Part], Waits] = {}

    def losses(self) -> Iterator[Tensor]:
        try:
            self._fetch()
            while self.ahead:
                yield from self._present(self._train())
                if not self.ahead and not self.closed:
                    self._fetch_now()
        finally:
            if not self.presented:
                self._take_back()
        if self.error is not None:
            raise self.error

    # Batches.

    def _fetch(self) -> None:
        """Take the next batch, and let its forward pass start."""
        self.asking = None
        before = torch.get_rng_state()
        try:
            with torch.enable_grad(), self.lanes.all_threads():
                x, y = pair(next(self.batches))
            ahead = _Ahead(self.number, x, y, (before, torch.get_rng_state()))
            ahead.started = self._started(ahead)
        except StopIteration:
            self.closed = True
        except Exception as error:  # of the user's code or data: it is raised when its turn comes
            self.closed, self.error = True, error
            torch.set_rng_state(before)
        else:
            self.number += 1
            self._enter(ahead)
            self._ask()

    def _enter(self, ahead: _Ahead) -> None:
        """Let a forward pass start, after those that were entered before."""
        if ahead.started is not None:
            part = ahead.started.flight.part
            ahead.buffers = [(b, b.clone()) for b in tensors(part, self.local.original)]
            self.lanes.add(ahead.started.flight, [(f, self._waits(part, f.part)) for f in self._flying()])
        self.ahead.append(ahead)

    def _ask(self) -> None:
        """Let the next batch be fetched on this thread, once what reads or draws before it is over."""
        if self.closed or self.asking or len(self.ahead) >= self.most or (self.ahead and not self.ahead[-1].started):
            return
        self.asking = task(self._fetch, self.number)
        self.lanes.add(self.asking, [(f, (f.part.before_a_batch,)) for f in self._flying()])

    def _fetch_now(self) -> None:
        if self.asking is None:
            self._fetch()
        else:
            self.lanes.run(self.asking)

    def _flying(self) -> list[Flight]:
        """The passes that may not be over, in the order of the program."""
        started = [a.started for a in self.ahead if a.started is not None]
        before = [s for s in started if self.learning is None or s.flight.order < self.learning.order]
        after = [s for s in started if s not in before]
        learning = [] if self.learning is None else [self.learning]
        return [f for f in (*(s.flight for s in before), *learning, *(s.flight for s in after)) if f.left]

    def _waits(self, part: Part, earlier: Part) -> Waits:
        key = part, earlier
        if key not in self._known_waits:
            self._known_waits[key] = part.waits(earlier)
        return self._known_waits[key]

    def _started(self, ahead: _Ahead) -> _Started | None:
        """The forward pass of a batch for which all is ready: compiled, lowered, and cut into pieces."""
        args, kwargs = call_of(ahead.x, "x")
        leaves, spec = self.local._binder.flatten(args, kwargs)
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        compiled = self.local._known(leaves, spec) if self.local.training else None
        self._require_overlap(compiled, leaves)
        passes = compiled.execution.known(leaves) if compiled is not None else None
        if compiled is None or passes is None or isinstance(plan := passes.overlap, Alone):
            return None
        if self.most == 1 and self.local._lag.due():
            ahead.watch.enter_context(self.local._lag.watching())
        run = Run(compiled.execution, passes, leaves, True, elsewhere=True)
        return _Started(compiled, run, plan, Flight(plan.forward, leaves, ahead.number))

    def _require_overlap(self, compiled: Compiled | None, leaves: list[Any]) -> None:
        """Raise InputError where a staleness was asked for, and batches like this one never overlap with others."""
        if self.most == 1:
            return
        why = UNDER_AUTOCAST if amp.is_on() else None
        if compiled is not None and why is None:
            why = compiled.execution.never(leaves)
            passes = compiled.execution.known(leaves)
            if passes is not None and isinstance(plan := passes.overlap, Alone):
                why = plan.why
        if why is not None:
            raise _not_stale(self.most - 1, why)

    # Training.

    def _train(self) -> Tensor:
        """The loss of the first batch ahead, after its updates."""
        head, started = self.ahead[0], self.ahead[0].started
        if started is None:
            self.ahead.popleft()
            return self.step(head.x, head.y)
        self.lanes.run(started.flight)
        while self.asking is not None:  # the forward passes that come before this batch's updates
            self.lanes.run(self.asking)
        self.ahead.popleft()
        head.watch.close()
        run = started.run
        run.outputs, run.saved = started.flight.result()
        with torch.enable_grad():
            loss, errors = self.step._loss(started.compiled, run.outputs, head.y, run.empty)
        errors = _apart(errors, head)
        norms = self.step._norms(started.compiled)
        apply = self.step._updates(started.compiled, norms)
        with torch.no_grad():
            if tuple(error is not None for error in errors) != run.passes.taken:
                run.error_pass(errors, apply)  # a loss on other outputs than before
            else:
                self._learn(head.number, started, errors, apply)
            require_finite(started.compiled, errors, norms, run.empty)
        return loss

    def _learn(self, number: int, started: _Started, errors: Any, apply: Any) -> None:
        part = started.plan.error
        learning = Flight(part, (started.run.saved, errors, apply, False), number)
        self.lanes.add(learning, [(f, self._waits(part, f.part)) for f in self._flying()])
        self.learning = learning
        started.run.saved = started.run.start = None
        self._ask()
        self.lanes.run(learning)
        self.learning = None

    # The user's turn.

    def _present(self, loss: Tensor) -> Iterator[Tensor]:
        """Yield a loss, with the model as it is after that batch."""
        if not self.ahead:
            self.presented = True
            yield loss
            self.presented = False
            return
        kept = [(buffer, buffer.clone()) for buffer, _ in self.ahead[0].buffers]
        random = torch.get_rng_state()
        self._take_back()
        before, drawn = _state(self.local), torch.get_rng_state()
        self.presented = True
        yield loss
        self.presented = False
        drew = not torch.equal(torch.get_rng_state(), drawn)
        if drew or _state(self.local) != before:
            self._begin_again(drew)
        else:
            _restore(kept)
            torch.set_rng_state(random)

    def _take_back(self) -> None:
        """Undo what the batches ahead have changed."""
        if self.ahead:
            _restore(self.ahead[0].buffers)
            torch.set_rng_state(self.ahead[0].random[0])

    def _begin_again(self, drew: bool) -> None:
        """Start the batches ahead once more, from the model as it is now."""
        if drew and not all(torch.equal(*ahead.random) for ahead in self.ahead):
            raise LocalTrainingError(
                "random numbers were drawn between two losses of step.run, and by what fetches the batches",
                why="the next batch is fetched before its turn, so that the numbers would not be those of a plain loop",
                remedy="give one of them a torch.Generator of its own, or call step(x, y) in a loop",
            )
        again, self.asking = list(self.ahead), None
        self.ahead.clear()
        self.lanes.clear()
        if not self.local.training:
            raise InputError("the model is in evaluation mode", remedy="call local.train() before training")
        for ahead in again:
            for flight in self._flying():  # its buffers are to be those that it starts from
                self.lanes.run(flight)
            now = torch.get_rng_state()
            random = (now, now) if drew else ahead.random
            torch.set_rng_state(random[1])
            new = _Ahead(ahead.number, ahead.x, ahead.y, random)
            new.started = self._started(new)
            self._enter(new)
        self._ask()


def _apart(errors: tuple[Tensor | None, ...], ahead: _Ahead) -> tuple[Tensor | None, ...]:
    """Errors in memory of their own: who fetches the next batch may fill that of this one."""
    given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((ahead.x, ahead.y)) if isinstance(x, Tensor)}
    return tuple(e.clone() if e is not None and e.untyped_storage()._cdata in given else e for e in errors)


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)


def _state(local: LocalModule) -> tuple[Any, ...]:
    """What the user's code may have changed: tensors by their versions, modes, frozen parameters, autocast."""
    held = (*local.original.parameters(), *local.original.buffers(), *local.error_weights.parameters(),
            *local.error_weights.buffers())  # fmt: skip
    versions = [(id(t), t._version, t.data_ptr()) for t in held]
    return local.training, local._watch.state(), amp.autocast_now(), versions
