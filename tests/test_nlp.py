"""Nonlinear transforms with local propagation: the equations on an MLP, DAGs, goals, codes and k-NN, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

import graphlocal
import zoo
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules import NLP

CODES = torch.eye(4, dtype=torch.float64)


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):  # noqa: RUF007
        layers += [nn.Linear(before, after, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def soft(q: Tensor, t: float) -> Tensor:
    return torch.where(q > t, q - t, torch.where(q < -t, q + t, torch.zeros_like(q)))


def plain_nlp(weights: list[Tensor], taus: list[float], x: Tensor, y: Tensor, rule: NLP, middle: bool) -> list[Tensor]:
    """One step on linear layers [W b], by hand: the gradient of each, or its ridge solution; zeros where untouched."""
    below, q = [], []
    u = x
    for A, tau in zip(weights, [*taus, 0.0], strict=True):
        below.append(torch.cat([u, torch.ones(len(u), 1, dtype=u.dtype)], 1))
        q.append(below[-1] @ A.T)
        u = soft(q[-1], tau)
    codes = [soft(h, t) for h, t in zip(q, [*taus, 0.0], strict=True)]
    found = [torch.zeros_like(A) for A in weights]
    top = len(weights) - (2 if middle else 1)
    error = None
    for v in range(top, -1, -1):
        if v == top:
            target = F.pad(CODES[y], (0, q[v].shape[1] - 4))
        else:
            nu = rule.lambda_f * error @ weights[v + 1][:, :-1]
            target = soft(q[v] - nu, rule.lambda_1)
        error = codes[v] - target
        if rule.update == "gradient":
            found[v] = (q[v] - target).T @ below[v] / len(x)
        else:
            U, n = below[v], len(x)
            eye = torch.eye(U.shape[1], dtype=U.dtype)
            best = (target.T @ U / n + rule.mu * weights[v]) @ torch.inverse(U.T @ U / n + rule.mu * eye)
            found[v] = weights[v] + rule.step * (best - weights[v])
    return found


class Padded(graphlocal.ClassCodes):
    """The unit vectors, whatever the number of features."""

    def _first(self, features: int) -> Tensor:
        return F.pad(CODES, (0, features - 4))


RULES = {
    "gradient": NLP(),
    "gradient sparse": NLP(lambda_f=0.7, lambda_1=0.05, keep=0.3),
    "ridge": NLP(update="ridge"),
    "ridge sparse": NLP(update="ridge", lambda_1=0.02, mu=0.3, step=0.8),
}


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_three_steps_equal_the_equations_on_an_mlp(name, middle):
    rule = RULES[name]
    model = mlp(6, 8, 7, 4)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in linear]
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    taus, u = [], x
    for A in weights[:-1]:
        q = u @ A[:, :-1].T + A[:, -1]
        taus.append(float(torch.quantile(q.abs().float(), 1 - rule.keep).double()))
        u = soft(q, taus[-1])
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule)
    goal = Padded(4, node="2" if middle else None)
    optimizer = optim.SGD(local.parameters(), 0.5) if rule.update == "gradient" else None
    step = graphlocal.train_step(local, goal, optimizer)
    for _ in range(3):
        step(x, y)
        found = plain_nlp(weights, taus, x, y, rule, middle)
        top = 2 if middle else 3
        if rule.update == "gradient":
            weights = [A - 0.5 * g for A, g in zip(weights, found, strict=True)]
        else:
            weights = [*found[:top], *weights[top:]]
        for layer, A in zip(linear, weights, strict=True):
            torch.testing.assert_close(layer.weight.detach(), A[:, :-1], rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(layer.bias.detach(), A[:, -1], rtol=1e-8, atol=1e-9)
    kept = [float(local.error_weights.get_buffer(f"threshold_{v}")) for v in ("tanh", "tanh_1")]
    assert kept == pytest.approx(taus, rel=1e-9)


def first_leaf(output: Any, y: Tensor) -> Tensor:
    return zoo.fit(output)


@pytest.mark.parametrize("model", zoo.models(exclude=("torchvision", "language_model_loss", "partly_detached")))
def test_every_kind_of_model_takes_a_step_towards_a_loss(model):
    inputs = model.example(torch.float32)
    local = graphlocal.compile(model.make(), example_inputs=inputs, rule="nlp", partition="leaf")
    head = next(v for v in local.compiled.engine.outputs or local.compiled.engine.hidden)
    before = {name: p.detach().clone() for name, p in local.original.named_parameters()}
    step = graphlocal.train_step(local, first_leaf, optim.SGD(local.parameters(), 0.01))
    step(inputs, None)
    learned = {name for name, p in local.original.named_parameters() if not torch.equal(p, before[name])}
    owner = local.graph.subgraph[local.graph.owner[head]]
    assert all(p.isfinite().all() for p in local.parameters())
    assert learned or not local.graph.trainable(owner)


def test_a_model_that_divides_by_a_code_is_told_so():
    """A threshold makes zeros where the model's own tail, here 1 + h, does not."""
    model = zoo.MODELS["partly_detached"]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="nlp", partition="leaf")
    step = graphlocal.train_step(local, first_leaf, optim.SGD(local.parameters(), 0.01))
    with pytest.raises(LocalTrainingError, match="the loss is not a number"):
        step(model.example(), None)


