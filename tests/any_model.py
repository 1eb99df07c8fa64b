"""What every learning rule must do on every model of the zoo."""

from __future__ import annotations

import pytest
import torch
from training import Step, assert_same_forward, step

import graphlocal
import zoo
from graphlocal.rules import Rule


def any_model(*exclude: str) -> list:
    """The zoo as parameters for pytest; its large models are slow."""
    chosen = []
    for parameter in zoo.models(exclude=exclude):
        (model,) = parameter.values
        marks = [pytest.mark.slow] if {"large", "torchvision"} & model.tags else []
        chosen.append(pytest.param(model, id=model.name, marks=marks))
    return chosen


def assert_learns(model: zoo.ZooModel, rule: Rule, **options) -> tuple[graphlocal.LocalModule, Step]:
    """The forward pass is the model's, bit for bit; every parameter with a true gradient gets a finite update."""
    example = model.example(torch.float64)
    local = graphlocal.compile(model.make(torch.float64), example_inputs=example, rule=rule, **options)
    true = step(model.make(torch.float64), example, model.loss)
    found = step(local, example, model.loss)
    assert_same_forward(found, true)
    assert_updates(true, found)
    return local, found


def assert_updates(true: Step, found: Step) -> None:
    """Every parameter with a true gradient has a finite update, not 0."""
    for name, gradient in true.gradients.items():
        if gradient is not None and gradient.abs().max() > 1e-12:
            assert found.gradients[name] is not None, name
            assert found.gradients[name].isfinite().all(), name
            assert found.gradients[name].any(), name
