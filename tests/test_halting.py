"""Variable-depth credit assignment: samples whose local loss is small send no error further down."""

from __future__ import annotations

import pytest
import torch
from any_model import any_model, assert_updates
from test_lra_diff import normalized, perceptron
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.feedback import weight_names
from graphlocal.rules import LRADiff, LRAFeedback
from graphlocal.targets import halting

DOUBLE = torch.float64
WHOLE = {"feedback_share": 10.0, "feedback_total": 10.0}
LOSSES = {
    "cauchy": (lambda u: torch.log(1 + u * u), lambda u: 2 * u / (1 + u * u)),
    "l2": (lambda u: u * u / 2, lambda u: u),
    "l1": (torch.abs, torch.sign),
}


def by_hand(model: nn.Sequential, x: Tensor, rule: LRADiff | LRAFeedback, maps: dict[int, Tensor]
            ) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """Sample by sample, for the loss mean(y^2); maps: E of the layer below each layer. And the mean depth."""
    updates = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    value, derivative = LOSSES[rule.local_loss]
    weights = [model[layer].weight.detach() for layer in (0, 2, 4)]
    depth = 0
    for row in x:
        z, h = [row], []
        for number, weight in enumerate(weights):
            h.append(weight @ z[-1] + model[2 * number].bias.detach())
            z.append(h[-1] if number == 2 else torch.tanh(h[-1]))
        error = 2 * z[3] / 3
        loss = (error**2).sum() / 2
        for number in (2, 1, 0):
            depth += 1
            updates[f"{2 * number}.weight"] += torch.outer(error, z[number]) / len(x)
            updates[f"{2 * number}.bias"] += error / len(x)
            if number == 0 or loss < rule.epsilon:
                break
            slope = 1 - z[number] ** 2
            d = (weights[number].T @ error) * slope if isinstance(rule, LRADiff) else maps[number] @ error
            u = z[number] - torch.tanh(h[number - 1] - rule.beta * normalized(d, rule.c2))
            error, loss = derivative(u) * slope, value(u).sum()
    return {name: normalized(update, rule.c1) for name, update in updates.items()}, depth / len(x)


def maps_of(local: graphlocal.LocalModule) -> dict[int, Tensor]:
    names = weight_names(local.graph)
    found = [c for c in local.graph.connections if c.kind == "feedback"]
    return {int(c.source) // 2: getattr(local.error_weights, names[c.name][0]) for c in found}


@pytest.mark.parametrize("epsilon", [1e-9, 0.02, 0.3, 100.0])
@pytest.mark.parametrize("local_loss", list(LOSSES))
@pytest.mark.parametrize("kind", [LRADiff, LRAFeedback])
def test_updates_and_depth_equal_the_transcription(kind, local_loss, epsilon):
    model, x = perceptron(), torch.randn(12, 5, dtype=DOUBLE)
    more = {**WHOLE, "rescale": None} if kind is LRAFeedback else {}
    rule = kind(local_loss=local_loss, epsilon=epsilon, beta=0.5, **more)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    local(x).square().mean().backward()
    expected, depth = by_hand(model, x, rule, maps_of(local))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-13, msg=name)
    assert local.credit_depth == pytest.approx(depth)


SEPARABLE = [zoo.MODELS[name] for name in ("deep_mlp", "convnext", "siamese", "squeeze_excite")]


def uneven(output: Tensor) -> Tensor:
    """The loss of each sample is a hundredth of that of the one before."""
    weights = 100.0 ** -torch.arange(len(output), dtype=output.dtype)
    return (output.reshape(len(output), -1).square().sum(1) * weights).mean()


BY_DERIVATIVES = LRADiff(epsilon=1e-3, local_loss="l2", c1=None)
BY_FEEDBACK = LRAFeedback(epsilon=1e-3, c1=None)
RULES = [*((model, BY_DERIVATIVES) for model in SEPARABLE), (SEPARABLE[0], BY_FEEDBACK)]


@pytest.mark.parametrize(("model", "rule"), RULES, ids=lambda x: x.name)
def test_rows_alone_give_the_updates_of_zeros_in_the_errors_of_the_others(model, rule, monkeypatch):
    used = []
    on_rows = halting.RowsUpdate._on_rows
    monkeypatch.setattr(halting.RowsUpdate, "_on_rows", lambda *args: used.append(on_rows(*args)) or used[-1])
    found = []
    for worth in (1.0, -1.0):
        monkeypatch.setattr(halting, "WORTH", worth)
        local = graphlocal.compile(model.make(DOUBLE), example_inputs=model.example(DOUBLE), rule=rule)
        found.append(step(local, model.example(DOUBLE), uneven))
    assert used
    assert all(result is not None for result in used)
    assert local.credit_depth % 1
    assert_same_gradients(found[0].gradients, found[1].gradients)


