"""rec-LRA against the plain transcriptions of Algorithms 1 and 2, and what follows from its equations."""

from __future__ import annotations

import math
from itertools import product

import pytest
import reference
import torch
from reference import ACTIVATIONS, Settings
from torch import Tensor, nn
from torch.nn import functional as F
from training import assert_same_gradients

import graphlocal
import zoo
from graphlocal.feedback import weight_names
from graphlocal.rules import RecLRA

DOUBLE = torch.float64
EXACT = {"rtol": 1e-12, "atol": 1e-14}
MODULES = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}
WHOLE = {"feedback_share": 1e6, "feedback_total": 1e6}  # no low-rank E, however small the model


def problem() -> tuple[Tensor, Tensor]:
    return zoo.vectors()[0].double(), torch.tensor([2, 0, 3])


def rule(settings: Settings, **options) -> RecLRA:
    """The rule with the settings of a transcription."""
    return RecLRA(
        beta=settings.beta,
        rescale="rms" if settings.rescale else None,
        derivative=settings.derivative,
        reprojection=settings.clip,
        error_weights=settings.error_update or "fixed",
        gamma=settings.gamma,
        **WHOLE,
        **options,
    )


def compiled(module: nn.Module, x: Tensor, rule: RecLRA, **options) -> graphlocal.LocalModule:
    return graphlocal.compile(module, example_inputs=(x,), rule=rule, **options)


def maps(local: graphlocal.LocalModule, kind: str = "data") -> dict[str, Tensor]:
    """E (or its `grad`) of each skip-error, by the subgraph at which it ends."""
    names = weight_names(local.graph)
    weights = local.error_weights.state_dict(keep_vars=True)
    feedback = [connection for connection in local.graph.connections if connection.kind == "feedback"]
    assert all(len(names[connection.name]) == 1 for connection in feedback)
    return {connection.target: getattr(weights[names[connection.name][0]], kind) for connection in feedback}


def local_gradients(local: graphlocal.LocalModule, x: Tensor, labels: Tensor, **loss) -> dict[str, Tensor]:
    local.zero_grad()
    F.cross_entropy(local(x), labels, **loss).backward()
    return {name: parameter.grad for name, parameter in local.original.named_parameters()}


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return zoo.layers(*sizes, activation=activation).double()


# Algorithm 1


def assert_algorithm_1(activation: str, settings: Settings, sizes: tuple[int, ...] = (6, 8, 5, 7, 4)) -> None:
    x, labels = problem()
    module = mlp(*sizes, activation=MODULES[activation])
    local = compiled(module, x, rule(settings))
    linears = [module[i] for i in range(0, len(module), 2)]
    error_weights = [maps(local)[str(2 * i)] for i in range(len(linears) - 1)]
    expected = reference.mlp_rec_lra(
        [layer.weight.detach() for layer in linears],
        [layer.bias.detach() for layer in linears],
        error_weights,
        x,
        labels,
        settings,
    )
    local_gradients(local, x, labels)
    found = {f"W{i}": layer.weight.grad for i, layer in enumerate(linears, 1)}
    found |= {f"b{i}": layer.bias.grad for i, layer in enumerate(linears, 1)}
    if settings.error_update:
        found |= {f"E{i}": maps(local, "grad")[str(2 * (i - 1))] for i in range(1, len(linears))}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("error_update", [None, "kp", "literal"])
@pytest.mark.parametrize(("rescale", "derivative"), list(product([True, False], repeat=2)))
@pytest.mark.parametrize("clip", [None, 0.05])
def test_update_equals_algorithm_1_on_an_mlp(activation, error_update, rescale, derivative, clip):
    settings = Settings(activation, 0.1, rescale, derivative, clip, error_update, gamma=0.3)
    assert_algorithm_1(activation, settings)


@pytest.mark.parametrize("beta", [1e-3, 0.5, 10.0])
def test_update_equals_algorithm_1_for_any_beta(beta):
    assert_algorithm_1("tanh", Settings(beta=beta))


@pytest.mark.parametrize("partition", ["leaf", 4])
def test_other_partitions_of_an_mlp_are_the_same_algorithm(partition):
    x, labels = problem()
    found = []
    for policy in ("auto", partition):
        torch.manual_seed(0)
        local = compiled(mlp(6, 8, 5, 7, 4), x, rule(Settings()), partition=policy)
        found.append(local_gradients(local, x, labels))
    assert_same_gradients(found[1], found[0])


