"""What goes on inside a block: Algorithm 2 with perturbative layers and two branches, Hebbian updates, deep recursion.

The transcriptions are plain tensors without autograd; `reference` has the terms.
"""

from __future__ import annotations

import pytest
import reference
import torch
from reference import Settings
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.feedback import weight_names
from graphlocal.nn import PerturbativeConv2d
from graphlocal.passes.perturb_convolutions import PerturbConvolutions
from graphlocal.rules import RecLRA

DOUBLE = torch.float64
WHOLE = {"feedback_share": 1e6, "feedback_total": 1e6}
TANH = Settings("tanh")


def maps(local: graphlocal.LocalModule) -> dict[str, Tensor]:
    """E of each skip-error, by the subgraph at which it ends."""
    names = weight_names(local.graph)
    weights = local.error_weights.state_dict()
    return {c.target: weights[names[c.name][0]] for c in local.graph.connections if c.kind == "feedback"}


def found_gradients(local: graphlocal.LocalModule, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(local(x), labels).backward()
    return {name: p.grad for name, p in local.original.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


# Algorithm 2: a residual block of perturbative layers, with a projection in its second branch


class Block(nn.Module):
    """z = tanh(second(tanh(first(x))) + shortcut(x))"""

    def __init__(self) -> None:
        super().__init__()
        self.first = PerturbativeConv2d(3, 5, 4, stride=2, noise=0.5)
        self.second = PerturbativeConv2d(5, 4, 2, noise=0.5)
        self.shortcut = PerturbativeConv2d(3, 4, 4, stride=2, noise=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))) + self.shortcut(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = PerturbativeConv2d(2, 3, 4, noise=0.5), Block()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.stem(x))).flatten(1))


def perturbed(layer: PerturbativeConv2d, x: Tensor) -> Tensor:
    """relu(x^m + n^m) at the positions that the stride keeps."""
    maps = (x + layer.noise_maps.squeeze(1)).clamp(min=0)
    step = layer.stride[0]
    return maps[:, :, ::step, ::step]


def mixed(layer: PerturbativeConv2d, maps: Tensor) -> Tensor:
    return torch.einsum("cm,bmij->bcij", layer.weight.detach()[:, :, 0, 0], maps) + layer.bias.detach().view(-1, 1, 1)