def test_the_messages_of_all_readers_add_up():
    """On a node with two readers, nu is lambda_f times the sum of their VJPs; with tau = 0 and lambda_1 = 0."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.stem(x)
            return self.left(z), self.right(z)

    model = Forked().double()
    x = torch.randn(7, 5, dtype=torch.float64)
    rule = NLP(keep=1.0, lambda_f=1.0)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    local.error_weights.get_buffer("threshold_linear").zero_()
    true = copy.deepcopy(model)
    zoo.fit(true(x)).backward()
    step = graphlocal.train_step(local, first_leaf, optim.SGD(local.parameters(), 1.0))
    step(x, None)
    for (name, p), q in zip(model.named_parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (q - q.grad).detach(), rtol=1e-9, atol=1e-9, msg=name)


def test_without_a_message_factor_hidden_nodes_keep_still():
    model = mlp(6, 8, 7, 4)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    local = graphlocal.compile(model, example_inputs=(x,), rule=NLP(lambda_f=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    step = graphlocal.train_step(local, graphlocal.ClassCodes(4), optim.SGD(local.parameters(), 0.1))
    losses = [float(step(x, y)) for _ in range(20)]
    changed = [not torch.allclose(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [False] * 4 + [True] * 2
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("update", ["gradient", "ridge"])
def test_asynchronous_steps_update_the_drawn_subgraphs_alone(update):
    model = mlp(6, 8, 8, 8, 4)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    local = graphlocal.compile(model, example_inputs=(x,), rule=NLP(update=update, asynchronous=0.5))
    optimizer = optim.SGD(local.parameters(), 0.1) if update == "gradient" else None
    step = graphlocal.train_step(local, graphlocal.ClassCodes(4), optimizer)
    torch.manual_seed(5)
    draws = (torch.rand(20, 4) < 0.5).tolist()
    torch.manual_seed(5)
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    for drawn in draws:
        before = [w.detach().clone() for w in weights]
        step(x, y)
        assert [not torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == drawn
    assert len(step._parts) <= 1 + 8


def test_dynamic_codes_follow_the_classes_and_stay_apart():
    goal = graphlocal.ClassCodes(3, dynamic=True, momentum=0.0, scale=2.0)
    u, y = torch.randn(30, 5), torch.arange(30) % 3
    u[y == 1] += torch.tensor([0.0, 9, 0, 0, 0])
    g = goal(u, y, 1)
    codes = torch.stack([g[y == k][0] for k in range(3)])
    torch.testing.assert_close(codes @ codes.T, 4 * torch.eye(3), atol=1e-4, rtol=1e-4)
    means = torch.stack([u[y == k].mean(0) for k in range(3)])
    assert (codes * means).sum() > max((codes[list(p)] * means).sum() for p in ((1, 0, 2), (2, 1, 0), (0, 2, 1)))


def test_codes_stand_at_every_position_of_a_map():
    goal = graphlocal.ClassCodes(3)
    g = goal(torch.randn(4, 3, 2, 2), torch.tensor([0, 2, 1, 0]), 1)
    assert g.shape == (4, 3, 2, 2)
    assert torch.equal(g[1, :, 1, 0], torch.tensor([0.0, 0, 1]))


def test_goals_at_two_nodes_and_at_a_subgraph_by_name():
    model = mlp(6, 8, 7, 4)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4
    local = graphlocal.compile(model, example_inputs=(x,), rule="nlp")
    goals = [graphlocal.ClassCodes(4, node="tanh"), graphlocal.ClassCodes(4, node="4")]
    step = graphlocal.train_step(local, goals, optim.SGD(local.parameters(), 0.05))
    losses = [float(step(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]


def test_knn_counts_the_neighbours():
    train = torch.tensor([[1.0, 0], [2, 0.1], [1, 0.2], [0, 1], [0.1, 2], [0.2, 1]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    test = torch.tensor([[5.0, 0.1], [0.1, 5], [0.1, 5]])
    assert graphlocal.knn_error(train, labels, test, torch.tensor([0, 1, 1]), k=3) == 0
    assert graphlocal.knn_error(train, labels, test, torch.tensor([0, 1, 0]), k=3) == pytest.approx(100 / 3)
    with pytest.raises(InputError, match="k=7"):
        graphlocal.knn_error(train, labels, test, labels[:3], k=7)
    with pytest.raises(InputError, match="one label"):
        graphlocal.knn_error(train, labels[:5], test, labels[:3])


def test_knn_agrees_with_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    train, test = torch.randn(200, 5).double(), torch.randn(50, 5).double()
    train_y, test_y = torch.randint(3, (200,)), torch.randint(3, (50,))
    theirs = KNeighborsClassifier(5, metric="cosine").fit(train.numpy(), train_y.numpy()).predict(test.numpy())
    expected = 100 * float((torch.tensor(theirs) != test_y).double().mean())
    assert graphlocal.knn_error(train, train_y, test, test_y) == pytest.approx(expected)


def test_codes_of_the_digits_beat_the_untrained_net():
    from graphlocal.data import load

    data = load("digits")
    model = nn.Sequential(nn.Flatten(), *[m for _ in range(3) for m in (nn.LazyLinear(64), nn.Tanh())][:-1])
    model(data.train_x[:2])
    local = graphlocal.compile(model, example_inputs=(data.train_x[:8],), rule=NLP(update="ridge"), partition="leaf")

    def error() -> float:
        codes = [graphlocal.representations(local, x) for x in (data.train_x, data.test_x)]
        return graphlocal.knn_error(codes[0], data.train_y, codes[1], data.test_y)

    before = error()
    step = graphlocal.train_step(local, graphlocal.ClassCodes(10), None)
    for _ in range(8):
        for i in torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0)).split(250):
            step(data.train_x[i], data.train_y[i])
    assert error() < 7 < before


def test_representations_leave_the_model_as_it_was():
    model = zoo.MODELS["small_resnet"]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="nlp")
    x = model.example()[0]
    graphlocal.representations(local, x)  # sets the thresholds
    before = {name: value.clone() for name, value in local.state_dict().items()}
    codes = graphlocal.representations(local, x)
    assert codes.shape == (3, 4)
    for name, value in local.state_dict().items():
        assert torch.equal(value, before[name]), name
    other = graphlocal.compile(model.make(), example_inputs=model.example(), rule="nlp")
    other.load_state_dict(local.state_dict())
    torch.testing.assert_close(graphlocal.representations(other, x), codes)


# Refusals


def small(rule: Any = "nlp", **options: Any) -> tuple[graphlocal.LocalModule, Tensor, Tensor]:
    x = torch.randn(5, 6, dtype=torch.float64)
    return graphlocal.compile(mlp(6, 8, 4), example_inputs=(x,), rule=rule, **options), x, torch.arange(5) % 4


def test_the_drop_in_path_says_how_to_train():
    local, x, _ = small()
    with pytest.raises(InputError, match="train_step"):
        local(x)


@pytest.mark.parametrize("name", ["small_resnet", "tied_weight", "weight_norm", "squeeze_excite"])
def test_ridge_refuses_what_is_no_linear_layer(name):
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule=NLP(update="ridge"))
    with pytest.raises(InputError, match=r"has no ridge update") as caught:
        graphlocal.train_step(local, first_leaf, None)(model.example(), None)
    assert ".py:" in caught.value.where


def test_goals_and_optimizers_are_checked():
    local, x, y = small()
    sgd = optim.SGD(local.parameters(), 0.1)
    with pytest.raises(InputError, match="the optimizer is a NoneType"):
        graphlocal.train_step(local, graphlocal.ClassCodes(4), None)
    with pytest.raises(InputError, match="loss_fn is a int"):
        graphlocal.train_step(local, 3, sgd)
    with pytest.raises(InputError, match="other things than goals"):
        graphlocal.train_step(local, [first_leaf], sgd)
    with pytest.raises(InputError, match=r"there is no node 'tahn'.*tanh"):
        graphlocal.train_step(local, graphlocal.ClassCodes(4, node="tahn"), sgd)(x, y)
    with pytest.raises(InputError, match="a label is not in 0 to 2"):
        graphlocal.train_step(local, graphlocal.ClassCodes(3), sgd)(x, y)
    with pytest.raises(InputError, match=r"the labels are a torch.float32"):
        graphlocal.train_step(local, graphlocal.ClassCodes(4), sgd)(x, torch.randn(5))
    other, _, _ = small("backprop")
    with pytest.raises(InputError, match="learns from a loss"):
        graphlocal.train_step(other, graphlocal.ClassCodes(4), optim.SGD(other.parameters(), 0.1))
    with pytest.raises(InputError, match="rule='nlp'"):
        graphlocal.representations(other, x)


@pytest.mark.parametrize(
    "options",
    [{"update": "newton"}, {"lambda_f": -1}, {"keep": 0}, {"keep": 1.5}, {"mu": 0}, {"step": 2}, {"asynchronous": 0},
     {"lambda_1": float("nan")}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=r"NLP\("):
        NLP(**options)


@pytest.mark.parametrize("options", [{"classes": 1}, {"classes": 3, "scale": 0}, {"classes": 3, "momentum": 1.0}])
def test_class_codes_out_of_range_are_refused(options):
    with pytest.raises(InputError, match="ClassCodes"):
        graphlocal.ClassCodes(**options)
