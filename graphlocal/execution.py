"""Which functions run a compiled model for one call: the lowered training graph where it holds, else the eager one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from graphlocal import autocast as amp
from graphlocal.alike import alike, largest_number
from graphlocal.arguments import empty_batch, holds_no_sample
from graphlocal.autocast import Autocast, autocast_now, under
from graphlocal.capture import is_capturing
from graphlocal.errors import LocalTrainingError
from graphlocal.norms import are_numbers, told_numbers
from graphlocal.preserve import preserved
from graphlocal.targets.accesses import annotate
from graphlocal.targets.batched import batched
from graphlocal.targets.compilation import Compilation
from graphlocal.targets.fast_tanh import replace_tanh
from graphlocal.targets.flat import flatten
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.inductor import compiled_passes
from graphlocal.targets.lowered import NotLowered, lower
from graphlocal.targets.overlap import Alone, Overlap, overlap
from graphlocal.targets.recompute import recompute
from graphlocal.targets.scratch import Scratch
from graphlocal.targets.shared_errors import sum_positions
from graphlocal.targets.stacked_updates import stack_updates
from graphlocal.targets.stacking import ALL, GPU, Stacking
from graphlocal.targets.streams import streamed
from graphlocal.targets.telling import telling
from graphlocal.targets.training_graph import TrainingGraph, split
from graphlocal.targets.unchanged import Unchanged, unchanged, versions

MANY_SHAPES = 8
"""Shapes of inputs that are lowered; further ones run the eager graph, which takes any batch size."""

_RECURRENT = re.compile(r"aten\.(lstm|gru|rnn_tanh|rnn_relu)\.")
"""Whole recurrent layers: one call of a fast kernel, but hundreds of operators once lowered."""


@dataclass(frozen=True)
class Passes:
    """forward(*leaves) -> (outputs, saved); error(saved, errors, [apply,] retain).

    taken: for which outputs `error` must be given one; None if any will do. lowered: what they were made from, if
    they are fused and for target="streams". updating: the graph of a fused step. casts: autocast's casts are among
    their operators, so it must be off. telling: the places of the weights' updates that hold NaN if any does, where
    that is known. unchanged: what the caller must leave as it is until the error pass, where autograd does not look.
    """

    forward: Callable[..., Any]
    error: Callable[..., Any]
    taken: tuple[bool, ...] | None = None
    lowered: TrainingGraph | None = None
    updating: TrainingGraph | None = None
    casts: bool = False
    telling: tuple[int, ...] | None = None
    unchanged: Unchanged | None = None

    @cached_property
    def overlap(self) -> Overlap | Alone:
        """The fused passes in pieces that may overlap with other steps', or why there are none."""
        return Alone("the passes are not lowered") if self.lowered is None else overlap(self.lowered)

    @cached_property
    def are_numbers(self) -> Callable[[Sequence[Tensor | None]], bool]:
        """Whether the updates of the weights hold no NaN."""
        return are_numbers if self.telling is None else partial(told_numbers, self.telling)


