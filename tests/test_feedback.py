"""Feedback maps against sums that are written out by hand, for every pair of layouts that models have."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphlocal
import zoo
from graphlocal.feedback import Layout, cotangent_update, layout, weight_names
from graphlocal.ir import Connection, LocalGraph
from graphlocal.rules import RecLRA

DOUBLE = torch.float64
WHOLE = RecLRA(feedback_share=1e6, feedback_total=1e6)


def compiled(model: zoo.ZooModel, rule: RecLRA = WHOLE) -> graphlocal.LocalModule:
    return graphlocal.compile(model.make(DOUBLE), example_inputs=model.example(DOUBLE), rule=rule)


def feedback(graph: LocalGraph, target: str) -> Connection:
    (found,) = [c for c in graph.connections if c.kind == "feedback" and c.target == target]
    return found


def drawn(shape: tuple[int | str, ...]) -> Tensor:
    """A tensor of a representation's shape, with a batch of `zoo.BATCH`."""
    return torch.randn([zoo.BATCH if isinstance(size, str) else size for size in shape], dtype=DOUBLE)


# In the sums: b batch, t or s time or tokens, h w and x y height and width, k source features, f target features.
CASES = {
    "logits to features": ("mlp", "2", "bk->bf", "fk,bk->bf"),
    "logits to channels": ("small_resnet", "4", "bk->bfxy", "fk,bk,xy->bfxy"),
    "logits to tokens": ("transformer_encoder", "encoder.layers.0", "bk->bsf", "fk,bk,s->bsf"),
    "logits to channels of a sequence": ("audio", "4", "bk->bfx", "fk,bk,x->bfx"),
    "logits to patches": ("vit", "patches", "bk->bsf", "fk,bk,s->bsf"),
    "logits to states, time first": ("lstm_time_first", "cells", "bk->sbf", "fk,bk,s->sbf"),
    "tokens to tokens": ("language_model", "blocks.0", "btk->btf", "fk,btk->btf"),
    "pixels to pixels": ("unet", "down1", "bkhw->bfhw", "fk,bkhw->bfhw"),
    "pixels to fewer pixels": ("unet", "middle", "bkhw->bfxy", "fk,bkhw,xh,yw->bfxy"),
    "nodes to nodes": ("message_passing", "update", "bk->bf", "fk,bk->bf"),
    "nodes to edges": ("message_passing", "message", "bk->ef", "fk,bk,e->ef"),
}


def factors(formula: str, shapes: str, error: Tensor, z: Tensor) -> list[Tensor]:
    """What the sums take besides E and the error: ones, or which position lies where, (target, source)."""
    source, _, target = shapes.partition("->")
    sizes = dict(zip(source, error.shape, strict=True)) | dict(zip(target, z.shape, strict=True))
    found = []
    for axes in formula.partition("->")[0].split(",")[2:]:
        factor = torch.ones([sizes[axis] for axis in axes], dtype=DOUBLE)
        if axes[-1] in source and axes[-1] not in target:
            for i, k in itertools.product(*map(range, factor.shape)):
                factor[i, k] = float(int(k * factor.shape[0] / factor.shape[1]) == i)
        found.append(factor)
    return found


@pytest.mark.parametrize("case", CASES)
def test_message_equals_the_sum_written_out(case):
    name, target, shapes, formula = CASES[case]
    graph = compiled(zoo.MODELS[name]).graph
    connection = feedback(graph, target)
    error = drawn(graph.type(connection.source_value).shape)
    z = drawn(graph.type(connection.value).shape)
    assert f"{'x' * error.dim()}->{'x' * z.dim()}" == "".join(c if c in "->" else "x" for c in shapes)
    weight = torch.randn(connection.weight, dtype=DOUBLE)
    expected = torch.einsum(formula, weight, error, *factors(formula, shapes, error, z))
    found = layout(graph, connection).apply([weight], error, z)
    assert found.shape == z.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_update_of_a_map_is_the_cotangent_times_the_error(case):
    """Sum over batch and positions of C e^T, where a position of C reads the error that reached it."""
    name, target, shapes, formula = CASES[case]
    graph = compiled(zoo.MODELS[name]).graph
    connection = feedback(graph, target)
    error = drawn(graph.type(connection.source_value).shape)
    cotangent = drawn(graph.type(connection.value).shape)
    _, e, *others = formula.partition("->")[0].split(",")
    sums = ",".join([formula.partition("->")[2], e, *others])
    expected = torch.einsum(f"{sums}->fk", cotangent, error, *factors(formula, shapes, error, cotangent))
    weight = torch.randn(connection.weight, dtype=DOUBLE)
    (found,) = cotangent_update(layout(graph, connection), [weight], error, cotangent)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("before", "after"), [(14, 7), (7, 14), (28, 13), (5, 8)])
