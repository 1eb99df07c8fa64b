"""The quick look at a model before each step sees all that a compilation is chosen by."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from graphlocal.watch import ModelWatch, _reads_mode


class Own(nn.Module):
    """A layer of the user's, whose forward may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(), Own(), nn.Sequential(nn.Linear(4, 2)), nn.ModuleList(),
        nn.ParameterList(),
    )  # fmt: skip


CHANGES = {
    "a mode that matters": lambda m: m[2].eval(),
    "the mode of a layer of the user's": lambda m: m[3].eval(),
    "a frozen parameter": lambda m: m[4][0].bias.requires_grad_(False),
    "another dtype": lambda m: m.double(),
    "another device": lambda m: m.to("meta"),
    "another layer": lambda m: setattr(m, "1", nn.ReLU()),
    "another layer inside": lambda m: setattr(m[4], "0", nn.Linear(4, 2)),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(4, 3))),
    "a layer more": lambda m: m.append(nn.Tanh()),
    "a layer less": lambda m: m.pop(1),
    "a layer inside a layer of the user's": lambda m: setattr(m[3], "inner", nn.Tanh()),
    "a parameter of a layer of the user's": lambda m: setattr(m[3], "gain", nn.Parameter(torch.ones(()))),
    "a layer in an empty container": lambda m: m[5].append(nn.Tanh()),
    "a parameter in an empty list": lambda m: m[6].append(nn.Parameter(torch.ones(()))),
    "a parametrization": lambda m: parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_a_change_is_seen(change):
    net = model()
    watch = ModelWatch(net)
    before = watch.looks()
    assert watch.looks() == before
    structure, state = watch.replaced(), watch.state()
    change(net)
    assert watch.looks() != before
    assert (watch.replaced(), watch.state()) != (structure, state)


class Asking(nn.Module):
    """A module of the user's that asks another one for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2 if self.inner.training else x


def test_all_modes_matter_where_a_module_asks_for_those_of_others():
    net = nn.Sequential(Asking())
    watch = ModelWatch(net)
    before = watch.looks()
    net[0].inner.eval()
    assert watch.looks() != before


def test_a_mode_that_changes_nothing_is_no_change_unless_a_hook_may_read_it():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    watch = ModelWatch(net)
    before = watch.looks()
    net[0].eval()
    assert watch.looks() == before
    net[0].train().register_forward_hook(lambda module, args, result: result * module.training)
    watch.renew()
    before = watch.looks()
    net[0].eval()
    assert watch.looks() != before


def test_every_layer_of_torchs_that_reads_its_mode_is_known():
    layers = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    assert len(layers) > 100
    for kind in layers:
        own = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
        if any("self.training" in inspect.getsource(cls) for cls in own):
            assert _reads_mode(kind.__new__(kind)), kind
