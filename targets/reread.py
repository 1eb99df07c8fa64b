"""Subgraphs that the error pass evaluates again: at candidate inputs, with the random numbers of the forward pass.

Nothing is changed by it: states that the subgraph writes are written on copies of what they were before its forward
pass, and torch's generators are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.opaque import OpaqueLeaf
from graphlocal.preserve import restored
from graphlocal.rules import AligningRule, Neuron
from graphlocal.targets.bodies import LocalError, add_messages
from graphlocal.verify.rule import place


class Snapshot(nn.Module):
    """What a subgraph's evaluation changes, as it is just before: (random state or None, copies of written states)."""

    def __init__(self, random: bool) -> None:
        super().__init__()
        self.random = random

    def forward(self, *states: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        with torch.no_grad():
            return random_state() if self.random else None, tuple(state.clone() for state in states)


def random_state() -> tuple[Tensor, list[Tensor]]:
    """The states of torch's generators: the CPU's, and every CUDA device's if CUDA is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


@contextmanager
def replayed(state: tuple[Tensor, list[Tensor]] | None) -> Iterator[None]:
    """Draw random numbers from `state` on; None: whatever is drawn is drawn as ever."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=range(len(state[1]))):
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state_all(state[1])
        yield


def written_states(graph: LocalGraph, subgraph: Subgraph) -> tuple[str, ...]:
    """The states that the subgraph's operations change, but for those inside of opaque leaves."""
    operations = [graph.operation[name] for name in subgraph.operations]
    effects = (effect for op in operations if not op.target.startswith("opaque") for effect in op.effects)
    return tuple(dict.fromkeys(e.removeprefix("writes ") for e in effects if e.startswith("writes ")))


def draws_random(graph: LocalGraph, subgraph: Subgraph) -> bool:
    """Whether the subgraph may draw random numbers; opaque leaves always may."""
    operations = [graph.operation[name] for name in subgraph.operations]
    return any("random" in op.effects or op.target.startswith("opaque") for op in operations)


def require_rereadable(graph: LocalGraph, subgraph: Subgraph, rule: str) -> None:
    """Raise InputError if the data decide the subgraph's path, so that it holds for no other inputs."""
    for name in subgraph.operations:
        if "guard" in graph.operation[name].effects:
            raise InputError(
                f"the rule {rule!r} evaluates subgraph {subgraph.name!r} at other inputs, which it has no path for",
                where=place(graph, name),
                why="its control flow depends on the data, and was recorded for the data of the forward pass",
                remedy="use a rule that evaluates nothing again (lra-diff: steps=1)",
            )


@dataclass(frozen=True)
class Body:
    """A subgraph as a function that can be called again. written: positions of written states in its arguments."""

    function: fx.GraphModule
    written: tuple[int, ...]

    def __call__(self, snapshot: Any, arguments: Sequence[Any]) -> tuple[Any, ...]:
        random, states = snapshot if snapshot is not None else (None, ())
        given = list(arguments)
        for position, state in zip(self.written, states, strict=True):
            given[position] = state.clone()
        leaves = [leaf for leaf in self.function.children() if isinstance(leaf, OpaqueLeaf)]
        with ExitStack() as stack:
            for leaf in leaves:
                stack.enter_context(restored(leaf.submodule))
            stack.enter_context(replayed(random))
            return self.function(*given)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class End:
    """A representation of a reader: the places of z, of z before a discrete unit, and of h among the body's results."""

    name: str
    z: int
    smooth: int
    h: int
    phi: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reader:
    """A subgraph that reads a representation, as argument number `position`."""

    body: Body
    position: int
    ends: tuple[End, ...]

    def message(self, rule: AligningRule, candidate: Tensor, scale: int, given: Any) -> Tensor | None:
        """The derivative of the reader's local losses at a candidate of what it reads, per sample.

        given: (snapshot, the body's arguments, for each end: its z in the forward pass, its exact error, its target).
        """
        snapshot, arguments, ends = given
        if all(exact is None and target is None for _, exact, target in ends):
            return None
        candidate = candidate.detach().requires_grad_()
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        arguments[self.position] = candidate
        with torch.enable_grad():
            results = self.body(snapshot, arguments)
        outputs, errors = [], []
        for end, (before, exact, target) in zip(self.ends, ends, strict=True):
            z, smooth, h = results[end.z], results[end.smooth], results[end.h]
            if exact is not None and z.requires_grad:
                outputs.append(z)
                errors.append(exact * scale + (z.detach() - before.detach()))
            fed = h if rule.feeds == "preactivation" else smooth
            if target is not None and fed.requires_grad:
                outputs.append(fed)
                errors.append(rule.mismatch(Neuron(end.name, h.detach(), smooth.detach(), end.phi), target))
        if not outputs:
            return None
        return torch.autograd.grad(outputs, candidate, errors, allow_unused=True)[0]


class Walk(nn.Module):
    """The local error of a representation whose target is moved several times, and that target.

    forward(h, z, value, displacement, constant, batch, *readers) -> (error, target). value: what is read in place of z,
    where z goes through a discrete unit. constant: the part of the displacement that does not come from readers.
    """

    def __init__(self, rule: AligningRule, error: LocalError, readers: Sequence[Reader]) -> None:
        super().__init__()
        self.rule, self.error, self.readers = rule, error, tuple(readers)

    def forward(self, h: Tensor, z: Tensor, value: Tensor | None, displacement: Tensor | None, constant: Tensor | None,
                batch: int, *given: Any) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        if displacement is None:
            return None, None
        with torch.no_grad():
            first = now = self.error.neuron(h, z)
            scale = self.rule.per_sample(batch)
            d: Tensor | None = displacement * scale
            for step in range(self.rule.inner_steps):
                if step:
                    candidate = now.z if value is None else value + (now.z - first.z)
                    messages = [
                        reader.message(self.rule, candidate, scale, values)
                        for reader, values in zip(self.readers, given, strict=True)
                    ]
                    d = add_messages(None if constant is None else constant * scale, *messages)
                if d is None:
                    break
                moved = self.rule.move(now, d)
                now = Neuron(now.name, moved, now.phi(moved), now.phi)
            return self.rule.mismatch(first, now.z) / scale, now.z
