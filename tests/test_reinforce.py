"""REINFORCE and the slope-annealed estimator, against enumeration and transcriptions."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
from graphlocal.errors import InputError
from graphlocal.nn import Bernoulli, Signum
from graphlocal.rules import Backprop

DOUBLE = torch.float64
LOSSES = partial(F.cross_entropy, reduction="none")


class Tiny(nn.Module):
    """Two stochastic units, one after another, and a deterministic way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)
        self.unit = Bernoulli()

    def forward(self, x: Tensor) -> Tensor:
        a = self.unit(self.first(x))
        h = self.second(a)
        return self.head(self.unit(h) + 0.3 * torch.tanh(h))


def expected_loss(model: Tiny, x: Tensor, y: Tensor) -> Tensor:
    """The mean loss over all values of the units, each with its probability; differentiable."""
    total = torch.zeros((), dtype=x.dtype)
    codes = [torch.tensor(code, dtype=x.dtype).expand(len(x), 2) for code in product([0.0, 1.0], repeat=2)]
    p = torch.sigmoid(model.first(x))
    for a in codes:
        h = model.second(a)
        q = torch.sigmoid(h)
        for b in codes:
            chance = (a * p + (1 - a) * (1 - p)).prod(1) * (b * q + (1 - b) * (1 - q)).prod(1)
            total = total + (chance * LOSSES(model.head(b + 0.3 * torch.tanh(h)), y)).mean()
    return total


@pytest.mark.parametrize(("baseline", "partition"), [(None, "leaf"), (0.9, 1)])
def test_reinforce_is_unbiased(baseline, partition):
    """The mean of 60,000 estimates is the gradient of the expectation, to within five standard errors."""
    torch.manual_seed(0)
    model = Tiny().double()
    x, y = torch.randn(1, 2, dtype=DOUBLE), torch.tensor([1])
    many = 3000
    rule = Backprop(estimator="reinforce", baseline=baseline)
    local = graphlocal.compile(model, example_inputs=(x.repeat(4, 1),), rule=rule, partition=partition)
    estimates: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(20):
        local.zero_grad()
        losses = LOSSES(local(x.repeat(many, 1)), y.repeat(many))
        local.losses = losses
        losses.mean().backward()
        for name, parameter in model.named_parameters():
            estimates[name].append(parameter.grad.clone())
    true = torch.autograd.grad(expected_loss(model, x, y), list(model.parameters()))
    for (name, found), exact in zip(estimates.items(), true, strict=True):
        each = torch.stack(found)
        error = each.std(0) / len(found) ** 0.5
        assert ((each.mean(0) - exact).abs() < 5 * error + 1e-12).all(), name
        assert float(error.max()) < 0.01 * max(1.0, float(exact.abs().max())), name


def test_a_straight_through_estimate_is_biased():
    """The test of unbiasedness can fail: the same net with another estimator is many standard errors away."""
    torch.manual_seed(0)
    model = Tiny().double()
    x, y = torch.randn(1, 2, dtype=DOUBLE), torch.tensor([1])
    local = graphlocal.compile(model, example_inputs=(x.repeat(4, 1),), rule=Backprop(estimator="slope-adjusted"))
    each = []
    for _ in range(20):
        local.zero_grad()
        F.cross_entropy(local(x.repeat(3000, 1)), y.repeat(3000)).backward()
        each.append(model.first.weight.grad.clone())
    (exact,) = torch.autograd.grad(expected_loss(model, x, y), [model.first.weight])
    found = torch.stack(each)
    assert ((found.mean(0) - exact).abs() > 5 * found.std(0) / 20**0.5).any()