def test_float32_keeps_four_digits_of_algorithm_1():
    x, labels = problem()
    found = []
    for dtype in (torch.float32, DOUBLE):
        torch.manual_seed(0)
        local = compiled(mlp(6, 8, 5, 7, 4).to(dtype), x.to(dtype), rule(Settings()))
        for weight in local.error_weights.buffers():
            weight.copy_(weight.float())
        found.append({name: g.double() for name, g in local_gradients(local, x.to(dtype), labels).items()})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


# Algorithm 2


@pytest.mark.parametrize("depth", [1, 2, 64])
@pytest.mark.parametrize("error_update", [None, "kp", "literal"])
@pytest.mark.parametrize(
    ("rescale", "derivative", "clip"), [(True, False, None), (False, True, None), (True, True, 0.05)]
)
def test_update_equals_algorithm_2_on_a_residual_mlp(depth, error_update, rescale, derivative, clip):
    x, labels = problem()
    module = zoo.ResidualMLP(blocks=3).double()
    settings = Settings("tanh", 0.1, rescale, derivative, clip, error_update, gamma=0.3)
    local = compiled(module, x, rule(settings, depth=depth))
    error_weights = {name.removesuffix(".outer"): weight for name, weight in maps(local).items()}
    inner = {f"blocks.{b}.inner" for b in range(3)} if depth > 1 else set()
    assert set(error_weights) == {"stem", "blocks.0", "blocks.1", "blocks.2"} | inner
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    expected = reference.residual_rec_lra(parameters, error_weights, 3, x, labels, settings, depth=min(depth, 2))
    found = local_gradients(local, x, labels)
    if error_update:
        found |= {f"E.{name.removesuffix('.outer')}": value for name, value in maps(local, "grad").items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_connections_carry_the_recursion_depth_that_drew_them():
    x, _ = problem()
    graph = compiled(zoo.ResidualMLP(blocks=2).double(), x, rule(Settings(), depth=2)).graph
    drawn = {c.target: (c.source, c.depth) for c in graph.connections if c.kind == "feedback"}
    assert drawn == {
        "stem": ("head", 1),
        "blocks.0.outer": ("head", 1),
        "blocks.0.inner": ("blocks.0.outer", 2),
        "blocks.1.outer": ("head", 1),
        "blocks.1.inner": ("blocks.1.outer", 2),
    }


# What follows from the equations


def angle(a: Tensor, b: Tensor) -> float:
    cosine = F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0)
    return math.degrees(math.acos(float(cosine)))


def test_kp_turns_error_weights_towards_the_forward_weights():
    """With one hidden layer E gets the transposed updates of W_2, and weight decay forgets where they began."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=DOUBLE)
    labels = (x @ torch.randn(6, 4, generator=generator, dtype=DOUBLE)).argmax(1)
    module = mlp(6, 12, 4)
    local = compiled(module, x, RecLRA(error_weights="kp", beta=1.0, **WHOLE))
    optimizer = torch.optim.SGD(local.parameters(), 0.5, weight_decay=0.01)
    angles = []
    for _ in range(4):
        angles.append(angle(maps(local)["0"], module[2].weight.T))
        for _ in range(100):
            local_gradients(local, x, labels)
            optimizer.step()
    angles.append(angle(maps(local)["0"], module[2].weight.T))
    assert angles == sorted(angles, reverse=True)
    assert angles[0] > 60
    assert angles[-1] < 10


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "small_resnet", "transformer_encoder"])
@pytest.mark.parametrize("options", [{}, {"derivative": True}, {"error_weights": "kp"}, {"depth": 2}], ids=str)
def test_updates_are_proportional_to_the_scale_of_the_loss(name, options):
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(DOUBLE), example_inputs=model.example(DOUBLE), rule=RecLRA(**options))
    found = []
    for scale in (1, 1000):
        local.zero_grad()
        (scale * model.loss(zoo.call(local, model.example(DOUBLE)))).backward()
        found.append({key: p.grad * (1000 / scale) for key, p in local.named_parameters()})
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("error_weights", ["fixed", "kp"])
def test_a_summed_loss_gives_the_batch_size_times_the_updates_of_a_mean_one(error_weights):
    x, labels = problem()
    local = compiled(mlp(6, 8, 7, 4), x, RecLRA(error_weights=error_weights))
    mean = local_gradients(local, x, labels)
    summed = local_gradients(local, x, labels, reduction="sum")
    assert_same_gradients(summed, {name: len(x) * gradient for name, gradient in mean.items()})


def test_a_batch_that_is_repeated_gives_the_same_update():
    """Per-sample units: the target of a sample doesn't depend on how many others are in the batch."""
    x, labels = problem()
    local = compiled(mlp(6, 8, 7, 4), x, RecLRA(rescale=None))
    once = local_gradients(local, x, labels)
    assert_same_gradients(local_gradients(local, x.repeat(5, 1), labels.repeat(5)), once)


