"""LRA-fdbk against a plain transcription, on any model, and with the losses and bounds of the paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import assert_same_forward, step

import graphlocal
import zoo
from graphlocal.data import batches, load
from graphlocal.errors import InputError
from graphlocal.feedback import weight_names
from graphlocal.rules import LRADiff, LRAFeedback, Neuron

DOUBLE = torch.float64
Transcription = Callable[[nn.Sequential, Tensor, dict[str, Tensor], LRAFeedback], dict[str, Tensor]]
WHOLE = {"feedback_share": 10.0, "feedback_total": 10.0}


def perceptron(unit: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), unit(), nn.Linear(7, 6), unit(), nn.Linear(6, 3)).double()


def normalized(v: Tensor, bound: float | None) -> Tensor:
    return v if bound is None or v.norm() < bound else v * bound / v.norm()


LOSSES = {
    "cauchy": lambda z, y: torch.log(1 + (z - y) ** 2),
    "l2": lambda z, y: (z - y) ** 2 / 2,
    "l1": lambda z, y: (z - y).abs(),
}


def by_hand(model: nn.Sequential, x: Tensor, maps: dict[str, Tensor], rule: LRAFeedback) -> dict[str, Tensor]:
    """The paper's rule: sample by sample and layer by layer, with the local loss differentiated by autograd."""
    updates = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        z, h = [row], []
        for layer in (0, 2, 4):
            h.append((model[layer].weight @ z[-1] + model[layer].bias).detach())
            z.append(h[-1] if layer == 4 else torch.tanh(h[-1]))
        delta = 2 * z[-1] / len(z[-1])  # of the loss mean over the outputs
        for layer, i in ((4, 2), (2, 1), (0, 0)):
            updates[f"{layer}.weight"] += torch.outer(delta, z[i]) / len(x)
            updates[f"{layer}.bias"] += delta / len(x)
            if layer:
                below = str(layer - 2)
                d = normalized(maps[below] @ delta, rule.c2)
                y = torch.tanh(h[i - 1] - rule.beta * d)
                a = h[i - 1].clone().requires_grad_()
                (delta,) = torch.autograd.grad(LOSSES[rule.local_loss](torch.tanh(a), y).sum(), a)
    return {name: normalized(update, rule.c1) for name, update in updates.items()}


@pytest.mark.parametrize("c1", [None, 0.05])
@pytest.mark.parametrize("c2", [None, 0.1])
@pytest.mark.parametrize("local_loss", list(LOSSES))
def test_updates_equal_the_transcription(local_loss, c1, c2):
    rule = LRAFeedback(local_loss=local_loss, beta=0.3, c1=c1, c2=c2, rescale=None, **WHOLE)
    assert_transcribed(rule, by_hand)


def assert_transcribed(rule: LRAFeedback, transcription: Transcription) -> None:
    model, x = perceptron(), torch.randn(4, 5, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    names = weight_names(local.graph)
    maps = {c.target: getattr(local.error_weights, *names[c.name])
            for c in local.graph.connections if c.kind == "feedback"}  # fmt: skip
    local(x).square().mean().backward()
    for name, update in transcription(model, x, maps, rule).items():
        torch.testing.assert_close(model.get_parameter(name).grad, update, rtol=1e-9, atol=1e-13, msg=name)


def by_hand_rescaled(model: nn.Sequential, x: Tensor, maps: dict[str, Tensor], rule: LRAFeedback) -> dict[str, Tensor]:
    """The same for a whole batch, whose displacements are brought to one size, and its errors back to theirs."""
    z, h = [x], []
    for layer in (0, 2, 4):
        h.append((z[-1] @ model[layer].weight.T + model[layer].bias).detach())
        z.append(h[-1] if layer == 4 else torch.tanh(h[-1]))
    delta = 2 * z[-1] / z[-1].shape[1]
    updates = {}
    for layer, i in ((4, 2), (2, 1), (0, 0)):
        updates[f"{layer}.weight"] = delta.T @ z[i] / len(x)
        updates[f"{layer}.bias"] = delta.mean(0)
        if layer:
            d = delta @ maps[str(layer - 2)].T
            size = d.square().sum(1).mean().sqrt()
            step = d if rule.c2 is None else rule.c2 * d / size
            a = h[i - 1].clone().requires_grad_()
            loss = LOSSES[rule.local_loss](torch.tanh(a), torch.tanh(h[i - 1] - rule.beta * step)).sum()
            (delta,) = torch.autograd.grad(loss, a)
            delta = delta / delta.square().sum(1).mean().sqrt() * size
    return {name: normalized(update, rule.c1) for name, update in updates.items()}


@pytest.mark.parametrize("c1", [None, 0.05])
@pytest.mark.parametrize("c2", [None, 0.1])
@pytest.mark.parametrize("local_loss", list(LOSSES))
def test_rescaled_updates_equal_the_transcription(local_loss, c1, c2):
    assert_transcribed(LRAFeedback(local_loss=local_loss, beta=0.3, c1=c1, c2=c2, **WHOLE), by_hand_rescaled)


def relu(h: Tensor) -> Neuron:
    return Neuron("z", h, torch.relu(h), torch.relu)


def test_a_sample_pushes_as_hard_as_it_is_wrong():
    """Normalize lets a sample push as hard with a tenth of the error."""
    torch.manual_seed(0)
    h, d = torch.rand(2, 50, dtype=DOUBLE) + 1, torch.randn(50, dtype=DOUBLE)
    displacement = 30 * torch.stack([d, d / 10])
    sizes = {}
    for rescale in ("rms", None):
        error = LRAFeedback(rescale=rescale, local_loss="l2").local_error(relu(h), displacement)
        sizes[rescale] = error.norm(dim=1)
    torch.testing.assert_close(sizes["rms"][0], 10 * sizes["rms"][1])
    torch.testing.assert_close(sizes[None][0], sizes[None][1])


def test_rescaled_errors_keep_their_size_and_units():
    torch.manual_seed(0)
    neuron, d = relu(torch.randn(6, 50, dtype=DOUBLE)), torch.randn(6, 50, dtype=DOUBLE)
    d[2] = 0  # a sample without an error has no part in the size of the others'
    rule = LRAFeedback()
    error = rule.local_error(neuron, d)
    assert not error[2].any()
    torch.testing.assert_close(error.norm(), d.norm())
    assert rule.homogeneous
    torch.testing.assert_close(rule.local_error(neuron, 1e-3 * d), 1e-3 * error)
    assert not rule.local_error(neuron, 0 * d).any()
    assert not LRAFeedback(rescale=None).homogeneous
    assert not LRAFeedback(c2=None).homogeneous


def test_representations_without_an_upper_bound_stay_apart():
    """Under Normalize those of all samples become one direction that grows, whatever is done about the updates."""
    data = load("digits")
    cosines, norms = {}, {}
    for rescale in ("rms", None):
        torch.manual_seed(1)
        layers = [m for a, b in ((64, 64), (64, 64), (64, 64)) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))
        rule = LRAFeedback(rescale=rescale)
        local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=rule, partition="leaf")
        step = graphlocal.train_step(local, cross_entropy, torch.optim.Adam(local.parameters(), 3e-3))
        order = torch.Generator().manual_seed(0)
        for _ in range(6):
            for x, y in batches(data.train_x, data.train_y, 32, order):
                step(x, y)
        with torch.no_grad():
            z = model[:-1](data.test_x)
        cosines[rescale] = float(torch.cosine_similarity(z[1:], z[:-1]).mean())
        norms[rescale] = float(z.norm(dim=1).mean())
    assert cosines["rms"] < 0.9 < 0.95 < cosines[None]
    assert 2 * norms["rms"] < norms[None]