def test_the_gradient_of_a_logit_is_sample_less_probability_times_loss_less_baseline():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), Bernoulli(), nn.Linear(7, 3)).double()
    x, y = torch.randn(9, 5, dtype=DOUBLE), torch.randint(3, (9,))
    local = graphlocal.compile(model, example_inputs=(x,), rule=Backprop(estimator="reinforce", baseline=0.75))
    baseline, seen = torch.zeros((), dtype=DOUBLE), []
    for step in range(3):
        local.zero_grad()
        state = torch.get_rng_state()
        local.losses = losses = LOSSES(local(x), y)
        losses.mean().backward()
        with torch.no_grad():
            torch.set_rng_state(state)
            h = x @ model[0].weight.T + model[0].bias
            z = torch.bernoulli(torch.sigmoid(h))
            loss = LOSSES(model[2](z), y)
            score = (z - torch.sigmoid(h)) * (loss - baseline).unsqueeze(1) / len(x)
        torch.testing.assert_close(model[0].weight.grad, score.T @ x, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model[0].bias.grad, score.sum(0), rtol=1e-9, atol=1e-12)
        seen.append(loss.mean())
        weights = 0.75 ** torch.arange(step, -1, -1, dtype=DOUBLE)
        baseline = (weights * torch.stack(seen)).sum() / weights.sum()


def accuracy(rule: Backprop, steps: int, loss_fn=F.cross_entropy) -> float:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(20, 2), Bernoulli(), nn.Linear(2, 2))
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule)
    step = graphlocal.train_step(local, loss_fn, torch.optim.Adam(model.parameters(), 0.03))
    for _ in range(steps):
        step(x, y)
    local.eval()
    return float((local(x).argmax(1) == y).float().mean())


def test_reinforce_learns_by_the_fused_step():
    assert accuracy(Backprop(estimator="reinforce"), 300, LOSSES) > 0.9


def test_the_annealed_slope_learns():
    assert accuracy(Backprop(estimator="slope-annealed", slope_growth=0.02), 150) > 0.9


def test_losses_that_are_missing_or_of_another_shape_are_refused():
    x, y = torch.randn(6, 20), torch.randint(2, (6,))
    model = nn.Sequential(nn.Linear(20, 2), Bernoulli(), nn.Linear(2, 2))
    local = graphlocal.compile(model, example_inputs=(x,), rule=Backprop(estimator="reinforce"))
    with pytest.raises(InputError, match=r"local\.losses"):
        F.cross_entropy(local(x), y).backward()
    local.losses = torch.zeros(5)
    with pytest.raises(InputError, match=r"\[5\].*\[6\]"):
        F.cross_entropy(local(x), y).backward()
    step = graphlocal.train_step(local, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(InputError, match="reduction='none'"):
        step(x, y)


def test_a_unit_without_a_score_function_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), Signum(), nn.Linear(3, 2))
    with pytest.raises(InputError, match="score function"):
        graphlocal.compile(model, example_inputs=(torch.randn(5, 4),), rule=Backprop(estimator="reinforce"))


def test_a_monitor_watches_reinforce():
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    model = nn.Sequential(nn.Linear(4, 3), Bernoulli(), nn.Linear(3, 2))
    local = graphlocal.compile(model, example_inputs=(x,), rule=Backprop(estimator="reinforce"))
    step = graphlocal.train_step(local, LOSSES, torch.optim.SGD(model.parameters(), 0.1))
    monitor = graphlocal.Monitor(local, LOSSES, every=1)
    watched = monitor.watch(step)
    watched(x, y)
    watched(x, y)
    assert int(local.error_weights.estimator_steps) == 2


