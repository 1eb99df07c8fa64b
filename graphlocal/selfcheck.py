"""The mandatory check of a traced graph: it must compute what the eager model computes, bit for bit."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphlocal.arguments import Arguments
from graphlocal.errors import GuardFailure, TraceError
from graphlocal.guards import has_guards
from graphlocal.normalize import is_random
from graphlocal.opaque import OpaqueLeaf
from graphlocal.preserve import preserved

SEEDS = (0, 1, 2)
GRADIENT_TOLERANCE = 1e-4
_REMEDY = (
    "let forward depend on its inputs, parameters, buffers and torch's random numbers only; "
    "graphlocal.check lists every obstacle"
)


class BufferMismatch(TraceError):
    """The graph leaves buffers with other values than the model does; `modules` own them."""

    def __init__(self, buffers: list[str]) -> None:
        buffer = buffers[0]
        self.modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in buffers))
        module = self.modules[0]
        super().__init__(
            f"the traced graph leaves the buffer {buffer} with another value than the model does",
            where=f"module {module}" if module else "the model's forward",
            why="forward assigns a new tensor to the buffer, or changes it in a way the tracer does not see",
            remedy=f"change the buffer in place, such as self.{buffer.rpartition('.')[2]}.copy_(value)",
        )


class StateMismatch(TraceError):
    """Forward reads what an earlier call left in a Python attribute; the one of `modules` owns that attribute."""

    def __init__(self, module: str, attribute: str) -> None:
        self.modules = (module,)
        super().__init__(
            "a second call of the model gives another output than a second run of the traced graph",
            where=f"module {module}" if module else "the model's forward",
            why=f"forward reads what an earlier call left in the Python attribute {attribute!r}",
            remedy=f"keep {attribute!r} in a buffer that forward changes in place, or pass it as an input",
        )


@dataclass(frozen=True)
class _Run:
    """changed: the Python attributes that the run changed, as (module, attribute)."""

    outputs: list[Any]
    spec: pytree.TreeSpec | None
    buffers: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    changed: list[tuple[str, str]]
    requires_grad: tuple[bool, ...]


Flags = tuple[bool, ...]


def self_check(model: nn.Module, module: fx.GraphModule, arguments: Arguments, out_spec: pytree.TreeSpec) -> Flags:
    """Compare graph and model: outputs and buffers bit-equal under three seeds.

    Returns, for each flat output of the eager model, whether it requires a gradient.

    The gradients of a loss on all float outputs must agree as well (to 1e-4 of the largest entry), so that a
    lost `no_grad`, `detach` or custom backward is found. Where the graph leaves the batch size open, two rows
    of the example are enough, and show that another batch size works.

    Raises TraceError (BufferMismatch for a buffer, StateMismatch for a Python attribute) that says what differs.
    """
    if has_guards(module):
        return _check_recording(model, module, arguments, out_spec)
    arguments = _two_rows(model, module, arguments) or arguments
    draws = any(is_random(node) for node in module.graph.nodes)
    traced: _Run | None = None
    for seed in SEEDS:
        with_gradients = seed == SEEDS[0]
        eager = _run(model, arguments, seed, with_gradients, None)
        if traced is None or draws:  # a graph that draws nothing gives the same under every seed
            traced = _run(model, arguments, seed, with_gradients, module)
        _compare(eager, traced, out_spec, seed)
    opaque = [f"{m.path}." for m in module.modules() if isinstance(m, OpaqueLeaf)]
    suspects = [(owner, name) for owner, name in eager.changed if not f"{owner}.".startswith(tuple(opaque))]
    if suspects:
        _compare_second_calls(model, module, arguments, suspects)
    return eager.requires_grad


def _check_recording(
    model: nn.Module, module: fx.GraphModule, arguments: Arguments, out_spec: pytree.TreeSpec
) -> Flags:
    """Compare in the random state of the recording, then under the seeds and on other data where the guards hold."""
    reordered = arguments.map(lambda x: x.roll(1, 0) if x.dim() > 0 else x)
    for given, seed in ((arguments, None), *((arguments, seed) for seed in SEEDS), (reordered, None)):
        try:
            traced = _run(model, given, seed, True, module)
        except GuardFailure:
            if given is arguments and seed is None:
                raise
            continue
        eager = _run(model, given, seed, True, None)
        _compare(eager, traced, out_spec, seed)
    return eager.requires_grad


def _compare(eager: _Run, traced: _Run, out_spec: pytree.TreeSpec, seed: int | None) -> None:
    if eager.spec != out_spec:
        raise TraceError("the traced graph returns another structure than the model", remedy=_REMEDY)
    for i, (a, b) in enumerate(zip(eager.outputs, traced.outputs, strict=True)):
        if not _same(a, b):
            raise TraceError(
                f"output {i} of the traced graph differs from the eager model's"
                + (f" (seed {seed})" if seed is not None else ""),
                why="forward depends on something that the tracer fixed, such as Python's random module, or it asks "
                "whether it is being traced",
                remedy=_REMEDY,
            )
    wrong = [name for name, value in eager.buffers.items() if not _same(value, traced.buffers[name])]
    if wrong:
        raise BufferMismatch(wrong)
    for name, gradient in eager.gradients.items():
        _compare_gradients(name, gradient, traced.gradients[name])


def _compare_second_calls(
    model: nn.Module, module: fx.GraphModule, arguments: Arguments, suspects: list[tuple[str, str]]
) -> None:
    """Compare once more after a call whose Python attributes are not restored, as a user's own calls are not."""
    found = []
    runs: tuple[Callable[[Arguments], Any], ...] = (lambda x: model(*x.args, **x.kwargs), lambda x: module(*x.leaves))
    for run in runs:
        with preserved(model), torch.no_grad():
            values = [buffer.clone() for buffer in model.buffers()]
            for _ in range(2):
                for buffer, value in zip(model.buffers(), values, strict=True):
                    buffer.copy_(value)
                _seed(SEEDS[0])
                result = run(arguments.map(torch.clone))
            found.append(pytree.tree_leaves(result))
    if not all(_same(a, b) for a, b in zip(*found, strict=True)):
        raise StateMismatch(*suspects[0])