def updates(name: str, u: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Delta w_m = sum of u times relu(z_in^m + n^m) over the positions, mean over the batch."""
    weight = torch.einsum("bcij,bmij->cm", u, maps) / len(u)
    return {f"{name}.weight": weight[:, :, None, None], f"{name}.bias": u.sum((2, 3)).mean(0)}


def algorithm_2(model: Residual, x: Tensor, labels: Tensor, E: dict[str, Tensor], inside: str) -> dict[str, Tensor]:
    block = model.block
    stem_in = perturbed(model.stem, x)
    h_stem = mixed(model.stem, stem_in)
    z0 = torch.tanh(h_stem)
    first_in, shortcut_in = perturbed(block.first, z0), perturbed(block.shortcut, z0)
    h_first = mixed(block.first, first_in)
    a = torch.tanh(h_first)
    second_in = perturbed(block.second, a)
    h = mixed(block.second, second_in) + mixed(block.shortcut, shortcut_in)
    z = torch.tanh(h).flatten(1)
    e_L = reference.cross_entropy_error(z @ model.head.weight.detach().T + model.head.bias.detach(), labels)

    def to_map(error: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        return (error @ weight.T)[:, :, None, None].expand_as(like)

    found = reference.linear_update("head", e_L, z)
    found |= updates("stem", reference.local_error(h_stem, to_map(e_L, E["stem"], h_stem), TANH), stem_in)
    end = "block" if inside != "recursion" else next(name for name in E if name in ("block.second", "block.shortcut"))
    e = reference.local_error(h, to_map(e_L, E[end], h), TANH)
    found |= updates("block.second", e, second_in)
    if inside == "recursion":
        d = torch.einsum("cd,bdij->bcij", E["block.first"], e)
        found |= updates("block.first", reference.local_error(h_first, d, TANH), first_in)
        return found
    found |= updates("block.shortcut", e, shortcut_in)
    u = torch.einsum("cm,bcij->bmij", block.second.weight.detach()[:, :, 0, 0], e)
    if inside == "autograd":  # the chain rule, and not Hebb's
        u = u * (second_in > 0) * (1 - a**2)
    return found | updates("block.first", u, first_in)


def residual() -> tuple[Residual, Tensor, Tensor]:
    torch.manual_seed(3)
    return Residual().double(), torch.randn(6, 2, 4, 4, dtype=DOUBLE), torch.randint(3, (6,))


@pytest.mark.parametrize("inside", ["autograd", "hebbian"])
def test_update_equals_algorithm_2_on_a_perturbative_residual_net(inside):
    model, x, labels = residual()
    rule = RecLRA(inside=inside, **WHOLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition=["stem", "block", "head"])
    expected = algorithm_2(model, x, labels, maps(local), inside)
    for _ in range(3):  # at last lowered
        local.zero_grad()
        assert_equal(found_gradients(local, x, labels), expected)
    assert local.compiled.execution.not_lowered is None


def test_recursion_enters_both_branches_of_a_perturbative_residual_block():
    model, x, labels = residual()
    rule = RecLRA(inside="recursion", **WHOLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition=["stem", "block", "head"])
    drawn = {c.target: (c.source, c.depth) for c in local.graph.connections if c.kind == "feedback"}
    (end,) = {target for target, (_, depth) in drawn.items() if depth == 1} - {"stem"}
    assert {target: source for target, (source, depth) in drawn.items() if depth == 2}.keys() == {
        "block.first",
        "block.second",
        "block.shortcut",
    } - {end}
    found = found_gradients(local, x, labels)
    E = maps(local)
    expected = algorithm_2(model, x, labels, {**E, "block": E[end]}, "recursion")
    other = ({"block.second", "block.shortcut"} - {end}).pop()
    compared = {name: value for name, value in expected.items() if not name.startswith(other)}
    assert_equal({name: found[name] for name in compared}, compared)
    assert found[f"{other}.weight"].any()


@pytest.mark.exhaustive
def test_perturbed_residual_nets_of_torchvision_learn_by_every_procedure():
    torch.manual_seed(0)
    x, labels = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), BasicBlock(6, 6), BasicBlock(6, 6), nn.Flatten(), nn.Linear(384, 4)
    )
    for inside in ("autograd", "hebbian", "recursion"):
        model = PerturbConvolutions().rewrite(net, (x,)).model
        local = graphlocal.compile(model, example_inputs=(x,), rule=RecLRA(inside=inside))
        step = graphlocal.train_step(local, F.cross_entropy, torch.optim.Adam(local.parameters(), 0.01))
        losses = [float(step(x, labels)) for _ in range(25)]
        assert losses[-1] < 0.5 * losses[0], (inside, losses)


# Hebbian updates


def test_a_hebbian_update_is_error_times_local_input_behind_batch_norm():
    """h = BatchNorm(W x): Delta W = mean(e x^T), Delta gamma = sum of e x_hat, with e as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, labels = torch.randn(9, 5, dtype=DOUBLE), torch.randint(3, (9,))
    local = graphlocal.compile(
        model, example_inputs=(x,), rule=RecLRA(inside="hebbian", **WHOLE), partition=lambda op: str(op.module == "3")
    )
    found = found_gradients(local, x, labels)
    with torch.no_grad():
        q = x @ model[0].weight.T
        hat = (q - q.mean(0)) / (q.var(0, correction=0) + 1e-5).sqrt()
        h = hat * model[1].weight + model[1].bias
        z = torch.tanh(h)
        e_L = reference.cross_entropy_error(z @ model[3].weight.T + model[3].bias, labels)
        (E,) = maps(local).values()
        e = reference.local_error(h, e_L @ E.T, TANH)
    expected = {"0.weight": reference.mean_outer(e, x), "1.weight": (e * hat).mean(0), "1.bias": e.mean(0)}
    assert_equal(found, expected | reference.linear_update("3", e_L, z))


@pytest.mark.parametrize("partition", ["leaf", "auto"])
def test_where_every_subgraph_is_one_affine_operation_hebbian_is_autograd(partition):
    x, labels = zoo.vectors()[0].double(), torch.tensor([2, 0, 3])
    found = []
    for inside in ("autograd", "hebbian"):
        torch.manual_seed(0)
        module = zoo.layers(6, 8, 5, 4).double()
        local = graphlocal.compile(module, example_inputs=(x,), rule=RecLRA(inside=inside), partition=partition)
        found.append(found_gradients(local, x, labels))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("name", ["small_resnet", "transformer_encoder", "residual_mlp", "norms", "language_model"])
def test_hebbian_updates_reach_every_parameter(name):
    model = zoo.MODELS[name]
    module = model.make(DOUBLE)
    inputs = model.example(DOUBLE)
    local = graphlocal.compile(module, example_inputs=inputs, rule=RecLRA(inside="hebbian"))
    model.loss(zoo.call(local, inputs)).backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_an_exact_error_that_goes_on_below_a_wide_output_stays_exact():
    torch.manual_seed(0)
    head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 40))
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), head).double()
    x, labels = torch.randn(4, 5, dtype=DOUBLE), torch.randint(40, (4,))
    rule = RecLRA(inside="hebbian", max_source_features=39)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition=["0", "1"])
    found = found_gradients(local, x, labels)
    exact = torch.autograd.grad(F.cross_entropy(model(x), labels), list(model.parameters()))
    assert_equal(found, dict(zip(dict(model.named_parameters()), exact, strict=True)))


