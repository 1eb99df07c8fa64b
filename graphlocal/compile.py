"""`graphlocal.compile`: one call from a model to its local trainer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from graphlocal.arguments import ExampleInputs
from graphlocal.compiler import TARGETS, Options
from graphlocal.errors import InputError, nearest
from graphlocal.passes.policies import Policy
from graphlocal.rules import Rule, find
from graphlocal.runtime import LocalModule


def compile(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs,
    rule: str | Rule = "rec-lra",
    partition: Policy = "auto",
    skip_errors: Iterable[tuple[str, str]] = (),
    target: str = "auto",
    streams: int | None = None,
    recompute: bool | Iterable[str] = False,
) -> LocalModule:
    """Turn a model into one that learns locally: the same model, trained in place, with any loss and optimizer.

    example_inputs: a tuple of positional inputs or a dict of keyword inputs, with a batch of 2 or more.
    rule: a name ("rec-lra", "backprop"), or an instance with options.
    partition: "auto" (what the rule prefers: blocks, or for the rule "auto" two segments and the head), "blocks"
    (repeated blocks, else layers), "leaf" (one parametric operation each), a number of segments of equal cost, "2+head"
    or "3:1+head" (segments of equal cost or of these proportions, and the last layers by themselves), globs of module
    paths, or a callable from an operation to the name of its subgraph.
    skip_errors: further skip-error connections, (source, target), by subgraph name; a source may be "output".
    target: how the training graph is run: "lowered" to ATen operators without autograd, for each shape of the inputs;
    "batched", lowered, with the updates of subgraphs of one structure stacked into one computation (equal to
    rounding); "inductor", lowered and compiled by torch.compile (the first steps take long); "streams", lowered and
    on several threads (on a GPU: CUDA streams) at a time; "eager", subgraph by subgraph with autograd inside; "auto"
    chooses between eager and lowered, and stacks the updates of many small subgraphs where that pays.
    streams: how many actions may run at one time, with target="streams"; by default 2 on a CPU, 4 on a GPU.
    recompute: True, or globs of subgraphs, such as ["layer1.*"]: they keep what they read and nothing of their
    interior, which is worked out again at their update; the same numbers from less memory and more time.

    Raises InputError, TraceError, PartitionError or VerifyError; the model is then left as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}", remedy="pass a torch.nn.Module")
    if isinstance(model, LocalModule):
        raise InputError("the model is compiled already", remedy="pass local.original to compile it anew")
    if not isinstance(target, str) or target not in TARGETS:
        raise InputError(f"unknown target {target!r}: {nearest(target, TARGETS)}", remedy=f"targets: {TARGETS}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            f"{type(model).__name__} has parameters or buffers on the meta device",
            why="they have no values, and tracing runs the model",
            remedy="call model.to_empty(device='cpu') and initialize or load its weights first",
        )
    options = Options(find(rule), partition, _pairs(skip_errors), _streams(model, target, streams), target,
                      _recompute(recompute))  # fmt: skip
    return LocalModule(model, example_inputs, options)


def _recompute(recompute: bool | Iterable[str]) -> bool | tuple[str, ...]:
    if isinstance(recompute, bool):
        return recompute
    globs = () if isinstance(recompute, str) or not isinstance(recompute, Iterable) else tuple(recompute)
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise InputError(
            f"recompute is {recompute!r}", remedy='pass True, or a list of globs of subgraphs, such as ["layer1.*"]'
        )
    return globs


MOST_STREAMS = 1024


def _streams(model: nn.Module, target: str, streams: int | None) -> int:
    if streams is None:
        if target != "streams":
            return 1
        return 4 if any(p.is_cuda for p in model.parameters()) else 2
    if target != "streams":
        raise InputError(f"streams={streams!r} with target {target!r}", remedy='pass target="streams" with it')
    if not isinstance(streams, int) or isinstance(streams, bool) or not 1 <= streams <= MOST_STREAMS:
        raise InputError(f"streams={streams!r}", remedy=f"pass a number of streams from 1 to {MOST_STREAMS}, or None")
    return streams


def _pairs(skip_errors: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    pairs = list(skip_errors) if isinstance(skip_errors, Iterable) else [skip_errors]
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(end, str) for end in pair):
            raise InputError(
                f"skip_errors hold {pair!r}", remedy='pass pairs of names, such as [("output", "layer2.1")]'
            )
    return tuple((source, target) for source, target in pairs)