UNITS = {
    "bernoulli": (Bernoulli(), lambda h, a: a * torch.sigmoid(a * h) * (1 - torch.sigmoid(a * h))),
    "sign of tanh": (nn.Sequential(nn.Tanh(), Signum()), lambda h, a: a * (1 - torch.tanh(a * h) ** 2)),
    "sign": (Signum(), lambda h, a: a * (1 - torch.tanh(a * h) ** 2)),
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("partition", ["leaf", 1])
def test_the_annealed_slope_equals_its_transcription(unit, partition):
    module, derivative = UNITS[unit]
    model = nn.Sequential(nn.Linear(5, 7), module, nn.Linear(7, 3)).double()
    x, y = torch.randn(9, 5, dtype=DOUBLE), torch.randint(3, (9,))
    rule = Backprop(estimator="slope-annealed", slope_growth=0.7, slope_limit=2.0)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition=partition)
    for slope in (1.0, 1.7, 2.0, 2.0):  # from the third step on the lowered graph runs
        local.zero_grad()
        state = torch.get_rng_state()
        F.cross_entropy(local(x), y).backward()
        torch.set_rng_state(state)
        with torch.no_grad():
            h = x @ model[0].weight.T + model[0].bias
            z = module(h)
            e = (torch.softmax(model[2](z), 1) - F.one_hot(y, 3)) / len(x)
            error = (e @ model[2].weight) * derivative(h, slope)
        torch.testing.assert_close(model[0].weight.grad, error.T @ x, rtol=1e-9, atol=1e-12)
    assert local.compiled.execution.not_lowered is None


@pytest.mark.parametrize("estimator", ["slope-annealed", "reinforce"])
def test_slope_and_baseline_are_saved_and_go_on(estimator, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    make = lambda: nn.Sequential(nn.Linear(4, 3), Bernoulli(), nn.Linear(3, 2))  # noqa: E731
    rule = Backprop(estimator=estimator, slope_growth=0.5)
    local = graphlocal.compile(make(), example_inputs=(x,), rule=rule)

    def steps(module: graphlocal.LocalModule, count: int) -> list[Tensor]:
        torch.manual_seed(1)
        for _ in range(count):
            module.zero_grad()
            module.losses = losses = LOSSES(module(x), y)
            losses.mean().backward()
        return [p.grad.clone() for p in module.original.parameters()]

    steps(local, 3)
    local.save(tmp_path / "model.local")
    loaded = graphlocal.load(tmp_path / "model.local", model=make())
    assert loaded.options.rule == rule
    for found, expected in zip(steps(loaded, 2), steps(local, 2), strict=True):
        assert torch.equal(found, expected)
    assert int(loaded.error_weights.estimator_steps) == 5


@pytest.mark.parametrize(
    "options", [{"slope_growth": -1.0}, {"slope_limit": 0.5}, {"baseline": 1.0}, {"baseline": "mean"}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Backprop(**options)


@pytest.mark.parametrize("estimator", ["reinforce", "slope-annealed"])
def test_recomputed_subgraphs_estimate_the_same(estimator):
    """The second run of a subgraph draws the same units, and their scores and slopes count as in the first."""
    x, y = torch.randn(5, 2, dtype=DOUBLE), torch.tensor([0, 1, 2, 1, 0])
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Tiny().double()
        local = graphlocal.compile(model, example_inputs=x, rule=Backprop(estimator=estimator), recompute=recompute)
        step = graphlocal.train_step(local, LOSSES if estimator == "reinforce" else F.cross_entropy,
                                     torch.optim.SGD(model.parameters(), 0.1))  # fmt: skip
        for _ in range(3):
            step(x, y)
        found.append([p.detach().clone() for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_the_annealed_slope_grows_in_an_exported_step_too(tmp_path):
    from graphlocal.targets.onnx.trainer import OnnxTrainer

    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Signum(), nn.Linear(3, 2))
    rule = Backprop(estimator="slope-annealed", slope_growth=0.5)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule)
    optimizer = torch.optim.SGD(local.parameters(), 0.1)
    local.export(tmp_path / "step.onnx", kind="training-step", loss_fn=F.cross_entropy, optimizer=optimizer, y=y)
    trainer = OnnxTrainer(tmp_path / "step.onnx")
    step = graphlocal.train_step(local, F.cross_entropy, optimizer)
    for _ in range(4):
        torch.testing.assert_close(torch.as_tensor(trainer.step(x, y)).squeeze(), step(x, y), rtol=1e-5, atol=1e-6)
    assert int(trainer.state_dict()["error_weights.estimator_steps"]) == 4
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model_state()[name], parameter.detach(), rtol=1e-5, atol=1e-6)
