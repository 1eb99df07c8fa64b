"""Local Propagation: its equations on an MLP, the sample store at work, its refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_lp_zoo import compiled
from torch import Tensor, nn, optim
from torch.nn import functional as F

import graphlocal
import zoo
from graphlocal.data import load
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules import LP
from graphlocal.rules.lp import variables

# Equations


def plain_lp(weights: list[Tensor], x0: Tensor, y: Tensor, z: list[Tensor], lam: list[Tensor], rule: LP) -> Any:
    """One visit of a batch, tanh layers and a linear output without biases, derivatives by hand: (grads, z, lam)."""
    grads = []
    for _ in range(rule.inner_steps):
        below = [x0, *z]
        pre = [b @ w.T for b, w in zip(below, weights, strict=True)]
        residual = [v - torch.tanh(h) for v, h in zip(z, pre[:-1], strict=True)]
        if rule.epsilon:
            size = (residual_abs := [r.abs() for r in residual]) and [
                (a - rule.epsilon).clamp(min=0) for a in residual_abs
            ]
            on = [(r.abs() > rule.epsilon).double() for r in residual]
        else:
            size = [r.abs() for r in residual]
            on = [torch.ones_like(r) for r in residual]
        sign = [r.sign() for r in residual]
        G = size if rule.G == "abs" else [s * g for s, g in zip(size, sign, strict=True)]
        dG = [o * g for o, g in zip(on, sign, strict=True)] if rule.G == "abs" else on
        m = [lv * d + rule.rho * r for lv, d, r in zip(lam, dG, residual, strict=True)]
        up = [-mv * (1 - torch.tanh(h) ** 2) for mv, h in zip(m, pre, strict=False)]  # error at each pre-activation
        up.append(torch.softmax(pre[-1], 1) - F.one_hot(y, pre[-1].shape[1]))
        grads = [e.T @ b / len(y) for e, b in zip(up, below, strict=True)]
        slope = [mv + e @ w for mv, e, w in zip(m, up[1:], weights[1:], strict=True)]
        z = [v - rule.eta_x * s for v, s in zip(z, slope, strict=True)]
        lam = [lv + rule.eta_lambda * g for lv, g in zip(lam, G, strict=True)]
    return grads, z, lam


RULES = {
    "defaults": LP(),
    "three inner steps": LP(inner_steps=3, eta_x=0.2, eta_lambda=0.1, rho=0.5),
    "abs": LP(G="abs", inner_steps=2),
    "insensitive": LP(epsilon=0.01, inner_steps=2),
    "insensitive abs": LP(G="abs", epsilon=0.02, inner_steps=2),
    "from zeros": LP(x0="zeros"),
}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b, bias=False), *([nn.Tanh()] if i < len(widths) - 2 else [])]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("name", RULES)
def test_three_epochs_equal_the_equations_on_an_mlp(name):
    rule = RULES[name]
    model = mlp(6, 8, 7, 4)
    weights = [p.detach().clone() for p in model.parameters()]
    data, labels = torch.randn(6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    local = graphlocal.compile(model, example_inputs=(data[:2],), rule=rule)
    step = graphlocal.train_step(local, F.cross_entropy, optim.SGD(local.parameters(), 0.5))
    kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for epoch in range(3):
        for index in torch.randperm(6, generator=torch.Generator().manual_seed(epoch)).split(3):
            x, y = data[index], labels[index]
            rows = []
            for i, one in zip(index.tolist(), x, strict=True):
                z = [torch.tanh(one @ weights[0].T)]
                z.append(torch.tanh(z[0] @ weights[1].T))
                if rule.x0 == "zeros":
                    z = [torch.zeros_like(v) for v in z]
                rows.append(kept.get(i, (z, [torch.zeros_like(v) for v in z])))
            z, lam = ([torch.stack([row[k][v] for row in rows]) for v in range(2)] for k in range(2))
            grads, z, lam = plain_lp(weights, x, y, z, lam, rule)
            weights = [w - 0.5 * g for w, g in zip(weights, grads, strict=True)]
            for k, i in enumerate(index.tolist()):
                kept[i] = [v[k] for v in z], [v[k] for v in lam]
            step(x, y, index=index)
    for found, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-9)
    _, rows = step.memory["store"].read(torch.arange(6))
    for v, name in enumerate(("tanh", "tanh_1")):
        for kind, part in (("x", 0), ("lambda", 1)):
            expected = torch.stack([kept[i][part][v] for i in range(6)])
            torch.testing.assert_close(rows[f"{kind} {name}"], expected, rtol=1e-9, atol=1e-9)


def test_the_variables_of_a_deep_net_stay_near_what_it_computes():
    """With looser constraints they fit the labels by themselves: 55 % of these samples right by the forward pass."""
    torch.manual_seed(0)
    model = mlp(64, *[32] * 8, 10).float()
    for parameter in model.parameters():
        nn.init.xavier_uniform_(parameter)
    data = load("digits")
    x, y = data.train_x[:200].flatten(1), data.train_y[:200]
    local = graphlocal.compile(model, example_inputs=(x[:2],), rule="lp", partition="leaf")
    step = graphlocal.train_step(local, F.cross_entropy, optim.Adam(local.parameters(), 1e-3))
    for _ in range(60):
        for index in torch.randperm(200).split(50):
            step(x[index], y[index], index=index)
    on_variables = step(x, y, index=torch.arange(200))
    with torch.no_grad():
        logits = model(x)
    assert F.cross_entropy(logits, y) < 2 * on_variables
    assert (logits.argmax(1) == y).double().mean() > 0.85


def test_the_loss_is_that_of_the_output_on_the_variables():
    model = mlp(6, 8, 4)
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 2])
    local = graphlocal.compile(model, example_inputs=(x,), rule="lp")
    step = graphlocal.train_step(local, F.cross_entropy, optim.SGD(local.parameters(), 0.0))
    index = torch.tensor([4, 1, 2])
    torch.testing.assert_close(step(x, y, index=index), F.cross_entropy(model(x), y))
    kept = step.memory["store"].read(index)[1]["x tanh"]
    torch.testing.assert_close(step(x, y, index=index), F.cross_entropy(model[2](kept), y))


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "nested_output", "called_twice", "small_resnet"])
def test_the_order_of_the_subgraphs_changes_nothing(name):
    """No subgraph waits for another: in any order, and bit for bit, the same variables and gradients."""
    model = zoo.MODELS[name]
    inputs = model.example(torch.float64)
    ours, theirs = (compiled(model, LP(inner_steps=3), partition="leaf") for _ in range(2))
    results = []
    for local, order in ((ours, slice(None)), (theirs, slice(None, None, -1))):
        engine = local.compiled.engine
        engine.order = engine.order[order]
        step = graphlocal.train_step(local, lambda out, y: model.loss(out), optim.SGD(local.parameters(), 0.1))
        for _ in range(3):
            step(inputs, None, index=torch.arange(len(inputs[0])))
        results.append((dict(local.original.named_parameters()), step.memory["store"]._rows))
    assert len(ours.graph.subgraphs) > 2
    assert torch.equal(results[0][1], results[1][1])
    for key, value in results[0][0].items():
        assert torch.equal(value, results[1][0][key]), key


def test_samples_do_not_see_each_other():
    """A sample's variables are the same whatever else is in its batches, if the weights stand still."""
    model = zoo.MODELS["transformer_encoder"]
    data = zoo.normal(6, 5, 8).double()
    rows = []
    for batches in ([[0, 1, 2], [3, 4, 5]], [[5, 3], [0, 4, 2, 1]]):
        local = compiled(model, LP(inner_steps=2), partition="leaf")
        step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.0))
        for batch in (*batches, *batches):
            step(data[batch], torch.tensor(batch) % 4, index=torch.tensor(batch))
        rows.append(step.memory["store"].read(torch.arange(6))[1])
    assert len(rows[0]) > 10
    for name, row in rows[0].items():
        torch.testing.assert_close(row, rows[1][name], rtol=1e-9, atol=1e-9, msg=name)


