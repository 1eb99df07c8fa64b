"""Every target and every way to train gives the sequential target's parameters, on every model that can be lowered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_lowered import DEEP, RECURRENT
from torch import Tensor

import graphlocal
import zoo
from graphlocal.rules import RecLRA

MODELS = [name for name in zoo.MODELS if name not in RECURRENT]

Train = Callable[[graphlocal.LocalModule, torch.optim.Optimizer, list, Callable], None]


def fused(local, optimizer, batches, loss) -> None:
    step = graphlocal.train_step(local, lambda output, _: loss(output), optimizer)
    for x in batches:
        step(x, None)


def overlapped(local, optimizer, batches, loss) -> None:
    step = graphlocal.train_step(local, lambda output, _: loss(output), optimizer)
    list(step.run((x, None) for x in batches))


def drop_in(local, optimizer, batches, loss) -> None:
    for x in batches:
        optimizer.zero_grad()
        loss(zoo.call(local, x)).backward()
        optimizer.step()


WAYS: dict[str, tuple[str, Train]] = {
    "lowered": ("lowered", fused), "auto": ("auto", fused), "drop-in": ("auto", drop_in),
    "batched": ("batched", fused), "streams": ("streams", fused), "overlapped": ("streams", overlapped),
}  # fmt: skip


def trained(name: str, target: str, train: Train) -> list[Tensor]:
    """Parameters, buffers and random state after twenty steps; in double precision where rounding would grow."""
    model, dtype = zoo.MODELS[name], torch.float64 if name in DEEP else torch.float32
    torch.manual_seed(0)
    local = graphlocal.compile(model.make(dtype), example_inputs=model.example(dtype), rule=RecLRA(), target=target)
    optimizer = torch.optim.SGD(local.parameters(), 0.05, momentum=0.5)
    torch.manual_seed(3)
    train(local, optimizer, [model.example(dtype)] * (5 if name in DEEP else 20), model.loss)
    return [*local.state_dict().values(), torch.get_rng_state()]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.exhaustive) if n in DEEP else n for n in MODELS])
def test_every_way_gives_the_parameters_of_the_sequential_target(name, monkeypatch):
    monkeypatch.setattr("graphlocal.targets.overlap.LEAST", 0.0)  # pieces that may overlap, however small
    expected = trained(name, "eager", fused)
    found = {way: trained(name, *how) for way, how in WAYS.items()}
    for way, values in found.items():
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5, msg=lambda text, way=way: f"{way}: {text}")
    for way in ("streams", "overlapped"):  # the same kernels
        assert all(map(torch.equal, found[way], found["lowered"])), way