def _attributes(model: nn.Module) -> dict[tuple[str, str], tuple[Any, int]]:
    """Every Python attribute of every submodule, with its size if it is a container."""
    return {
        (path, name): (value, len(value) if isinstance(value, (list, dict, set, deque)) else 0)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
    }


def _changed(before: dict[tuple[str, str], tuple[Any, int]], model: nn.Module) -> list[tuple[str, str]]:
    after = _attributes(model).items()
    return [key for key, (value, size) in after if (known := before.get(key, (None, 0)))[0] is not value
            or known[1] != size]  # fmt: skip


def _two_rows(model: nn.Module, module: fx.GraphModule, arguments: Arguments) -> Arguments | None:
    """The first two rows of every input, if all inputs have one open batch size and the model takes two rows."""
    nodes = module.graph.find_nodes(op="placeholder")
    batches = {x.shape[0] for x in arguments.tensors if x.dim() > 0}
    opened = [
        not isinstance(node.meta["val"].shape[0], int)
        for node, leaf in zip(nodes, arguments.leaves, strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0
    ]
    if len(batches) != 1 or batches == {2} or not all(opened):
        return None
    rows = arguments.map(lambda x: x[:2] if x.dim() > 0 else x)
    try:
        with preserved(model), torch.no_grad():
            model(*rows.args, **rows.kwargs)
    except Exception:  # the rows of one input count those of another, as in a graph's edges
        return None
    return rows


def _run(
    model: nn.Module, arguments: Arguments, seed: int | None, with_gradients: bool, module: fx.GraphModule | None
) -> _Run:
    inputs = arguments.map(torch.clone)
    with preserved(model), torch.enable_grad():  # some kernels differ without gradients
        if seed is not None:
            _seed(seed)
        before = _attributes(model)
        result = module(*inputs.leaves) if module is not None else model(*inputs.args, **inputs.kwargs)
        outputs, spec = pytree.tree_flatten(result)
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        changed = _changed(before, model)
        gradients = _gradients(model, outputs) if with_gradients else {}
    flags = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in outputs)
    outputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in outputs]
    return _Run(outputs, spec if module is None else None, buffers, gradients, changed, flags)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)  # a tracer fixes what forward draws from these two
    numpy.random.seed(seed)


def _gradients(model: nn.Module, outputs: list[Any]) -> dict[str, torch.Tensor | None]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = [x.square().mean() for x in outputs
              if isinstance(x, torch.Tensor) and x.is_floating_point() and x.requires_grad]  # fmt: skip
    if not losses or not parameters:
        return {}
    try:
        found = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()), allow_unused=True)
    except RuntimeError as error:
        if "is not implemented" in str(error):  # an operation that nobody can differentiate, such as heaviside
            return {}
        raise
    return dict(zip(parameters, found, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(type(a) is type(b) and a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(7.7), b.nan_to_num(7.7)))


def _compare_gradients(name: str, eager: torch.Tensor | None, traced: torch.Tensor | None) -> None:
    if (eager is None) != (traced is None):
        differs = True
    else:
        differs = eager is not None and traced is not None and not _close(eager, traced)
    if differs:
        raise TraceError(
            f"the traced graph gives the parameter {name} another gradient than the model does",
            why="a no_grad, a detach or a custom backward was lost by the tracer",
            remedy="put that part of forward into a submodule of its own",
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_sparse or b.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    if torch.equal(a, b):
        return True
    scale = float(a.abs().max().nan_to_num(0.0)) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=GRADIENT_TOLERANCE * scale + 1e-12, equal_nan=True)
