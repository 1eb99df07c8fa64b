"""`recalibrate` gives BatchNorm the average statistics of some batches, and touches nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphlocal
import zoo
from graphlocal.errors import InputError


def normed() -> nn.Module:
    """Two BatchNorms of different momentum, with a dropout between them that must not act."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Dropout(0.5), nn.Tanh(),
        nn.Linear(8, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 4),
    )  # fmt: skip


def used() -> nn.Module:
    """The same after some training steps, so that there are statistics to lose."""
    model = normed()
    for seed in range(3):
        model(zoo.normal(7, 6, seed=seed) * 3 + 1)
    return model.requires_grad_(True)


def loader() -> list[Tensor]:
    """Batches of unlike size and scale; their plain average is not that of all samples."""
    return [zoo.normal(4, 6, seed=1), 3 * zoo.normal(9, 6, seed=2) + 2, zoo.normal(5, 6, seed=3) - 1]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def momenta(model: nn.Module) -> list[Any]:
    return [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Several(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(a + b)


# The statistics


def test_statistics_are_the_average_of_the_batch_statistics():
    model = used().double()
    batches = [x.double() for x in loader()]
    expected: dict[str, list[Tensor]] = {"1": [], "5": []}
    for x in batches:
        for at, linear in (("1", model[0]), ("5", model[4])):
            x = x @ linear.weight.T + linear.bias
            center, n = x.sum(0) / len(x), len(x)
            spread = (x - center).square().sum(0)
            expected[at].append(torch.stack([center, spread / (n - 1)]))
            x = torch.tanh((x - center) / (spread / n + 1e-5).sqrt())
    assert graphlocal.recalibrate(model, batches) == 3
    for at, found in expected.items():
        norm = model.get_submodule(at)
        torch.testing.assert_close(torch.stack([norm.running_mean, norm.running_var]), torch.stack(found).mean(0))
        assert int(norm.num_batches_tracked) == 3


def test_what_was_there_before_has_no_influence():
    fresh, old = normed(), used()
    old.load_state_dict(fresh.state_dict() | {k: v + 7 for k, v in old.state_dict().items() if "running" in k})
    for model in (fresh, old):
        graphlocal.recalibrate(model, loader())
    torch.testing.assert_close(statistics(old), statistics(fresh), rtol=0, atol=0)


def test_a_second_calibration_on_the_same_batches_changes_nothing():
    model = used()
    graphlocal.recalibrate(model, loader())
    before = statistics(model)
    graphlocal.recalibrate(model, loader())
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_a_compiled_model_is_calibrated_in_its_original():
    eager, model = used(), used()
    model.load_state_dict(eager.state_dict())
    local = graphlocal.compile(model, example_inputs=(zoo.normal(3, 6),))
    assert graphlocal.recalibrate(local, loader()) == graphlocal.recalibrate(eager, loader())
    torch.testing.assert_close(statistics(local.original), statistics(eager), rtol=0, atol=0)


# What is left alone


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluating"])
def test_momentum_modes_weights_and_gradients_are_left_as_they_were(mode):
    model = used().train(mode)
    model[2].train(not mode)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = momenta(model), modes(model)
    graphlocal.recalibrate(model, loader())
    assert (momenta(model), modes(model)) == before
    torch.testing.assert_close(dict(model.named_parameters()), weights, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def never() -> Iterator[Tensor]:
    raise AssertionError("a batch was taken")
    yield


@pytest.mark.parametrize(
    "model",
    [zoo.MODELS["mlp"].make, lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))],
    ids=["none", "without running statistics"],
)
def test_a_model_without_running_statistics_takes_no_batch(model):
    assert graphlocal.recalibrate(model(), never()) == 0


# Batches


@pytest.mark.parametrize(
    "batches",
    [
        lambda xs: xs,
        lambda xs: [(x, torch.zeros(len(x))) for x in xs],
        lambda xs: [[x, torch.zeros(len(x))] for x in xs],
        lambda xs: [(x,) for x in xs],
        lambda xs: [{"input": x} for x in xs],
        lambda xs: [({"input": x}, torch.zeros(len(x))) for x in xs],
        lambda xs: iter(xs),
    ],
    ids=["tensors", "pairs", "lists", "tuples of one", "keywords", "keyword pairs", "iterator"],
)
def test_batches_in_every_form_give_the_same_statistics(batches):
    model, same = used(), used()
    same.load_state_dict(model.state_dict())
    assert graphlocal.recalibrate(model, loader()) == graphlocal.recalibrate(same, batches(loader())) == 3
    torch.testing.assert_close(statistics(same), statistics(model), rtol=0, atol=0)


def test_a_data_loader_is_taken_as_it_is():
    model, x = used(), zoo.normal(12, 6)
    assert graphlocal.recalibrate(model, DataLoader(TensorDataset(x, torch.arange(12)), batch_size=4)) == 3
    means = torch.stack([model[0](part).mean(0) for part in x.split(4)]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means.detach())


@pytest.mark.parametrize("form", [lambda a, b: ((a, b), "label"), lambda a, b: {"a": a, "b": b}], ids=["pair", "dict"])
def test_a_model_of_several_inputs(form):
    model, (a, b) = Several(), (zoo.normal(5, 6), zoo.normal(5, 6, seed=1))
    assert graphlocal.recalibrate(model, [form(a, b)]) == 1
    torch.testing.assert_close(model.norm.running_mean, (a + b).mean(0))


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_batch_at_all_is_refused_and_the_statistics_stay(batches):
    model = used()
    before = statistics(model), momenta(model), modes(model)
    with pytest.raises(InputError, match="was given no batch") as caught:
        graphlocal.recalibrate(model, batches)
    assert "pass about 20 batches" in str(caught.value)
    torch.testing.assert_close(statistics(model), before[0], rtol=0, atol=0)
    assert (momenta(model), modes(model)) == before[1:]


def interrupted() -> Iterator[Tensor]:
    yield loader()[0]
    raise KeyboardInterrupt("while loading")


@pytest.mark.parametrize(
    ("batches", "kind", "said"),
    [
        (lambda: [*loader(), zoo.normal(3, 5)], RuntimeError, "mat1 and mat2"),
        (lambda: [*loader(), zoo.normal(1, 6)], ValueError, "more than 1 value per channel"),
        (lambda: [*loader(), {"nothing": 3}], TypeError, "unexpected keyword"),
        (interrupted, KeyboardInterrupt, "while loading"),
        (lambda: 3, TypeError, "not iterable"),
    ],
    ids=["wrong shape", "batch of one", "wrong keyword", "Ctrl-C", "no loader"],
)
def test_a_loader_that_fails_half_way_leaves_everything_as_it_was(batches, kind, said):
    model = used()
    before = statistics(model), momenta(model), modes(model)
    with pytest.raises(kind, match=said):
        graphlocal.recalibrate(model, batches())
    torch.testing.assert_close(statistics(model), before[0], rtol=0, atol=0)
    assert (momenta(model), modes(model)) == before[1:]