def test_between_maps_of_unlike_sizes_an_error_stays_at_its_place(before, after):
    """An error in one corner of the source displaces that corner of the target, and nothing far from it."""
    resized = tuple((axis, before, after) for axis in (2, 3))
    between = Layout(4, 1, 4, 1, ((0, 0), (2, 2), (3, 3)), resized=resized)
    error = torch.zeros(1, 3, before, before, dtype=DOUBLE)
    error[0, :, -1, 0] = 1
    target = torch.zeros(1, 2, after, after, dtype=DOUBLE)
    found = between.apply([torch.ones(2, 3, dtype=DOUBLE)], error, target)
    assert found.shape == target.shape
    where = found[0, 0].nonzero()
    assert found[0, 0, -1, 0] == 3
    assert int(where[:, 0].min()) >= after - 1 - after // before
    assert int(where[:, 1].max()) <= after // before
    assert found[0, 0].sum() == 3 * len(where)


def test_two_factors_act_as_their_product():
    error, z = torch.randn(3, 5, 4, dtype=DOUBLE), torch.randn(3, 5, 8, dtype=DOUBLE)
    left, right = torch.randn(8, 2, dtype=DOUBLE), torch.randn(2, 4, dtype=DOUBLE)
    per_token = Layout(3, 2, 3, 2, ((0, 0), (1, 1)))
    found = per_token.apply([left, right], error, z)
    torch.testing.assert_close(found, per_token.apply([left @ right], error, z))
    updates = cotangent_update(per_token, [left, right], error, z)
    whole = torch.einsum("btf,btk->fk", z, error)
    torch.testing.assert_close(updates[0], whole @ right.T)
    torch.testing.assert_close(updates[1], left.T @ whole)


def test_an_implied_feature_axis_is_one_feature():
    """A score for each sample has shape [batch]: a map of one column, or of one row."""
    score, z = torch.randn(3, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)
    column = torch.randn(6, 1, dtype=DOUBLE)
    from_score, to_score = Layout(1, 1, 2, 1, ((0, 0),)), Layout(2, 1, 1, 1, ((0, 0),))
    torch.testing.assert_close(from_score.apply([column], score, z), score[:, None] * column[:, 0])
    torch.testing.assert_close(to_score.apply([column.T], z, score), z @ column[:, 0])


def test_a_model_that_returns_one_score_a_sample_learns():
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
    x = zoo.vectors()[0].double()
    local = graphlocal.compile(module, example_inputs=(x,), rule=WHOLE)
    local(x).square().mean().backward()
    (connection,) = [c for c in local.graph.connections if c.kind == "feedback"]
    assert connection.weight == (5, 1)
    assert all(parameter.grad.any() for parameter in module.parameters())