class Execution:
    """Runs one compilation.

    target: `"eager"`; `"lowered"`, `"batched"` (lowered, what can be stacked is), `"inductor"` or `"streams"` (lowered,
    on several lanes), or NotLowered is raised; `"auto"`: lowered from the second call with the same shapes on, where
    that is possible and pays, and batched where that pays and no subgraph recomputes, since stacks take memory.
    not_lowered: why the eager graph runs, once that is known. batches: how many computations of stacked updates the
    last lowered graph has, whose results lie in `scratch`; shared_errors: how many values it computes from errors that
    all positions share.
    """

    def __init__(self, compiled: Compilation, target: str) -> None:
        self.compiled, self.target = compiled, target
        self._strict = target not in ("auto", "eager")
        self.not_lowered: NotLowered | None = None
        self._refused: set[Autocast] = set()  # under which nothing can be lowered
        self.taken = compiled.differentiable  # the outputs that the last loss sent an error
        self._shapes: set[Any] = set()
        self._passes: dict[Any, Passes] = {}
        self._last: tuple[Any, tuple[bool, ...], bool, Passes] | None = None  # found last, and under what key
        self.batches = self.shared_errors = 0
        self.scratch = Scratch()
        self.sums_positions = True
        self.many_outputs = sum(compiled.differentiable) > 1
        if target == "eager":
            self.not_lowered = NotLowered("the target is 'eager'")
        elif compiled.guarded:
            self.not_lowered = NotLowered("the graph is a recording with guards, which look at the data")
        elif compiled.rule.needs_labels:
            self.not_lowered = NotLowered(
                "the local heads take the labels, which the lowered graph has no argument for"
            )
        elif compiled.rule.needs_losses:
            self.not_lowered = NotLowered("the lowered graph has no argument for the losses of the samples")
        elif compiled.calibrates:
            self.not_lowered = NotLowered("a calibration step fits feedback maps, in few steps only")
        elif compiled.rule.relaxes:
            self.not_lowered = NotLowered("a relaxation repeats its steps, each of which would be lowered anew")
        elif any(_RECURRENT.match(op.target) for op in compiled.graph.operations):
            self.not_lowered = NotLowered("a whole recurrent layer is one fast operator, but hundreds once lowered")
        if self.not_lowered is not None and self._strict and not compiled.calibrates:
            raise self.not_lowered

    def run(self, leaves: list[Any], fused: bool, known: Any = None) -> Run:
        """Run the forward pass on these flattened arguments. known: their signature, where the caller has it."""
        if amp.is_on():
            torch.clear_autocast_cache()  # of the weights that the last step changed
        passes = self._lowered(leaves, fused, known or signature(leaves)) if self.not_lowered is None else None
        return Run(self, passes or self.eager(fused), leaves, fused)

    def eager(self, fused: bool) -> Passes:
        """The passes of the eager training graph, for any shapes and any loss."""
        return Passes(*(self.compiled.run_fused_passes if fused else self.compiled.run_passes))

    def known(self, leaves: Sequence[Any]) -> Passes | None:
        """The passes of a fused step on arguments like these, if it was lowered before."""
        found: Passes | None = None
        if self.not_lowered is None and not amp.is_on():
            found = self._passes.get((signature(leaves), self.taken, True))
        return found

    def never(self, leaves: Sequence[Any]) -> str | None:
        """Why no step on arguments like these is ever known; None if one is, or can be once a step was made."""
        if self.not_lowered is not None:
            return f"the step is not lowered: {self.not_lowered.message}"
        full = len(self._shapes) >= MANY_SHAPES and signature(leaves) not in self._shapes
        return (
            f"only the first {MANY_SHAPES} shapes of inputs are lowered, and these have another one" if full else None
        )

    def _lowered(self, leaves: Sequence[Any], fused: bool, shapes: Any) -> Passes | None:
        last = self._last
        autocast: Autocast = ()
        if last is not None and last[0] is shapes and last[1:3] == (self.taken, fused) and not amp.is_on():
            return last[3]
        if amp.is_on():
            autocast = autocast_now()
            if not autocast or autocast in self._refused:  # on a kind of device that is not known; or in vain
                return None
            shapes = shapes, autocast
        key = shapes, self.taken, fused
        found = self._passes.get(key)
        if found is not None:
            if not autocast:
                self._last = shapes, self.taken, fused, found
            return found
        asks_back = any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
        if asks_back or self.holds_no_sample(leaves):
            return None
        seen = shapes in self._shapes
        if len(self._shapes) < MANY_SHAPES:
            self._shapes.add(shapes)
        if shapes not in self._shapes or not (seen or self._strict):
            return None
        try:
            with amp.off():
                self._passes[key] = self._lower(leaves, fused, autocast)
        except NotLowered as error:
            if autocast:
                self._refused.add(autocast)
            else:
                self.not_lowered = error
            if self._strict:
                raise
        return self._passes.get(key)

    def holds_no_sample(self, leaves: Sequence[Any]) -> bool:
        """Whether an input is empty that is not empty always."""
        given = zip(leaves, self.compiled.graph.inputs, strict=True)
        return holds_no_sample([x for x, item in given if item.type is None or 0 not in item.type.shape])

    def _lower(self, leaves: Sequence[Any], fused: bool, autocast: Autocast) -> Passes:
        self.shared_errors = 0
        try:
            lowered = self.lowered(leaves, autocast)
            plain = self._passes_of(lowered)
            self._require_equal(plain, leaves, autocast)
        except NotLowered:
            if not self.shared_errors:
                raise
            self.sums_positions = False
            return self._lower(leaves, fused, autocast)
        if self.target == "batched" or (self.target == "auto" and not self.compiled.recomputed):
            lowered, plain = self._batched(lowered, plain, leaves, autocast)
        passes = replace(self._fused(lowered, plain, fused), casts=bool(autocast))
        if fused:
            return passes
        forward, error = split(lowered)
        held = unchanged(forward, error)
        if self.target == "inductor":  # which may return one result twice
            held = replace(held, fresh=False)
        return replace(passes, telling=telling(error), unchanged=held)

    def _fused(self, lowered: TrainingGraph, plain: Passes, fused: bool) -> Passes:
        if self.target == "inductor":
            return self._by_inductor(lowered, fused)
        if not fused:
            return plain
        updating = with_updates(lowered)
        if self.batches:
            stack_updates(updating)
        passes = replace(self._passes_of(updating), updating=updating)
        return replace(passes, lowered=lowered) if self.target == "streams" else passes

    def lowered(self, leaves: Sequence[Any], autocast: Autocast = ()) -> TrainingGraph:
        """The lowered training graph, without the values that the error pass works out again.

        Raises NotLowered where there is none.
        """
        graph = self.compiled.graph
        again = [graph.number[name] for name in self.compiled.recomputed]
        with under(autocast):
            lowered = lower(self.compiled.training, leaves, self.taken)
        self.shared_errors = sum_positions(lowered) if self.sums_positions else 0
        return recompute(lowered, again, apart=self.target == "streams")

    def _batched(
        self, lowered: TrainingGraph, plain: Passes, leaves: Sequence[Any], autocast: Autocast
    ) -> tuple[TrainingGraph, Passes]:
        """The lowered graph and its passes with updates stacked, where that is possible and pays."""
        on_gpu = any(weight.is_cuda for weight in self.compiled.weights)
        stacking = ALL if self.target == "batched" else GPU if on_gpu else Stacking()
        found, self.batches = batched(lowered, self.compiled.graph, stacking)
        if not self.batches:
            return lowered, plain
        passes = self._passes_of(found)
        try:
            self._require_equal(passes, leaves, autocast)
        except NotLowered:
            if self._strict:
                raise
            self.batches = 0
            return lowered, plain
        return found, passes

    def _passes_of(self, lowered: TrainingGraph) -> Passes:
        if self.target == "streams":
            annotate(lowered)
        forward, error = split(lowered)
        if self.target in ("auto", "batched"):
            replace_tanh(error.graph)
        if self.target == "streams":
            streams = self.compiled.streams
            return Passes(streamed(forward, streams), streamed(error, streams), self.taken)
        forward_pass = flatten(forward, lowered=True)
        error_pass = flatten(error, lowered=True, scratch=self.scratch)
        return Passes(_without_autograd(forward_pass), _without_autograd(error_pass), self.taken)

    def _by_inductor(self, lowered: TrainingGraph, fused: bool) -> Passes:
        forward, error, fused_error = compiled_passes(lowered)
        return Passes(forward, fused_error if fused else error, self.taken)

    def _require_equal(self, lowered: Passes, leaves: Sequence[Any], autocast: Autocast) -> None:
        """Raise NotLowered unless one step of both graphs gives the same outputs, gradients and buffers."""
        with under(autocast):
            expected = self._one_step(self.eager(False), leaves)
        try:
            found = self._one_step(lowered, leaves)
        except RuntimeError as error:
            raise NotLowered("the lowered graph does not run", why=str(error).splitlines()[0]) from error
        short = {dtype for _, dtype in autocast}
        largest = largest_number([value for name, value in expected.items() if name.startswith("update")])
        for name in expected:
            if not alike(expected[name], found[name], short, largest if name.startswith("update") else 0.0):
                raise NotLowered(
                    f"the lowered graph gives another {name} than the eager one",
                    why="an operator computes something else on tensors without data",
                )

    def _one_step(self, passes: Passes, leaves: Sequence[Any]) -> dict[str, Any]:
        compiled = self.compiled
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        with preserved(compiled.model), preserved(compiled.error_weights):
            torch.manual_seed(0)
            with torch.enable_grad():
                outputs, saved = passes.forward(*leaves)
            errors = [torch.randn_like(z) if taken else None for z, taken in zip(outputs, self.taken, strict=True)]
            weights, feedback, _ = passes.error(saved, errors, False)
            found = {f"output {i}": value for i, value in enumerate(outputs)}
            found |= {f"update of {n}": g for n, g in zip(compiled.training.weights, weights, strict=True)}
            found |= {f"update of {n}": g for n, g in zip(compiled.training.feedback, feedback, strict=True)}
            found |= {f"buffer {name}": value.clone() for name, value in compiled.model.named_buffers()}
        return {name: x.detach() if isinstance(x, Tensor) else x for name, x in found.items()}


