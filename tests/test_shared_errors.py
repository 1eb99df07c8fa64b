"""Weight gradients from errors that all positions share: autograd's numbers, from sums over positions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
from graphlocal.rules import Backprop, DirectFeedbackAlignment, Neuron, RecLRA
from graphlocal.rules.base import identity
from graphlocal.targets import shared_errors
from graphlocal.targets.training_graph import split

aten = torch.ops.aten


class Images(nn.Module):
    """Convolutions with everything that a convolution can have, and the mean over positions."""

    def __init__(self, layers: list[nn.Module], features: int, axes: int) -> None:
        super().__init__()
        self.layers, self.head, self.axes = nn.Sequential(*layers), nn.Linear(features, 3), axes

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(tuple(range(2, 2 + self.axes))))


class Tokens(nn.Module):
    """Linear layers over tokens, side by side and one after another, and their mean; `first`: tokens before samples."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.head = first, nn.LayerNorm(6), nn.Linear(4, 3)
        self.query, self.key, self.out = nn.Linear(6, 5, bias=False), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x.transpose(0, 1) if self.first else x)
        mixed = self.out(torch.tanh(self.query(normal)) + self.key(normal))
        return self.head(mixed.mean(0 if self.first else 1))


MODELS = {
    "strides, dilation, groups": (lambda: Images([
        nn.Conv2d(3, 8, 5, 2, 1, dilation=2), nn.Conv2d(8, 12, (3, 1), (1, 2), (1, 0), groups=4, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding="same", groups=12)], 12, 2), (3, 20, 21)),
    "circular": (lambda: Images([nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)], 4, 2),
                 (2, 6, 5)),
    "one axis": (lambda: Images([nn.Conv1d(3, 8, 5, 2, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)], 4, 1),
                 (3, 20)),
    "three axes": (lambda: Images([nn.Conv3d(2, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 1)], 4, 3),
                   (2, 6, 7, 8)),
    "transposed": (lambda: Images([nn.ConvTranspose2d(2, 4, 3, 2), nn.BatchNorm2d(4)], 4, 2), (2, 6, 5)),
    "plain": (lambda: Images([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], 4, 2), (3, 10, 12)),
    "tokens": (Tokens, (7, 6)),
    "tokens first": (lambda: Tokens(first=True), (7, 6)),
}  # fmt: skip


def steps(name: str, rule: graphlocal.rules.Rule, target: str, dtype: torch.dtype = torch.float64):
    """A compiled model after two steps, of which the second one's gradients are left."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x, labels = torch.randn(4, *shape, dtype=dtype), torch.randint(3, (4,))
    local = graphlocal.compile(make().to(dtype), example_inputs=x, rule=rule, partition="leaf", target=target)
    for _ in range(2):
        local.zero_grad()
        F.cross_entropy(local(x), labels).backward()
    return local


@pytest.mark.parametrize("rule", [RecLRA(), DirectFeedbackAlignment(), Backprop()], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd(name, rule):
    lowered, eager = (steps(name, rule, target) for target in ("lowered", "eager"))
    assert lowered.compiled.execution.shared_errors or name == "transposed" or rule == Backprop()
    for (parameter, found), expected in zip(
        lowered.original.named_parameters(), eager.original.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-11, atol=1e-13, msg=parameter)


def operators(local: graphlocal.LocalModule) -> list:
    leaves = local.compiled.traced.arguments.leaves
    return [node.target for node in local.compiled.execution.lowered(leaves).module.graph.nodes]


def test_no_convolution_is_differentiated_where_every_error_is_shared():
    local = steps("strides, dilation, groups", RecLRA(), "lowered")
    assert aten.convolution_backward.default not in operators(local)
    assert operators(local).count(aten.convolution.default) == 3


def test_linear_layers_of_one_input_share_its_sum():
    local = steps("tokens", DirectFeedbackAlignment(), "lowered")
    forward, error = split(local.compiled.execution.lowered(local.compiled.traced.arguments.leaves))
    sums = forward.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
    assert len(sums) == 3  # of the norm's input, of what query and key read, of what out reads
    assert not error.graph.find_nodes(op="call_function", target=aten.native_layer_norm_backward.default)


def test_backpropagation_from_a_mean_over_tokens_has_a_shared_error_too():
    local = steps("tokens", Backprop(), "lowered")
    assert local.compiled.execution.shared_errors >= 2  # weight and bias of the layer before the mean


def test_few_positions_are_left_alone():
    model = Images([nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)], 4, 2)
    local = graphlocal.compile(model, example_inputs=torch.randn(4, 2, 3, 5), partition="leaf", target="lowered")
    assert aten.convolution_backward.default in operators(local)
    assert not local.compiled.execution.shared_errors


def test_float16_is_left_alone():
    """It may not hold the sum of inputs over many positions."""
    assert not steps("tokens", RecLRA(), "lowered", torch.float16).compiled.execution.shared_errors


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("name", ["strides, dilation, groups", "plain", "one axis", "tokens"])
def test_bfloat16_loses_no_more_by_sums_over_positions_than_by_the_rounding_of_errors(name, under_autocast):
    """Inputs with a large mean, whose sum is far above what is left of it where errors cancel."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    start, x, labels = make().bfloat16(), (torch.randn(32, *shape) + 4).bfloat16(), torch.randint(3, (32,))

    def gradients(dtype: torch.dtype, target: str, maps: dict[str, Tensor], autocast: bool) -> Tensor:
        model, data = copy.deepcopy(start).to(dtype), x.to(dtype)
        local = graphlocal.compile(model, example_inputs=data, rule="rec-lra", partition="leaf", target=target)
        local.error_weights.load_state_dict(maps)
        for _ in range(2):
            local.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                F.cross_entropy(local(data), labels).backward()
        assert bool(local.compiled.execution.shared_errors) == (target == "lowered")
        return torch.cat([p.grad.double().flatten() for p in local.original.parameters()])

    maps = graphlocal.compile(start, example_inputs=x, rule="rec-lra", partition="leaf").error_weights.state_dict()
    kind = torch.float32 if under_autocast else torch.bfloat16
    true = gradients(torch.float64, "eager", maps, autocast=False)
    off = [float((gradients(kind, t, maps, under_autocast) - true).norm() / true.norm()) for t in ("lowered", "eager")]
    assert off[1] < 0.05
    assert off[0] < 1.5 * off[1]


