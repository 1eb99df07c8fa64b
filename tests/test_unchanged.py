"""What a backward pass needs and was changed in place: an error where autograd raises one, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphlocal
from graphlocal.errors import LocalTrainingError

LOWERED = 2
"""From this step on a model runs lowered, and from the next one on by `Repeat`."""


class Viewed(nn.Module):
    """Its output is a view of what tanh's backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(torch.relu(self.first(x)))).view(-1, 2, 2)


class Two(nn.Module):
    """Its first output is what the second one is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.sigmoid(self.first(x))
        return hidden, self.last(hidden)


class Itself(nn.Module):
    """Returns its input beside an output."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(x), x


class Loss(nn.Module):
    """Returns its own loss, which transformers' Trainer scales in place; no backward pass reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.last(x)
        return nn.functional.cross_entropy(scores, scores.argmax(1)), scores


class Parts(nn.Module):
    """Its outputs are parts of one tensor, which tanh's backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.tanh(self.last(x)).unsafe_split(2, 1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh()),
    "softplus": lambda: nn.Sequential(nn.Linear(6, 4), nn.Softplus()),
    "viewed": Viewed,
    "two": Two,
    "itself": Itself,
    "loss": Loss,
    "parts": Parts,
}


def _optimizer(x: Tensor, outputs: list[Tensor], model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def _last_bias(x: Tensor, outputs: list[Tensor], model: nn.Module) -> None:
    with torch.no_grad():
        list(model.parameters())[-1].add_(1)


def _input(x: Tensor, outputs: list[Tensor], model: nn.Module) -> None:
    x.add_(1)


def _view_of_the_input(x: Tensor, outputs: list[Tensor], model: nn.Module) -> None:
    x[1:].zero_()


def _first_output(x: Tensor, outputs: list[Tensor], model: nn.Module) -> None:
    with torch.no_grad():
        outputs[0].add_(1)


def _nothing(x: Tensor, outputs: list[Tensor], model: nn.Module) -> None:
    pass


CHANGES = [_optimizer, _last_bias, _input, _view_of_the_input, _first_output, _nothing]


def step(module: nn.Module, change: Callable[[Tensor, list[Tensor], nn.Module], None], model: nn.Module) -> str:
    """The first line of the error that a step raises with a change between its passes; "" if none."""
    module.zero_grad()
    x = torch.randn(8, 6)
    returned = module(x)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    loss = torch.stack([z.sum() for z in outputs]).sum()
    change(x, outputs, model)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("target", ["auto", "lowered", "streams"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("name", MODELS)
def test_a_change_in_place_raises_where_autograd_raises(name, change, target):
    torch.manual_seed(0)
    plain = MODELS[name]()
    expected = step(plain, change, plain)
    model = MODELS[name]()
    local = graphlocal.compile(model, example_inputs=torch.randn(8, 6), rule="backprop", target=target)
    for _ in range(LOWERED + 1):
        found = step(local, change, model)
        assert bool(found) == bool(expected), found or expected
    assert not step(local, _nothing, model)


@pytest.mark.parametrize(
    ("change", "name"),
    [(_input, "the input 'x'"), (_first_output, "the output"), (_optimizer, "the parameter 'last.weight'")],
    ids=["input", "output", "parameter"],
)
@pytest.mark.parametrize("steps", [LOWERED - 1, LOWERED])
def test_the_error_names_what_was_changed(change, name, steps):
    model = Viewed()
    local = graphlocal.compile(model, example_inputs=torch.randn(8, 6), rule="backprop")
    for _ in range(steps):
        step(local, _nothing, model)
    output = local(x := torch.randn(8, 6))
    change(x, [output], model)
    with pytest.raises(LocalTrainingError, match=f"{name} was changed in place between the forward pass") as caught:
        output.sum().backward()
    assert "optimizer.step()" in str(caught.value)


def test_local_updates_that_do_not_read_the_weights_let_them_change():
    """Errors go back through the maps E, so that a step of the optimizer in between changes nothing."""
    model = MODELS["linear"]()
    local = graphlocal.compile(model, example_inputs=torch.randn(8, 6), rule="rec-lra")
    for _ in range(LOWERED + 2):
        assert not step(local, _last_bias, model)


def test_inference_tensors_have_no_versions_and_are_taken():
    with torch.inference_mode():
        x = torch.randn(8, 6)
    model = MODELS["linear"]()
    local = graphlocal.compile(model, example_inputs=torch.randn(8, 6))
    for _ in range(LOWERED):
        step(local, _nothing, model)
    local.zero_grad()
    for _ in range(2):
        local(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