# Recursion to any depth


class Nested(nn.Module):
    """Stages of blocks of layers: three levels of structure."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()

        def layer() -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, width), nn.Tanh())

        def stage() -> nn.Sequential:
            return nn.Sequential(*(nn.Sequential(layer(), layer(), layer()) for _ in range(2)))

        self.stages = nn.Sequential(stage(), stage(), stage())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x))


def nested_update(module: nn.Sequential, path: str, e: Tensor | None, E: dict[str, Tensor], h: dict[str, Tensor],
                  found: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:  # fmt: skip
    """A unit with error e hands it to its last part as it is, and to the others through an E of their own."""
    if isinstance(module[0], nn.Linear):
        found |= reference.linear_update(f"{path}.0", e, inputs[path])
        return
    *others, last = range(len(module))
    for i in others:
        name = leaf(module[i], f"{path}.{i}")
        part = reference.local_error(h[name], e @ E[name].T, TANH)
        nested_update(module[i], f"{path}.{i}", part, E, h, found, inputs)
    nested_update(module[last], f"{path}.{last}", e, E, h, found, inputs)


def leaf(module: nn.Sequential, path: str) -> str:
    """The layer whose output is the unit's."""
    return path if isinstance(module[0], nn.Linear) else leaf(module[-1], f"{path}.{len(module) - 1}")


def test_recursion_to_depth_three_equals_its_transcription():
    torch.manual_seed(0)
    model = Nested().double()
    x, labels = torch.randn(5, 6, dtype=DOUBLE), torch.randint(4, (5,))
    stages = ["stages.0", "stages.1", "stages.2", "head"]
    local = graphlocal.compile(model, example_inputs=(x,), rule=RecLRA(depth=3, **WHOLE), partition=stages)
    depths = [c.depth for c in local.graph.connections if c.kind == "feedback"]
    assert sorted(depths) == [1] * 3 + [2] * 3 + [3] * 12

    h, inputs, z = {}, {}, x
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Sequential) and isinstance(layer[0], nn.Linear):
                inputs[path], h[path] = z, layer[0](z)
                z = torch.tanh(h[path])
        e_L = reference.cross_entropy_error(model.head(z), labels)
    E = {target.removesuffix(".0") if target.count(".") > 3 else target: value for target, value in maps(local).items()}
    expected = reference.linear_update("head", e_L, z)
    for i, stage in enumerate(model.stages):
        name = leaf(stage, f"stages.{i}")
        e = reference.local_error(h[name], e_L @ E[name].T, TANH)
        nested_update(stage, f"stages.{i}", e, E, h, expected, inputs)
    assert_equal(found_gradients(local, x, labels), expected)


def test_recursion_inside_goes_on_to_single_operations():
    x = torch.randn(5, 6)
    stages = ["stages.0", "stages.1", "stages.2", "head"]
    rules = RecLRA(inside="recursion"), RecLRA(depth=3)
    drawn = [
        {(c.source, c.target, c.depth) for c in graphlocal.compile(
            Nested(), example_inputs=(x,), rule=rule, partition=stages).graph.connections}
        for rule in rules
    ]  # fmt: skip
    assert drawn[0] == drawn[1]


def test_another_procedure_is_refused():
    with pytest.raises(InputError, match="inside"):
        RecLRA(inside="oja")