def test_reprojection_bounds_the_norm_of_every_update():
    x, labels = problem()
    free, bounded = (
        compiled(mlp(6, 8, 7, 4), x, RecLRA(error_weights="kp", reprojection=bound, **WHOLE)) for bound in (None, 0.1)
    )
    bounded.load_state_dict(free.state_dict())
    for local in (free, bounded):
        local_gradients(local, x, labels)
    short = 0
    for p, q in zip(free.parameters(), bounded.parameters(), strict=True):
        norm = float(p.grad.norm())
        short += norm < 0.1
        torch.testing.assert_close(q.grad, p.grad * min(1, 0.1 / norm))
    assert 0 < short < len(list(free.parameters()))


def test_no_error_means_no_update():
    x, _ = problem()
    local = compiled(mlp(6, 8, 7, 4), x, RecLRA(error_weights="kp"))
    (local(x) * 0).sum().backward()
    assert all(not parameter.grad.any() for parameter in local.parameters())


# Large outputs


def test_above_a_large_vocabulary_skip_errors_start_from_the_penultimate_representation():
    """Layers 4 and 2 learn by the exact error; that of z_2, W_3 transposed times e_L, goes on through E."""
    x, _ = problem()
    labels = torch.tensor([20, 0, 33])
    module = mlp(6, 8, 7, 40)
    local = compiled(module, x, RecLRA(max_source_features=39, **WHOLE))
    kinds = {(c.source, c.target): (c.kind, c.exact) for c in local.graph.connections}
    assert kinds == {("output", "4"): ("loss", True), ("4", "2"): ("vjp", True), ("2", "0"): ("feedback", False)}

    found = local_gradients(local, x, labels)
    exact = torch.autograd.grad(F.cross_entropy(module(x), labels), list(module.parameters()))
    for (name, _), gradient in zip(module.named_parameters(), exact, strict=True):
        if not name.startswith("0."):
            torch.testing.assert_close(found[name], gradient, **EXACT)

    with torch.no_grad():
        h = module[0](x)
        e = reference.cross_entropy_error(module(x), labels) @ module[4].weight
        d = reference.displacement(e, maps(local)["0"])
        update = reference.local_error(h, d, Settings("tanh"))
    torch.testing.assert_close(found["0.weight"], reference.mean_outer(update, x), **EXACT)


def test_an_output_of_just_the_largest_size_sends_its_own_error():
    x, _ = problem()
    graph = compiled(mlp(6, 8, 7, 40), x, RecLRA(max_source_features=40)).graph
    assert {c.source for c in graph.connections if c.kind == "feedback"} == {"4"}


def test_a_language_model_s_skip_errors_start_below_its_head():
    model = zoo.MODELS["language_model"]
    options = {"example_inputs": model.example(DOUBLE), "rule": RecLRA(max_source_features=zoo.VOCABULARY - 1)}
    graph = graphlocal.compile(model.make(DOUBLE), **options).graph
    head = graph.owner[graph.outputs[0]]
    (below,) = {c.target for c in graph.connections if c.source == head}
    assert {c.kind for c in graph.connections if c.source == head} == {"vjp"}
    feedback = [c for c in graph.connections if c.kind == "feedback"]
    assert feedback
    assert {c.source for c in feedback} == {below}
    assert {c.weight[-1] for c in feedback} == {8}


# Options


def test_the_slopes_of_the_transcription_are_those_of_the_modules():
    h = torch.linspace(-2, 2, 11, dtype=DOUBLE)
    for name, module in MODULES.items():
        assert torch.equal(ACTIVATIONS[name].value(h), module()(h))


@pytest.mark.parametrize(
    "options",
    [{"depth": 0}, {"beta": 0}, {"beta": -0.1}, {"reprojection": 0}, {"error_weights": "kolen"}, {"rescale": "max"}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(graphlocal.GraphLocalError, match=name):
        RecLRA(**options)


class Weighted(nn.Module):
    """Two layers weighted by a softmax over parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.randn(2))
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares.softmax(0)
        z = torch.tanh(self.first(x)) * shares[0]
        return self.head(torch.tanh(self.second(z)) * shares[1])


def test_a_value_made_of_parameters_alone_gets_its_error_from_those_that_read_it():
    local = graphlocal.compile(Weighted(), example_inputs=(torch.randn(4, 6),))
    back = {(c.source, c.target) for c in local.graph.connections if c.kind == "vjp"}
    assert back == {("first", "prelude"), ("second", "prelude")}
    local(torch.randn(4, 6)).square().sum().backward()
    assert local.original.shares.grad.abs().min() > 0