def test_samples_that_meet_inside_a_subgraph_stay_together():
    """A difference from the batch's mean gives other results on some rows alone; they are not used."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.softmax(self.second(torch.tanh(self.first(x))), 0))

    torch.manual_seed(0)
    model, x = Centred().double(), torch.randn(6, 5, dtype=DOUBLE)
    updates = []
    for worth in (1.0, -1.0):
        rule = LRADiff(epsilon=1e-4, c1=None)
        local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(halting, "WORTH", worth)
            updates.append(step(local, (x,), uneven).gradients)
        assert local.credit_depth % 1
    assert_same_gradients(updates[0], updates[1])


class Multiplications(TorchDispatchMode):
    """Counts those of matrix products."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return operator(*args, **(kwargs or {}))


def work_of(local: graphlocal.LocalModule, x: Tensor) -> int:
    loss = local(x).square().sum(1).mul(torch.linspace(0, 1, len(x))).mean()
    with Multiplications() as counter:
        loss.backward()
    return counter.count


@pytest.mark.parametrize("kind", [LRADiff, LRAFeedback])
def test_work_is_left_out_where_samples_stop(kind):
    torch.manual_seed(0)
    layers = [
        nn.Linear(20, 64),
        nn.Tanh(),
        *(m for _ in range(3) for m in (nn.Linear(64, 64), nn.Tanh())),
        nn.Linear(64, 8),
    ]
    model, x = nn.Sequential(*layers), torch.randn(32, 20)
    work, depth = {}, {}
    for epsilon in (1e-12, 0.05, 1e9):
        local = graphlocal.compile(model, example_inputs=(x,), rule=kind(epsilon=epsilon), partition="leaf")
        work[epsilon], depth[epsilon] = work_of(local, x), local.credit_depth
    full = work_of(graphlocal.compile(model, example_inputs=(x,), rule=kind(), partition="leaf"), x)
    assert work[1e9] < work[0.05] < 0.9 * full
    assert depth[1e9] == 1


@pytest.mark.parametrize("kind", [LRADiff, pytest.param(LRAFeedback, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("model", any_model("unused"))
def test_on_any_model_a_small_threshold_stops_nothing_and_a_large_one_everything(model, kind):
    example = model.example(DOUBLE)
    results = {}
    for epsilon in (None, 1e-300, 1e300):
        torch.manual_seed(0)
        rule = kind(epsilon=epsilon)
        local = graphlocal.compile(model.make(DOUBLE), example_inputs=example, rule=rule)
        results[epsilon] = step(local, example, model.loss), local
    full, same, none = (results[epsilon][0] for epsilon in (None, 1e-300, 1e300))
    assert_same_forward(same, full)
    assert_same_forward(none, full)
    assert_updates(full, same)
    assert results[1e300][1].credit_depth <= results[1e-300][1].credit_depth <= len(local.graph.error_neurons)


@pytest.mark.parametrize("fused", [False, True], ids=["drop-in", "train_step"])
def test_depth_falls_while_a_model_learns(fused):
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(32, 5, dtype=DOUBLE)
    y = model(x).detach().roll(1, 1)
    local = graphlocal.compile(model, example_inputs=(x,), rule=LRADiff(epsilon=0.01, c1=None), partition="leaf")
    optimizer = torch.optim.Adam(local.parameters(), 1e-2)
    fused_step = graphlocal.train_step(local, nn.functional.mse_loss, optimizer)
    depths = []
    for _ in range(150):
        if fused:
            fused_step(x, y)
        else:
            nn.functional.mse_loss(local(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        depths.append(local.credit_depth)
    assert depths[-1] < depths[0] - 0.5


def test_a_rule_without_a_threshold_has_no_depth():
    model = zoo.MODELS["mlp"]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="lra-diff")
    with pytest.raises(InputError, match=r"all the way(.|\n)*epsilon"):
        local.credit_depth  # noqa: B018


def test_several_steps_of_the_target_with_a_threshold_are_refused():
    with pytest.raises(InputError, match="one step of the target"):
        LRADiff(steps=2, epsilon=0.1)
