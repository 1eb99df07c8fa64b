"""Local Propagation on every kind of model: its exact identity with backpropagation, and steps from the store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import graphlocal
import zoo
from graphlocal.rules import LP, Backprop

QUIET = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
WRITES = ("step_counter", "moving_average")


class ShortCircuitBackprop(Backprop):
    """Backpropagation that passes discrete units by, as Local Propagation does."""

    passes_discrete = True


def quiet(model: nn.Module) -> nn.Module:
    """The model in training mode, but for the layers that break sample identity."""
    model.train()
    for module in model.modules():
        if isinstance(module, QUIET):
            module.eval()
    return model


def compiled(model: zoo.ZooModel, rule: Any, **options: Any) -> graphlocal.LocalModule:
    local = graphlocal.compile(
        quiet(model.make(torch.float64)), example_inputs=model.example(torch.float64), rule=rule, **options
    )
    return local


def evaluation(local: graphlocal.LocalModule, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> Callable[..., Any]:
    """The engine's evaluation as a function of variables and multipliers, and the forward values."""
    leaves, spec = local._binder.flatten(*((), inputs) if isinstance(inputs, dict) else (inputs, {}))
    unused = optim.SGD(local.parameters(), 0.0)
    step = graphlocal.train_step(local, lambda output, _: loss_fn(output), unused)
    state: dict[str, Any] = {}

    def evaluate(x: dict | None = None, multipliers: dict | None = None) -> Any:
        def run(one: Any) -> Any:
            engine = one.engine
            values = x
            if values is None:
                forward = engine.nodes.forward(leaves)
                values = {v: forward[v] for v in engine.variables}
            state["x"] = values
            zero = {v: torch.zeros_like(value) for v, value in values.items()}
            return engine.evaluate(
                leaves, values, multipliers or zero, lambda flat: step._loss(one, flat, None), samples=3
            )

        return local._run_fitting(leaves, spec, run)[1]

    evaluate.state = state
    return evaluate


def swept(evaluate: Callable[..., Any]) -> tuple[dict, dict, Any]:
    """Variables at the forward pass, and the multipliers at which dL/dx = 0."""
    found = evaluate()
    x = evaluate.state["x"]
    multipliers = {v: torch.zeros_like(value) for v, value in x.items()}
    for _ in range(len(x) + 1):  # each sweep settles one more layer from the output down
        found = evaluate(x, multipliers)
        if all(not slope.any() for slope in found.variables.values()):
            break
        multipliers = {v: multipliers[v] - found.variables[v] for v in x}
    return x, multipliers, found


def true_gradients(model: zoo.ZooModel) -> dict[str, Tensor | None]:
    module = quiet(model.make(torch.float64))
    if "zero-gradient" in model.tags:
        module = graphlocal.compile(module, example_inputs=model.example(torch.float64), rule=ShortCircuitBackprop())
        module.train()
        quiet(module.original)
    model.loss(zoo.call(module, model.example(torch.float64))).backward()
    return {name.removeprefix("original."): p.grad for name, p in module.named_parameters()}


def cases() -> list[Any]:
    """Every model without randomness and buffers, cut both ways; the big ones once."""
    found = []
    for case in zoo.models(exclude=WRITES):
        big = "torchvision" in case.values[0].tags
        slow = [pytest.mark.slow] if big else []
        for partition in ("auto",) if big else ("auto", "leaf"):
            found.append(pytest.param(case.values[0], partition, id=f"{case.id}-{partition}", marks=slow))
    return found


@pytest.mark.parametrize(("model", "partition"), cases())
def test_with_swept_multipliers_the_gradient_equals_backprop(model, partition):
    local = compiled(model, "lp", partition=partition)
    *_, found = swept(evaluation(local, model.example(torch.float64), model.loss))
    for v, slope in found.variables.items():
        assert not slope.abs().max() > 1e-12, v
        assert not found.residuals[v].any()
    for name, true in true_gradients(model).items():
        if true is None:
            assert name not in found.parameters
        else:
            got = found.parameters.get(name, torch.zeros_like(true)) / 3
            torch.testing.assert_close(got, true.to_dense() if true.is_sparse else true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "model", zoo.models(exclude=(*WRITES, "torchvision", "message_passing", "language_model_loss"))
)
def test_two_visits_from_the_store_train_every_kind_of_model(model):
    """Variables come back from the store in the layout that views of them rely on."""
    inputs = model.example(torch.float64)
    local = compiled(model, LP(inner_steps=2), partition="leaf")
    step = graphlocal.train_step(local, lambda output, y: model.loss(output), optim.SGD(local.parameters(), 0.01))
    for _ in range(3):
        assert step(inputs, None, index=torch.tensor([3, 0, 4])).isfinite()