def loss_of_labels(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y)


def test_integers_and_values_of_parameters_alone_have_no_variables():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(11, 6), nn.Parameter(torch.randn(3))
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.mix.softmax(0)
            z = torch.tanh(self.first(self.embed(x)).mean(1)) * weights[0]
            return self.head(z * weights[1])

    model = Tokens().double()
    x = zoo.tokens(3, 5)
    local = graphlocal.compile(model, example_inputs=(x,), rule="lp", partition="leaf")
    known = variables(local.graph)
    crossing = set(local.graph.readers)
    assert "softmax" in crossing
    assert "softmax" not in known
    assert "x" not in known
    kinds = {c.value: c.exact for c in local.graph.connections if c.kind == "vjp"}
    assert kinds == {v: v == "softmax" for v in kinds}
    step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        step(x, torch.tensor([0, 1, 2]), index=torch.arange(3))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_heads_folded_into_the_batch_and_a_batch_on_the_second_axis_are_each_samples_own():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.first(x)).view(-1, 2)  # two halves a sample, folded into the batch
            z = torch.tanh(self.second(z)).view(-1, 4).t()  # samples on the second axis
            return self.head(z.t())

    x = torch.randn(3, 4)
    local = graphlocal.compile(Folded(), example_inputs=(x,), rule="lp", partition=lambda op: op.name)
    step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
    step(x, torch.tensor([0, 1, 2]), index=torch.tensor([4, 0, 2]))
    axes = step.memory["axes"].values
    assert (0, (1, 2, 2)) in axes.values()
    assert any(axis == 1 for axis, _ in axes.values())
    step(x[:2], torch.tensor([0, 1]), index=torch.tensor([4, 1]))


