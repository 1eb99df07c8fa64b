"""Models whose attributes have the names of other things: of a graph's, of arguments, of Python's words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphlocal
from graphlocal.artefact.values import NeedsModel
from graphlocal.errors import InputError


class Named(nn.Module):
    """A model with one attribute of a given name, a layer or a parameter."""

    def __init__(self, name: str, layer: bool) -> None:
        super().__init__()
        self.name, self.layer, self.head = name, layer, nn.Linear(6, 3)
        if layer:
            self.add_module(name, nn.Linear(4, 6))
        else:
            self.register_parameter(name, nn.Parameter(torch.randn(6, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self._modules[self.name](x) if self.layer else x @ self._parameters[self.name].T
        return self.head(torch.tanh(h))


@pytest.mark.parametrize(
    ("name", "layer"), [*((name, layer) for name in ("code", "graph", "meta") for layer in (True, False)),
                        ("error_weights", True)],
)  # fmt: skip
def test_names_that_graphs_keep_for_themselves_are_refused_with_a_way_out(name, layer):
    torch.manual_seed(0)
    model, x = Named(name, layer), torch.randn(8, 4)
    with pytest.raises(InputError, match=f"Named.{name} can't have that name"):
        graphlocal.compile(model, example_inputs=(x,))
    wrapped = nn.Sequential(model)
    F.cross_entropy(wrapped(x), torch.arange(8) % 3).backward()
    expected = {key: p.grad.clone() for key, p in wrapped.named_parameters()}
    wrapped.zero_grad()
    local = graphlocal.compile(wrapped, example_inputs=(x,), rule="backprop", partition="leaf")
    F.cross_entropy(local(x), torch.arange(8) % 3).backward()
    for key, p in wrapped.named_parameters():
        torch.testing.assert_close(p.grad, expected[key])


class Keyed(nn.Module):
    """Layers under keys, and a buffer that only other code reads; `used`: the keys that forward goes through."""

    def __init__(self, used: tuple[str, ...]) -> None:
        super().__init__()
        self.used, self.layers = used, nn.ModuleDict({key: nn.Linear(4, 4) for key in ("in", "out", "is", "en")})
        self.register_buffer("meta", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for key in self.used:
            x = self.layers[key](x)
        return x


def test_a_key_that_is_a_word_of_python_is_refused():
    with pytest.raises(InputError, match="can't be named 'in'") as refused:
        graphlocal.compile(Keyed(("in", "out")), example_inputs=(torch.randn(8, 4),))
    assert "layers.in.weight" in str(refused.value)
    assert "'in_'" in str(refused.value)


def test_what_forward_does_not_read_may_have_any_name():
    local = graphlocal.compile(Keyed(("out", "en")), example_inputs=(torch.randn(8, 4),), partition="leaf")
    local(torch.randn(8, 4)).square().mean().backward()
    learned = {name for name, p in local.original.named_parameters() if p.grad is not None}
    assert learned == {f"layers.{key}.{part}" for key in ("out", "en") for part in ("weight", "bias")}


@pytest.mark.parametrize("name", ["operations", "device", "lifted", "training_graph", "forward_pass"])
def test_a_file_of_a_model_with_any_names_is_loaded_or_asks_for_the_model(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    local = graphlocal.compile(Named(name, layer=True), example_inputs=(x,), partition="leaf")
    local.save(tmp_path / "m.local")
    again = graphlocal.load(tmp_path / "m.local", model=Named(name, layer=True))
    assert torch.equal(again.eval()(x), local.eval()(x))
    if name == "forward_pass":
        assert torch.equal(graphlocal.load(tmp_path / "m.local").eval()(x), local(x))
    else:
        with pytest.raises(NeedsModel, match=f"Named.{name} has a name that a model without code keeps"):
            graphlocal.load(tmp_path / "m.local")


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("name", ["x", "self", "loss", "retain", "original", "lifted", "slope"])
def test_attributes_may_be_named_as_an_argument_is(name, layer):
    torch.manual_seed(0)
    model, x = Named(name, layer), torch.randn(8, 4)
    F.cross_entropy(model(x), torch.arange(8) % 3).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    local = graphlocal.compile(model, example_inputs=(x,), rule="backprop", partition="leaf")
    for _ in range(3):  # eagerly and lowered
        model.zero_grad()
        F.cross_entropy(local(x), torch.arange(8) % 3).backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key])
