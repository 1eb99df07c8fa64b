"""One training step seen from inside, without being taken: what each subgraph would learn from a batch.

The **local loss** of subgraph v is L_v = 1/(2B) sum_s ||e_v(s)||^2: half the squared norm of its error neuron's error,
summed over the units of its representations and averaged over the B samples of the batch. e_v(s) is the error that
feeds the subgraph's update (z - y for rec-LRA, the gradient at the representation for an exact message), in the
per-sample units of a loss that averages over the batch. So L_v has the squared units of the representation for a rule
that sets targets, and those of (loss / representation)^2 for an exact gradient: comparable over time, and between
subgraphs only where they learn in the same way. With several errors (several representations, or an exact error and
a local one), their squared norms add up.

An observation runs the eager training graph, whatever target trains the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.arguments import call_of
from graphlocal.compiler import Compiled
from graphlocal.errors import GuardFailure, InputError, LocalTrainingError
from graphlocal.preserve import preserved
from graphlocal.runtime import LocalModule
from graphlocal.step import LossFunction, sample_losses
from graphlocal.targets.bodies import Update
from graphlocal.targets.eager import batch_size


@dataclass(frozen=True)
class Observation:
    """What a step on one batch would do.

    loss: of the batch. local_loss: L_v by subgraph. update_norm: norm of the subgraph's own local update (of all of
    its trainable parameters together), by subgraph. updates: the local update of each parameter, as `p.grad` would
    hold it. A subgraph that no error reaches is left out.
    """

    loss: float
    local_loss: dict[str, float]
    update_norm: dict[str, float]
    updates: dict[str, Tensor]


def observe(local: LocalModule, loss_fn: LossFunction, x: Any, y: Any) -> Observation:
    """Observe a step on one batch: the step that `train_step` would take now, with the same random numbers.

    x: a tensor, a tuple (or list) of positional inputs, or a dict of keyword inputs. loss_fn: `loss_fn(output, y)`.
    Parameters, buffers, gradients and random state are left as they were.
    Raises InputError for a loss that is no scalar and for rules without error neurons to look at, LocalTrainingError
    where no compilation fits the batch.
    """
    require_observable(local)
    args, kwargs = call_of(x, "x")
    leaves, spec = local._binder.flatten(args, kwargs)
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    with same_order(local):
        for compiled in local._fitting(leaves, spec):
            with suppress(GuardFailure), preserved(local), torch.enable_grad():
                return _Observer(local, compiled, loss_fn, y).run(leaves)
    raise LocalTrainingError("no compilation of the model takes the path of this batch")


def require_observable(local: LocalModule) -> None:
    """Raise InputError for a rule whose step is not one forward pass and one error pass over error neurons."""
    rule = local.options.rule
    if rule.engine != "schedule" or rule.relaxes:
        raise InputError(
            f"a step of the rule {rule.name!r} can't be observed",
            why="no error neuron feeds its updates: it relaxes all states at one time, or has a loop of its own",
            remedy="watch the loss and the test error; for nlp, graphlocal.knn_error on graphlocal.representations",
        )


@contextmanager
def same_order(local: LocalModule) -> Iterator[None]:
    """Compilations made here come after those known before, so that training goes on with its own."""
    known = list(local._cache)
    try:
        yield
    finally:
        local._cache[:] = [*known, *(entry for entry in local._cache if all(entry is not old for old in known))]


class _Observer:
    def __init__(self, local: LocalModule, compiled: Compiled, loss_fn: LossFunction, y: Any) -> None:
        self.local, self.compiled, self.loss_fn, self.y = local, compiled, loss_fn, y
        self.errors: dict[str, list[Tensor]] = {}
        self.updates: dict[str, list[Tensor]] = {}

    def run(self, leaves: list[Any]) -> Observation:
        rule = self.compiled.options.rule
        given: dict[str, Any] = {"labels_of_heads": self.y} if rule.needs_labels else {}
        given |= {"losses_of_samples": lambda: self.losses} if rule.needs_losses else {}
        with self._watched_updates():
            result = self.compiled.training.module(*leaves, self._loss_errors, **given)
        outputs, weights = result[0], result[1]
        errors, updates = map(self._norms, (self.errors, self.updates))
        batch = batch_size(*outputs, *leaves)
        known = zip(self.compiled.training.weights, weights, strict=True)
        return Observation(
            float(self.loss),
            {name: 0.5 * batch * norm**2 for name, norm in errors.items()},
            updates,
            {name: update.detach() for name, update in known if update is not None},
        )

    @contextmanager
    def _watched_updates(self) -> Iterator[None]:
        """Take what every subgraph's update is given and returns."""
        handles = []
        for name, module in self.compiled.training.module.named_modules():
            if isinstance(module, Update):
                number = int(name.split(".")[0].removeprefix("U"))
                subgraph = self.compiled.graph.subgraphs[number - 1].name
                handles.append(module.register_forward_hook(self._take(subgraph)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, subgraph: str) -> Callable[[nn.Module, Any, Any], None]:
        def take(update: Any, values: Sequence[Any], results: Sequence[Any]) -> None:
            errors = values[update.shape.outputs : 2 * update.shape.outputs]
            self.errors.setdefault(subgraph, []).extend(e for e in errors if e is not None)
            found = results[: update.shape.parameters]
            self.updates.setdefault(subgraph, []).extend(g for g in found if g is not None)

        return take

    def _norms(self, groups: dict[str, list[Tensor]]) -> dict[str, float]:
        """The norm of each subgraph's tensors as one vector, in program order."""
        squares = {s.name: square_sum(groups.get(s.name, ())) for s in self.compiled.graph.subgraphs}
        return {name: math.sqrt(x) for name, x in numbers(squares).items()}

    def _loss_errors(self, outputs: tuple[Any, ...]) -> list[Tensor | None]:
        taken = self.compiled.differentiable
        flat = [z.detach().requires_grad_() if wanted else z for z, wanted in zip(outputs, taken, strict=True)]
        loss = self.loss_fn(self.local._unflatten(self.compiled, flat), self.y)
        if self.compiled.options.rule.needs_losses:
            self.losses, loss = sample_losses(loss)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise InputError("loss_fn must return a scalar tensor that depends on the model's output")
        self.loss = loss.detach()
        found = iter(torch.autograd.grad(loss, [z for z, w in zip(flat, taken, strict=True) if w], allow_unused=True))
        return [next(found) if wanted else None for wanted in taken]


def square_sum(tensors: Sequence[Tensor]) -> Tensor | None:
    """The sum of all squared entries, in float32 or better; None for no tensors."""
    norms = [_norm(tensor.coalesce().values() if tensor.is_sparse else tensor) for tensor in tensors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum() if norms else None


def _norm(tensor: Tensor) -> Tensor:
    wide = tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(tensor.detach(), dtype=wide)
    return norm.double() if norm.device.type == "cpu" else norm


def numbers(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Those scalars that are there, as Python numbers; waits for the device once."""
    known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not known:
        return {}
    device = next(iter(known.values())).device
    found: list[float] = torch.stack([tensor.to(device) for tensor in known.values()]).tolist()
    return dict(zip(known, found, strict=True))
