"""The layers of `graphlocal.nn`, and PerturbConvolutions, which puts perturbative layers in place of convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.nn import LWTA, Bernoulli, PerturbativeConv2d, Signum, SoftLWTA
from graphlocal.rules import RecLRA

DOUBLE = torch.float64
SIZE = (5, 6)


def perturbative(**options) -> PerturbativeConv2d:
    return PerturbativeConv2d(3, 4, SIZE, **({"noise": 0.5} | options)).double()


def maps_in(seed: int = 0) -> Tensor:
    return zoo.normal(zoo.BATCH, 3, *SIZE, seed=seed).double()


# The perturbative layer


def by_hand(layer: PerturbativeConv2d, x: Tensor) -> Tensor:
    """The definition, one output at a time: w, n and b indexed as in the formula."""
    result = torch.zeros(len(x), layer.out_channels, *SIZE, dtype=x.dtype)
    for c, m, k in product(range(layer.out_channels), range(layer.in_channels), range(layer.maps)):
        w = layer.weight[c, m * layer.maps + k, 0, 0]
        result[:, c] += w * torch.clamp(x[:, m] + layer.noise_maps[m, k], min=0)
    if layer.bias is not None:
        result += layer.bias.view(-1, 1, 1)
    high, wide = layer.stride
    return result[..., ::high, ::wide]


@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_perturbative_layer_equals_its_definition(maps, stride, bias):
    layer = perturbative(maps=maps, stride=stride, bias=bias)
    z = layer(maps_in())
    torch.testing.assert_close(z, by_hand(layer, maps_in()), rtol=1e-12, atol=1e-14)
    strides = (stride, stride) if isinstance(stride, int) else stride
    assert z.shape == (zoo.BATCH, 4, *(-(-size // s) for size, s in zip(SIZE, strides, strict=True)))


def test_one_image_without_a_batch_gives_its_row_of_the_batch():
    layer = perturbative(maps=2, stride=2)
    torch.testing.assert_close(layer(maps_in()[1]), layer(maps_in())[1])


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_mixing_weights_learn(bias):
    layer = perturbative(maps=2, bias=bias)
    noise = layer.noise_maps.clone()
    assert {name for name, _ in layer.named_parameters()} == ({"weight", "bias"} if bias else {"weight"})
    assert not layer.noise_maps.requires_grad
    layer(maps_in()).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.equal(layer.noise_maps, noise)
    assert layer.weight.grad.abs().min() > 0


def test_the_update_is_the_error_times_the_perturbed_input():
    layer, e = perturbative(), zoo.normal(zoo.BATCH, 4, *SIZE, seed=2).double()
    layer(maps_in()).backward(e)
    perturbed = (maps_in() + layer.noise_maps[:, 0]).clamp(min=0)
    for c, m in product(range(4), range(3)):
        torch.testing.assert_close(layer.weight.grad[c, m, 0, 0], (e[:, c] * perturbed[:, m]).sum())


def test_noise_maps_are_saved_and_copied():
    layer, other = perturbative(maps=2), perturbative(maps=2)
    assert layer.state_dict()["noise_maps"].shape == (3, 2, *SIZE)
    assert not torch.equal(layer(maps_in()), other(maps_in()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(maps_in()), other(maps_in()))
    assert torch.equal(layer(maps_in()), copy.deepcopy(layer)(maps_in()))


def test_noise_has_the_standard_deviation_asked_for():
    noise = PerturbativeConv2d(20, 1, (50, 50), noise=0.3).noise_maps
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(noise.mean())) < 0.01
    assert not PerturbativeConv2d(2, 1, 4, noise=0).noise_maps.any()


@pytest.mark.parametrize("bias", [True, False])
def test_new_mixing_weights_are_those_of_a_1x1_convolution(bias):
    torch.manual_seed(3)
    layer = PerturbativeConv2d(4, 5, SIZE, maps=2, bias=bias)
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 5, 1, bias=bias)
    assert all(map(torch.equal, layer.parameters(), conv.parameters()))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"out_channels": -1}, "out_channels is -1"),
        ({"maps": 0}, "maps is 0"),
        ({"size": (4, 0)}, r"size is \(4, 0\)"),
        ({"stride": 0}, r"stride is \(0, 0\)"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(option, said):
    with pytest.raises(InputError, match=said):
        PerturbativeConv2d(**({"in_channels": 3, "out_channels": 4, "size": 5} | option))


@pytest.mark.parametrize("shape", [(3, 3, 5, 5), (3, 2, 5, 6), (5, 6), (1, 3, 3, 5, 6)], ids=str)
def test_an_input_of_another_size_is_refused(shape):
    with pytest.raises(InputError, match=r"not \(N, 3, 5, 6\)") as caught:
        perturbative()(torch.zeros(shape).double())
    assert str(shape) in str(caught.value)
    assert "make the layer anew" in str(caught.value)


# Competition


def blocks_by_hand(x: Tensor, block: int, dim: int, unit: Callable[[Tensor], Tensor]) -> Tensor:
    moved = x.movedim(dim, -1).clone()
    for index in product(*map(range, moved.shape[:-1])):
        for start in range(0, moved.shape[-1], block):
            moved[index][start : start + block] = unit(moved[index][start : start + block])
    return moved.movedim(-1, dim)


def hard(values: Tensor) -> Tensor:
    winner = max(range(len(values)), key=lambda i: float(values[i]))  # the first of equal ones
    return torch.stack([v if i == winner else torch.zeros_like(v) for i, v in enumerate(values)])


def smooth(values: Tensor) -> Tensor:
    return values * values.exp() / values.exp().sum()


@pytest.mark.parametrize(("layer", "unit"), [(LWTA, hard), (SoftLWTA, smooth)], ids=["hard", "soft"])
@pytest.mark.parametrize("block", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 6), 1), ((2, 6, 3, 2), 1), ((2, 3, 6), -1), ((6, 2), 0), ((6, 3), -2)], ids=str
)
def test_competition_equals_a_loop_over_the_blocks(layer, unit, block, shape, dim):
    x = zoo.normal(*shape).double()
    torch.testing.assert_close(layer(block, dim=dim)(x), blocks_by_hand(x, block, dim, unit))


def test_the_first_of_equal_features_wins():
    x = torch.tensor([[2.0, 2.0, 2.0, -1.0, -3.0, -1.0]])
    assert LWTA(3)(x).tolist() == [[2, 0, 0, -1, 0, 0]]


def test_losers_at_minus_infinity_become_zero():
    x = torch.tensor([[1.0, -torch.inf, torch.inf, 0.0]])
    assert LWTA(2)(x).tolist() == [[1, 0, torch.inf, 0]]


def test_winners_get_the_gradient_and_losers_none():
    x = zoo.normal(zoo.BATCH, 6).double().requires_grad_()
    z, e = LWTA(3)(x), zoo.normal(zoo.BATCH, 6, seed=1).double()
    z.backward(e)
    won = z != 0
    assert won.view(zoo.BATCH, 2, 3).sum(2).eq(1).all()
    assert torch.equal(x.grad[won], e[won])
    assert not x.grad[~won].any()


def test_the_shares_of_a_smooth_competition_sum_to_one():
    x = zoo.normal(4, 6, 2).double().abs() + 0.1
    shares = (SoftLWTA(3)(x) / x).unflatten(1, (2, 3)).sum(2)
    torch.testing.assert_close(shares, torch.ones_like(shares))
    level = torch.full((1, 4), 8.0)
    assert torch.equal(SoftLWTA(4)(level), level / 4)


def test_smooth_competition_between_far_apart_features_is_hard():
    x = 1000 * torch.tensor([[0.1, -0.3, 0.7, 0.2]])
    torch.testing.assert_close(SoftLWTA(2)(x), LWTA(2)(x))


@pytest.mark.parametrize("layer", [LWTA, SoftLWTA])
def test_competition_of_sizes_that_do_not_fit_is_refused(layer):
    with pytest.raises(InputError, match=r"7 features \(axis 1\) do not divide into blocks of 3"):
        layer(3)(torch.zeros(2, 7))
    with pytest.raises(InputError, match=r"axis 1, but its input has shape \(6,\)"):
        layer(3)(torch.zeros(6))
    with pytest.raises(InputError, match="block is 0"):
        layer(0)


# Discrete and stochastic units


def test_signum_is_the_sign_with_zero_at_zero():
    x = torch.tensor([-3.0, -0.0, 0.0, 1e-30, 2.0], dtype=DOUBLE, requires_grad=True)
    z = Signum()(x)
    assert z.tolist() == [-1, 0, 0, 1, 1]
    z.sum().backward()
    assert not x.grad.any()


def test_bernoulli_draws_ones_as_often_as_the_sigmoid_says():
    logits = torch.tensor([-2.0, 0.0, 0.5, 3.0])
    drawn = Bernoulli()(logits.expand(20_000, 4))
    assert set(drawn.unique().tolist()) == {0, 1}
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(logits), rtol=0, atol=0.015)
    spread = torch.corrcoef(drawn.T) - torch.eye(4)
    assert spread.abs().max() < 0.03  # independent


def test_bernoulli_follows_torch_s_seed_and_moves_on():
    unit, x = Bernoulli(), zoo.normal(50, 6)
    first = unit(x)
    second = unit(x)
    torch.manual_seed(0)
    assert torch.equal(unit(x), first)
    assert not torch.equal(first, second)


def test_bernoulli_in_evaluation_is_its_mean_and_draws_nothing():
    state = torch.get_rng_state()
    x = zoo.normal(3, 6).requires_grad_()
    z = Bernoulli().eval()(x)
    assert torch.equal(z, torch.sigmoid(x))
    assert torch.equal(torch.get_rng_state(), state)
    z.sum().backward()
    torch.testing.assert_close(x.grad, (z * (1 - z)).detach())


def test_bernoulli_s_sample_has_no_derivative():
    x = zoo.normal(3, 6).requires_grad_()
    Bernoulli()(x).sum().backward()
    assert not x.grad.any()


# All of them in the compiler

LAYERS = {
    "signum": Signum,
    "bernoulli": Bernoulli,
    "lwta": lambda: LWTA(2),
    "soft lwta": lambda: SoftLWTA(2),
    "perturbative": lambda: PerturbativeConv2d(4, 4, 6, maps=2, stride=2),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_layers_export_with_an_open_batch_in_their_dtype(build, dtype, training):
    layer, x = build().to(dtype).train(training), zoo.normal(3, 4, 6, 6).to(dtype)
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(batch,), strict=False).module()
    for size in (3, 7):
        x = zoo.normal(size, 4, 6, 6).to(dtype)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        assert torch.equal(exported(x), expected)
        assert expected.dtype == dtype


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_layers_copy_and_load_their_state(build):
    layer, x = build(), zoo.normal(3, 4, 6, 6)
    twin, loaded = copy.deepcopy(layer), build()
    loaded.load_state_dict(layer.state_dict())
    results = []
    for module in (layer, twin, loaded):
        torch.manual_seed(1)
        results.append(module(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_layers_print_their_options():
    layers = [Signum(), Bernoulli(), LWTA(2), SoftLWTA(3, dim=-1), PerturbativeConv2d(3, 4, (5, 6), maps=2)]
    assert [str(layer) for layer in layers] == [
        "Signum()",
        "Bernoulli()",
        "LWTA(block=2, dim=1)",
        "SoftLWTA(block=3, dim=-1)",
        "PerturbativeConv2d(3, 4, size=(5, 6), maps=2, noise=0.1)",
    ]
    strided = PerturbativeConv2d(3, 4, 5, stride=2, bias=False)
    assert str(strided).endswith("size=(5, 5), maps=1, noise=0.1, stride=(2, 2), bias=False)")


def units(unit: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), unit, nn.Linear(8, 8), unit, nn.Linear(8, zoo.CLASSES))


@pytest.mark.parametrize("unit", [Signum(), Bernoulli()], ids=str)
def test_rec_lra_trains_below_units_through_which_no_gradient_passes(unit):
    eager = step(units(unit), zoo.vectors(), zoo.classify)
    assert [name for name, gradient in eager.gradients.items() if gradient.any()] == ["4.weight", "4.bias"]
    rule = RecLRA(beta=1)  # large enough for targets of another sign
    local = graphlocal.compile(units(unit), example_inputs=zoo.vectors(), rule=rule)
    gradients = step(local, zoo.vectors(), zoo.classify).gradients
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("unit", [LWTA(2), SoftLWTA(4), Bernoulli(), Signum()], ids=str)
def test_local_backprop_through_units_equals_autograd(unit):
    model = units(unit).double()
    inputs = (zoo.vectors()[0].double(),)
    eager = step(model, inputs, zoo.classify)
    local = step(graphlocal.compile(model, example_inputs=inputs, rule="backprop"), inputs, zoo.classify)
    assert_same_forward(local, eager)
    assert_same_gradients(local.gradients, eager.gradients)