class Downsampling(nn.Module):
    """Its output is as high as its first representation is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 1)
        self.up = nn.ConvTranspose2d(3, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.first(x)))


def test_height_is_never_taken_for_width():
    x = torch.randn(3, 2, 4, 8, dtype=DOUBLE)
    local = graphlocal.compile(Downsampling().double(), example_inputs=(x,), rule=WHOLE)
    connection = feedback(local.graph, "first")
    assert local.graph.type(connection.source_value).shape == ("B", 4, 8, 16)
    found = layout(local.graph, connection)
    assert found.shared == ((0, 0), (2, 2), (3, 3))
    assert found.resized == ((2, 8, 4), (3, 16, 8))


# A whole update by hand


@pytest.mark.parametrize("derivative", [False, True])
@pytest.mark.parametrize("name", ["small_resnet", "audio", "transformer_encoder", "lstm_time_first", "language_model"])
def test_the_error_of_a_block_is_the_difference_to_its_target(name, derivative):
    """Every block: displacement, target, error and its own vector-Jacobian product, recomputed from z, h and E."""
    model = zoo.MODELS[name]
    rule = RecLRA(feedback_share=1e6, feedback_total=1e6, derivative=derivative)
    local = compiled(model, rule)
    graph, (forward, _) = local.graph, local.compiled.passes
    torch.manual_seed(0)
    outputs, saved = forward(*zoo.leaves(model.example(DOUBLE)))
    values = dict(zip(saved_names(local), saved, strict=True))
    output = outputs[0].detach().requires_grad_()
    (error,) = torch.autograd.grad(model.loss(output), output)
    names = weight_names(graph)
    weights = local.error_weights.state_dict()
    expected: dict[str, Tensor] = {}
    for connection in graph.connections:
        if connection.kind == "feedback":
            z, h = values[connection.value], values[preactivation(graph, connection.value)]
            E = weights[names[connection.name][0]]
            batch = outputs[0].shape[0]
            d = layout(graph, connection).apply([E], batch * error, z)
            scale = d.square().mean().sqrt()
            target = phi(graph, connection.value)(h - rule.beta * d / scale)
            e = (scale * (z - target) / batch).detach()
            parameters = list(graph.trainable(graph.subgraph[connection.target]))
            wanted = [local.original.get_parameter(name) for name in parameters]
            start = z if derivative else h
            found = torch.autograd.grad(start, wanted, e, allow_unused=True, retain_graph=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    expected[parameter] = expected.get(parameter, 0) + gradient
    torch.manual_seed(0)
    model.loss(zoo.call(local, model.example(DOUBLE))).backward()
    shared = {name for name, p in local.original.named_parameters() if name == "embedding.weight"}
    assert len(expected) > 1
    for parameter, gradient in expected.items():
        if parameter not in shared:
            torch.testing.assert_close(local.original.get_parameter(parameter).grad, gradient, rtol=1e-9, atol=1e-12)


def saved_names(local: graphlocal.LocalModule) -> list[str]:
    """What each value that the forward pass saves is: `z in F3` is called `z`."""
    (output,) = local.compiled.passes[0].graph.find_nodes(op="output")
    return [node.name.partition("_in_F")[0] for node in output.args[0][1]]


def preactivation(graph: LocalGraph, value: str) -> str:
    return graph.representation[value].preactivation


def phi(graph: LocalGraph, value: str):
    """The activation function that ends the representation's subgraph, by name."""
    functions = {"relu": F.relu, "elu": F.elu, "leaky_relu": lambda h: F.leaky_relu(h, 0.1)}
    steps = [graph.operation[name].target.split(".")[1].rstrip("_") for name in graph.tail(graph.representation[value])]

    def apply(h: Tensor) -> Tensor:
        for step in steps:
            h = functions[step](h)
        return h

    return apply


def test_every_feedback_map_of_the_zoo_keeps_the_batch():
    """No layout sums over the samples: an error of one sample moves that sample alone."""
    for parameter in zoo.models(exclude=("large", "graph")):
        (model,) = parameter.values
        graph = graphlocal.compile(model.make(), example_inputs=model.example(), rule="rec-lra").graph
        axis = 1 if "time-first" in model.tags else 0
        for connection in graph.connections:
            if connection.kind == "feedback":
                target = graph.type(connection.value).shape
                batch = axis if len(target) > 2 else 0
                assert (0, batch) in layout(graph, connection).shared, (model.name, connection.name)


def test_time_first_and_batch_first_agree_on_the_message():
    weight, error = torch.randn(6, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    z = torch.randn(5, 3, 6, dtype=DOUBLE)
    first = Layout(2, 1, 3, 2, ((0, 1),)).apply([weight], error, z)
    second = Layout(2, 1, 3, 2, ((0, 0),)).apply([weight], error, z.transpose(0, 1))
    torch.testing.assert_close(first, second.transpose(0, 1))
    for a, b in itertools.pairwise(first):
        assert torch.equal(a, b)