# Learning in other settings


def test_float32_bfloat16_and_a_mixed_model_train():
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        x = torch.randn(3, 6).to(dtype)
        local = graphlocal.compile(model, example_inputs=(x,), rule="lp")
        step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
        for _ in range(3):
            step(x, torch.tensor([0, 1, 2]), index=torch.arange(3))
        assert step.memory["store"].dtype == torch.float32
        assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())


def test_an_mlp_learns_the_digits():
    from graphlocal.data import load

    data = load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule="lp")
    step = graphlocal.train_step(local, F.cross_entropy, optim.Adam(local.parameters(), 3e-3))
    order = torch.Generator().manual_seed(0)
    for _ in range(8):
        for i in torch.randperm(len(data.train_x), generator=order).split(64):
            step(data.train_x[i], data.train_y[i], index=i)
    local.eval()
    with torch.no_grad():
        correct = (local(data.test_x).argmax(1) == data.test_y).double().mean()
    assert correct > 0.9


def test_the_same_seed_gives_the_same_run():
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        model = mlp(6, 8, 7, 4)
        x, y = torch.randn(3, 6).double(), torch.tensor([0, 1, 2])
        local = graphlocal.compile(model, example_inputs=(x,), rule="lp")
        step = graphlocal.train_step(local, loss_of_labels, optim.Adam(local.parameters(), 0.1))
        losses = [step(x, y, index=torch.arange(3)) for _ in range(5)]
        ends.append((losses, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


# Refusals


def small_step(rule: Any = "lp") -> tuple[graphlocal.LocalModule, Any, Tensor, Tensor]:
    local = graphlocal.compile(mlp(6, 8, 4), example_inputs=(torch.randn(3, 6).double(),), rule=rule)
    step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
    return local, step, torch.randn(3, 6).double(), torch.tensor([0, 1, 2])


def test_the_drop_in_path_says_how_to_train():
    local, _, x, _ = small_step()
    with pytest.raises(InputError, match=r"loss.backward.*\n.*\n.*train_step.*index=i"):
        local(x)
    with torch.no_grad():
        torch.testing.assert_close(local(x), local.original(x))
    with pytest.raises(InputError, match="lp"):
        local.training_graph  # noqa: B018


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "needs the numbers of the samples"),
        ([0, 1, 2], "index is no vector"),
        (torch.tensor([[0], [1], [2]]), "index is no vector"),
        (torch.tensor([0.0, 1.0, 2.0]), "index is a torch.float32"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "index is a torch.int32"),
        (torch.tensor([0, 1, -1]), "the sample -1"),
        (torch.tensor([0, 1, 10]), "the sample 10"),
        (torch.tensor([0, 1, 1]), "the sample 1 more than once"),
        (torch.tensor([0, 1]), "no input has an axis of that size"),
    ],
)
def test_bad_indices_are_refused_and_change_nothing(index, words):
    local, step, x, y = small_step(LP(samples=10))
    before = [p.detach().clone() for p in local.parameters()]
    with pytest.raises(InputError, match=words):
        step(x, y, index=index)
    torch.testing.assert_close([p.detach() for p in local.parameters()], before, rtol=0, atol=0)


def test_other_batches_must_fit_the_first():
    _, step, x, y = small_step()
    step(x, y, index=torch.arange(3))
    with pytest.raises(InputError, match="index numbers 2 samples, but an input of shape"):
        step(x, y, index=torch.arange(2))
    step(x[:1], y[:1], index=torch.tensor([7]))
    _, step, x, y = small_step()
    with pytest.raises(InputError, match="the first batch holds one sample"):
        step(x[:1], y[:1], index=torch.tensor([7]))


def test_samples_of_another_size_are_refused():
    model = zoo.MODELS["transformer_encoder"]
    local = compiled(model, "lp")
    step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
    step(zoo.normal(3, 5, 8).double(), torch.tensor([0, 1, 2]), index=torch.arange(3))
    with pytest.raises(InputError, match="pad all samples to one size"):
        step(zoo.normal(3, 7, 8).double(), torch.tensor([0, 1, 2]), index=torch.arange(3))