def test_inputs_of_linear_layers_are_not_kept():
    """What the update needs of them is summed up in the forward pass."""
    kept = {}
    for tokens in (10, 100):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Mean(), nn.Linear(8, 3))
        x = torch.randn(4, tokens, 6)
        local = graphlocal.compile(model, example_inputs=x, partition="leaf", target="lowered")
        run = local.compiled.execution.run([x], False)
        kept[tokens] = sum(value.numel() for value in run.saved if isinstance(value, Tensor))
    assert kept[10] == kept[100]


def test_recomputation_keeps_the_sums():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Mean(), nn.Linear(8, 3)), torch.randn(4, 50, 6)
    local = graphlocal.compile(model, example_inputs=x, partition="leaf", target="lowered", recompute=True)
    shapes = [tuple(value.shape) for value in local.compiled.execution.run([x], False).saved]
    assert (4, 6) in shapes
    assert not {(200, 6), (4, 50, 6)} & set(shapes)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class MaskToken(nn.Module):
    """A copy of an expanded parameter, of which one position is then written over."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.token = (nn.Parameter(torch.zeros(size)) for size in ((1, 1, 6), (6,)))
        self.key, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mask.expand(*x.shape).clone()
        h[:, 0] = self.token
        return self.out(torch.tanh(self.key(h)) + x).mean(1)


class Critic(nn.Module):
    """One number for each image: the error is the same for all channels too."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).mean((1, 2, 3))


class Counting(nn.Module):
    """A sum of integers that all positions share, by which the output is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        count = (x[:, :1] > -9).long().expand(*x.shape).sum(1)
        return self.out(x).mean(1).gather(1, count - x.shape[1])


ODD = {
    "mask token": (MaskToken, (7, 6)), "critic": (Critic, (3, 6, 6)), "groups": (lambda: Critic(3), (3, 6, 6)),
    "counting": (Counting, (7, 6)),
    "short lists": (lambda: Images([nn.Conv2d(3, 6, 3, (1,), (1,)), nn.BatchNorm2d(6)], 6, 2), (3, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("rule", [RecLRA(), Backprop()], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_ten_steps_of_odd_models_are_those_of_the_eager_target(name, rule):
    ends = []
    for target in ("lowered", "eager"):
        torch.manual_seed(0)
        make, shape = ODD[name]
        model = make().double()
        local = graphlocal.compile(model, example_inputs=torch.randn(4, *shape).double(), rule=rule, target=target)
        optimizer = torch.optim.SGD(local.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            local(torch.randn(4, *shape).double()).square().sum().backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_rewriting_that_changes_the_numbers_is_taken_back(monkeypatch):
    monkeypatch.setattr(shared_errors, "_windows", lambda image, *_: torch.zeros(120, 9))
    local = steps("plain", RecLRA(), "lowered")
    assert not local.compiled.execution.shared_errors
    assert aten.convolution_backward.default in operators(local)


@pytest.mark.parametrize("target", ["auto", "batched", "streams"])
@pytest.mark.parametrize("name", ["strides, dilation, groups", "tokens"])
def test_other_targets_compute_the_same(name, target):
    found, expected = (steps(name, RecLRA(), kind, torch.float32) for kind in (target, "lowered"))
    for a, b in zip(found.original.parameters(), expected.original.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rescale", ["rms", None])
def test_without_an_activation_the_error_is_the_displacement(rescale):
    """Where phi is the identity, z - (h - beta d / s) s is beta d, and does not drown in the rounding of a large h."""
    d, h = torch.randn(4, 5), torch.full((4, 5), 1e8)
    error = RecLRA(beta=0.25, rescale=rescale).local_error(Neuron("z", h, h, identity), d)
    assert torch.equal(error, 0.25 * d)
