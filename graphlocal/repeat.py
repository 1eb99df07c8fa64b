"""Forward passes like the last one, with their error passes, at little cost.

What a compilation is chosen by is the same in nearly every step of a training loop. Here it is compared with that of
the last step in a few calls, and where a lowered graph can be used again just as it was, nothing else is looked at: on
a small model, looking takes longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphlocal import autocast as amp
from graphlocal.compiler import Compiled
from graphlocal.execution import Run, signature
from graphlocal.local_step import Gradients, Owner, attached, freed, require_numbers
from graphlocal.targets.unchanged import versions
from graphlocal.watch import ModelWatch


class Last:
    """What the compilation of the last forward pass was chosen by. repeat: of its drop-in step, once it is known."""

    def __init__(self, compiled: Compiled, spec: pytree.TreeSpec, inputs: tuple[Any, ...], watch: ModelWatch) -> None:
        self.compiled, self.spec, self.inputs, self.watch = compiled, spec, inputs, watch
        self.model = watch.looks()
        self.repeat: Repeat | None = None

    def fits(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> bool:
        """Whether a call with such arguments is like the last one, and the model as it was."""
        return self.spec is spec and self.inputs == signature(leaves) and self.model == self.watch.looks()


class Repeat:
    """The drop-in step of a model with one output, by a lowered graph for the same shapes and autocast."""

    def __init__(self, compiled: Compiled, run: Run) -> None:
        assert run.unchanged is not None
        self.compiled, self.passes, self.unchanged = compiled, run.passes, run.unchanged
        self.autocast, self.looks_for_nan = run.autocast, not run.scaled
        self.weights, self.maps = compiled.weights, compiled.training.feedback

    @staticmethod
    def can(compiled: Compiled, run: Run) -> bool:
        """Whether what a run did can be done again by looking at its autocast alone."""
        passes = run.passes
        lowered = passes.taken == (True,) and passes.unchanged is not None
        return lowered and compiled.returns_one and passes.casts == bool(run.autocast)

    def forward(self, owner: Owner, leaves: Sequence[Any]) -> Tensor | None:
        """The output, with the local updates as its `grad_fn`; None if autocast is not as it was."""
        if not amp.is_on():
            if self.autocast:
                return None
            outputs, saved = self.passes.forward(*leaves)
        else:
            if not self.autocast or amp.autocast_now() != self.autocast:
                return None
            torch.clear_autocast_cache()  # of the weights that the last step changed
            with amp.off():
                outputs, saved = self.passes.forward(*leaves)
        step = _Repeated(self, owner, saved, self.unchanged.tensors(leaves, outputs))
        if not self.unchanged.fresh:
            outputs = (outputs[0].detach(),)
        targets = [*self.weights, *map(owner.get_parameter, self.maps)] if self.maps else self.weights
        return attached(step, outputs, targets)[0]


class _Repeated:
    """The error pass that answers one forward pass of a `Repeat`."""

    __slots__ = ("held", "owner", "repeat", "saved", "versions")

    def __init__(self, repeat: Repeat, owner: Owner, saved: list[Any], held: list[Tensor]) -> None:
        self.repeat, self.owner, self.held, self.versions = repeat, owner, held, versions(held)
        self.saved: list[Any] | None = saved

    def backward(self, errors: Gradients, retain: bool) -> Gradients:
        repeat, saved = self.repeat, self.saved
        if saved is None:
            raise freed()
        if errors[0] is None:
            return (None,) * (len(repeat.weights) + len(repeat.maps))
        if versions(self.held) != self.versions:
            raise repeat.unchanged.error(self.held, self.versions)
        if not retain:
            self.saved, self.held = None, []
        if amp.is_on():
            with amp.off():
                weights, feedback, _ = repeat.passes.error(saved, errors, retain)
        else:
            weights, feedback, _ = repeat.passes.error(saved, errors, retain)
        if repeat.looks_for_nan and self.owner.check_finite and not repeat.passes.are_numbers(weights):
            require_numbers(repeat.compiled, errors, weights)
        return (*weights, *feedback)