@pytest.mark.parametrize("name", ["dropout_mlp", "transformer_dropout", "small_resnet", "moving_average"])
def test_what_breaks_sample_identity_is_refused_by_name_and_place(name):
    model = zoo.MODELS[name]
    op = {"small_resnet": "batch_norm.*GroupNorm", "moving_average": "mean"}.get(name, "random numbers")
    with pytest.raises(InputError, match=rf"(?s)can't train through.*{op}|{op}.*eval\(\)") as caught:
        graphlocal.compile(model.make(), example_inputs=model.example(), rule="lp")
    assert ".py:" in caught.value.where


def test_a_batchnorm_put_back_to_training_is_refused_at_the_next_step():
    local = compiled(zoo.MODELS["small_resnet"], "lp")
    step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
    x, y = zoo.normal(3, 2, 8, 8).double(), torch.tensor([0, 1, 2])
    step(x, y, index=torch.arange(3))
    local.train()
    with pytest.raises(InputError, match="batch_norm"):
        step(x, y, index=torch.arange(3))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head(torch.tanh(z - z.mean(0)))


def test_a_model_that_mixes_samples_is_refused():
    x = torch.randn(3, 6)
    local = graphlocal.compile(Centred(), example_inputs=(x,), rule="lp")
    step = graphlocal.train_step(local, loss_of_labels, optim.SGD(local.parameters(), 0.1))
    with pytest.raises(InputError, match="mixes samples"):
        step(x, torch.tensor([0, 1, 2]), index=torch.arange(3))


@pytest.mark.parametrize(
    "options",
    [
        {"G": "square"}, {"x0": "noise"}, {"store": "disk"}, {"eta_x": -1}, {"rho": float("nan")}, {"epsilon": "a"},
        {"inner_steps": 0}, {"inner_steps": None}, {"samples": 0}, {"max_bytes": 1.5}, {"store": "mmap"},
        {"path": "somewhere"},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=r"LP\("):
        LP(**options)


def test_the_graph_shows_messages_and_no_schedule():
    text = str(small_step()[0].graph)
    assert "rule: LP()" in text
    assert "2 -> 0 : tanh" in text
    assert "schedule" not in text


# The store


def test_a_store_on_disk_equals_one_in_memory_and_is_gone_on_with(tmp_path):
    results = []
    for rule in (LP(), LP(store="mmap", path=tmp_path / "variables.bin"), LP(samples=9)):
        torch.manual_seed(1)
        local, step, x, y = small_step(rule)
        for index in (torch.arange(3), torch.tensor([8, 0, 3]), torch.arange(3)):
            step(x, y, index=index)
        results.append(([p.detach() for p in local.parameters()], step.memory["store"].read(torch.arange(9))))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)
    _, step, x, y = small_step(LP(store="mmap", path=tmp_path / "variables.bin"))
    before = step.memory
    step(x, y, index=torch.tensor([6, 7, 5]))
    assert before["store"].read(torch.arange(9))[0].tolist() == [i != 4 for i in range(9)]
    kept = before["store"].read(torch.tensor([8]))[1]["lambda tanh"]
    torch.testing.assert_close(kept, results[0][1][1]["lambda tanh"][8:], rtol=0, atol=0)


def test_a_bound_on_memory_names_what_is_needed():
    _, step, x, y = small_step(LP(max_bytes=1000, samples=50))
    with pytest.raises(InputError, match=r"50 samples take 6.6 KiB.*\n.*136 bytes.*\n.*store='mmap'"):
        step(x, y, index=torch.arange(3))
    _, step, x, y = small_step(LP(max_bytes=1000))
    step(x, y, index=torch.arange(3))
    assert step.memory["store"].bytes == 3 * 136
    assert "3 samples x 136 bytes = 408 bytes in memory" in repr(step.memory["store"])
    with pytest.raises(InputError, match="8 samples take"):
        step(x, y, index=torch.tensor([0, 1, 7]))
    step(x, y, index=torch.tensor([0, 1, 6]))


def test_a_copy_of_a_compiled_model_trains():
    local, _, x, y = small_step()
    other = copy.deepcopy(local)
    step = graphlocal.train_step(other, loss_of_labels, optim.SGD(other.parameters(), 0.1))
    step(x, y, index=torch.arange(3))
    assert replace(LP(), rho=2.0) != LP()


def test_variables_that_run_away_are_reported_and_not_kept():
    _, step, x, y = small_step(LP(eta_x=1e200))
    index = torch.arange(3)
    step(x, y, index=index)
    with pytest.raises(LocalTrainingError, match="lower eta_x"):
        step(x, y, index=index)
    assert all(row.isfinite().all() for row in step.memory["store"].read(index)[1].values())