SUMMED = {
    "lra-fdbk": lambda reduction: LRAFeedback(beta=0.3, c1=None, c2=0.1, reduction=reduction, rescale=None, **WHOLE),
    "rescaled": lambda reduction: LRAFeedback(c1=None, reduction=reduction, **WHOLE),
    "rescaled, without bounds": lambda reduction: LRAFeedback(c1=None, c2=None, reduction=reduction, **WHOLE),
    "halting": lambda reduction: LRAFeedback(c1=None, c2=0.1, epsilon=0.05, reduction=reduction, **WHOLE),
    "lra-diff": lambda reduction: LRADiff(beta=0.3, c1=None, c2=0.1, reduction=reduction),
    "several steps": lambda reduction: LRADiff(beta=0.3, c1=None, c2=0.1, steps=3, reduction=reduction),
}


@pytest.mark.parametrize("make", SUMMED.values(), ids=list(SUMMED))
def test_a_loss_that_is_summed_gives_the_sum_of_the_samples_updates(make):
    """Targets are set by the error of each sample, which bounds and losses make no linear function of it."""
    found = {}
    x = torch.randn(4, 5, dtype=DOUBLE)
    for reduction in ("mean", "sum"):
        torch.manual_seed(7)
        model = perceptron()
        local = graphlocal.compile(model, example_inputs=(x,), rule=make(reduction), partition="leaf")
        losses = local(x).square().mean(1)
        getattr(losses, reduction)().backward()
        found[reduction] = {name: p.grad for name, p in model.named_parameters()}
    for name, mean in found["mean"].items():
        torch.testing.assert_close(found["sum"][name], 4 * mean, rtol=1e-9, atol=1e-13, msg=name)


def test_every_subgraph_gets_its_displacement_from_those_that_read_it():
    local = graphlocal.compile(perceptron(), example_inputs=(torch.randn(4, 5, dtype=DOUBLE),), rule="lra-fdbk")
    assert [(c.source, c.target) for c in local.graph.connections if c.kind == "feedback"] == [("2", "0"), ("4", "2")]


@pytest.mark.parametrize("model", zoo.models(exclude=("unused",)))
def test_every_parameter_of_any_model_gets_a_finite_update(model):
    example = model.example(DOUBLE)
    local = graphlocal.compile(model.make(DOUBLE), example_inputs=example, rule="lra-fdbk")
    true = step(model.make(DOUBLE), example, model.loss)
    found = step(local, example, model.loss)
    assert_same_forward(found, true)
    for name, gradient in true.gradients.items():
        if gradient is not None and gradient.abs().max() > 1e-12:
            assert found.gradients[name].isfinite().all(), name
            assert found.gradients[name].any(), name


def test_the_standard_deviation_of_the_maps_is_sigma():
    x = torch.randn(4, 400)
    model = nn.Sequential(nn.Linear(400, 300), nn.Tanh(), nn.Linear(300, 200))
    local = graphlocal.compile(model, example_inputs=(x,), rule=LRAFeedback(sigma=0.7, **WHOLE))
    (feedback,) = local.error_weights.buffers()
    assert abs(float(feedback.std()) - 0.7) < 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_loss": "l3"}, "local_loss='l3'"),
        ({"beta": 0}, "beta=0"),
        ({"c2": -1.0}, r"c2=-1\.0"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"rescale": "l2"}, "rescale='l2'"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        LRAFeedback(**options)