def signature(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What a lowered graph depends on of its arguments; equal for arguments that fit the same one."""
    return tuple(
        [
            (x.shape, x.stride(), x.requires_grad, x.dtype, x.device) if isinstance(x, Tensor) else None
            for x in leaves
        ]
    )  # fmt: skip


class Run:
    """One forward pass, and the error pass that answers it.

    outputs: flattened. saved: what the error pass reads; None once it has freed it. autocast: the error pass runs in
    the state that the forward pass ran in. scaled: its updates may overflow, which a gradient scaler looks for.
    empty: an input has an axis of size 0, as in a batch without samples. held: what the caller must leave as it is, at
    its versions after the forward pass; unchanged: which those are, None where autograd looks.
    elsewhere: whoever makes this object runs the forward pass, and sets the first two.
    """

    def __init__(
        self, execution: Execution, passes: Passes, leaves: list[Any], fused: bool, elsewhere: bool = False
    ) -> None:
        self.execution, self.passes, self.fused = execution, passes, fused
        self.empty = passes.taken is None and holds_no_sample(leaves)  # such batches are not lowered
        self.autocast = autocast_now() if amp.is_on() else ()
        self.scaled = any(dtype is torch.float16 for _, dtype in self.autocast) if self.autocast else False
        # A capture is of a loss that steps before it have run with, and may not read the GPU's random state.
        may_differ = passes.taken is not None and execution.many_outputs and not is_capturing()
        self.start = _Start(execution.compiled, leaves) if may_differ else None
        self.outputs: list[Any]
        self.saved: list[Any] | None = None
        if passes.casts and not elsewhere:
            with amp.off():
                self.outputs, self.saved = passes.forward(*leaves)
        elif not elsewhere:
            self.outputs, self.saved = passes.forward(*leaves)
        self.unchanged = passes.unchanged
        self.held = self.unchanged.tensors(leaves, self.outputs) if self.unchanged is not None else []
        self.versions = versions(self.held)

    def error_pass(
        self, errors: Sequence[Tensor | None], *rest: Any, retain: bool = False, labels: tuple[Any, ...] = ()
    ) -> Any:
        """What the error pass returns; afterwards nothing is kept for another one, unless it retains.

        labels: those of the batch, for rules with local heads; or the losses of its samples, for rules that need them.

        Raises InputError where it fails on an empty batch; its cause is what failed, perhaps the user's optimizer.
        LocalTrainingError if what it needs was changed in place, where autograd does not look for that.
        """
        if self.unchanged is not None and versions(self.held) != self.versions:
            raise self.unchanged.error(self.held, self.versions)
        given = tuple([error is not None for error in errors])
        if self.passes.taken is not None and given != self.passes.taken:
            if self.start is None:
                raise LocalTrainingError(
                    "the loss takes other outputs of the model than in the steps before the capture",
                    remedy="capture a step whose loss takes the same outputs each time",
                )
            self.passes = self.execution.eager(self.fused)  # recorded for a loss on other outputs
            with under(self.autocast):
                self.saved = self.start.forward(self.passes)
        self.execution.taken = given
        try:
            if self.autocast or amp.is_on():
                with amp.off() if self.passes.casts else under(self.autocast):
                    result = self.passes.error(self.saved, errors, *rest, retain, *labels)
            else:
                result = self.passes.error(self.saved, errors, *rest, retain, *labels)
        except (RuntimeError, ArithmeticError) as error:
            if not self.empty:
                raise
            raise empty_batch(f"on it, the error pass or an update failed: {error or type(error).__name__}") from error
        finally:
            if not retain:
                self.saved = self.start = None
                self.held = []
        return result


def _without_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.no_grad()(function)`, at a tenth of its overhead."""
    enabled, switch = torch.is_grad_enabled, torch._C._set_grad_enabled

    def run(*arguments: Any) -> Any:
        before = enabled()
        switch(False)
        try:
            return function(*arguments)
        finally:
            switch(before)

    return run


class _Start:
    """What a forward pass started from, so that it can be run once more."""

    def __init__(self, compiled: Compilation, leaves: list[Any]) -> None:
        self.model, self.leaves = compiled.model, leaves
        self.buffers = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def forward(self, passes: Passes) -> list[Any]:
        """Run the forward pass again, without a trace on buffers and random state; returns what it saved."""
        with preserved(self.model), torch.enable_grad():
            for module in self.model.modules():  # others in their place, which the saved values may keep
                for name, buffer in module._buffers.items():
                    module._buffers[name] = self.buffers.get(id(buffer))
            torch.set_rng_state(self.random[0])
            torch.cuda.set_rng_state_all(self.random[1])
            saved: list[Any] = passes.forward(*self.leaves)[1]
        return saved
