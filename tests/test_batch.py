"""Horizontal batching: isomorphic subgraphs learn in one stacked computation, with the numbers of separate ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
import zoo
from graphlocal.errors import VerifyError
from graphlocal.passes.batch import RULE, Batch, batches, error_levels, require_independent
from graphlocal.rules import Backprop, RecLRA
from graphlocal.targets.batched import batched, label
from graphlocal.targets.lowered import lower
from graphlocal.targets.stacking import ALL, Stacking
from graphlocal.targets.training_graph import TrainingGraph

aten = torch.ops.aten

MODELS = [
    ("deep_mlp", RecLRA(error_weights="kp"), "auto"), ("residual_mlp", RecLRA(depth=2), "leaf"),
    ("vit", RecLRA(), "auto"),
]  # fmt: skip
MORE = [
    ("small_resnet", RecLRA(error_weights="kp"), "leaf"),
    ("called_twice", RecLRA(), "leaf"), ("mixture_of_experts", RecLRA(), "leaf"), ("siamese", RecLRA(), "auto"),
    ("transformer_dropout", RecLRA(depth=2), "auto"), ("transformer_encoder", RecLRA(), "leaf"),
    ("language_model", RecLRA(), "leaf"), ("convnext", RecLRA(), "leaf"), ("message_passing", RecLRA(), "leaf"),
]  # fmt: skip
CASES = [*MODELS, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in MORE)]


def compiled(name: str, rule=None, **options) -> graphlocal.LocalModule:
    model = zoo.MODELS[name]
    torch.manual_seed(0)
    return graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule or RecLRA(), **options)


def deep(layers: int = 12, width: int = 16, target: str = "batched", **options) -> graphlocal.LocalModule:
    torch.manual_seed(0)
    hidden = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(width, 3))
    return graphlocal.compile(model, example_inputs=torch.randn(8, width), target=target, **options)


def lowered(local: graphlocal.LocalModule) -> TrainingGraph:
    leaves = [x.detach() for x in local.compiled.traced.arguments.leaves]
    return lower(local.compiled.training, leaves, local.compiled.differentiable)


def operators(training: TrainingGraph, *targets) -> int:
    return sum(node.target in targets for node in training.module.graph.nodes)


def trained(name: str, local: graphlocal.LocalModule, steps: int = 20) -> dict[str, torch.Tensor]:
    model = zoo.MODELS[name]
    optimizer = torch.optim.SGD(local.parameters(), 1e-2, momentum=0.9)
    run = graphlocal.train_step(local, lambda output, _: model.loss(output), optimizer)
    torch.manual_seed(3)
    for _ in range(steps):
        run(model.example(), None)
    return local.state_dict()


# Numbers


@pytest.mark.parametrize(("name", "rule", "partition"), CASES, ids=str)
def test_twenty_steps_equal_the_lowered_target(name, rule, partition):
    expected = trained(name, compiled(name, rule, partition=partition, target="lowered"))
    local = compiled(name, rule, partition=partition, target="batched")
    found = trained(name, local)
    assert local.compiled.execution.batches > 0
    for key, value in expected.items():
        bound = 1e-5 * float(value.abs().max()) if value.is_floating_point() and value.numel() else 0
        assert float((found[key] - value).abs().max() if value.numel() else 0) <= bound, key


def test_gradients_of_several_backward_passes_add_up():
    local, other = deep(), deep(target="eager")
    for _ in range(3):
        x, y = torch.randn(8, 16), torch.randint(3, (8,))
        for module in (local, other):
            cross_entropy(module(x), y).backward()
    assert local.compiled.execution.batches == 1
    for mine, true in zip(local.original.parameters(), other.original.parameters(), strict=True):
        assert float((mine.grad - true.grad).abs().max()) <= 1e-5 * float(true.grad.abs().max())


@dataclass(frozen=True)
class Signs(RecLRA):
    """A rule of the user's: the sign of the displacement is the error."""

    name = "signs"

    def local_error(self, neuron, displacement):
        return displacement.sign() * neuron.z.detach().abs().mean()


def test_a_rule_of_the_users_is_stacked_too():
    x, y = torch.randn(8, 16), torch.randint(3, (8,))
    gradients = []
    for target in ("batched", "eager"):
        local = deep(rule=Signs(), target=target)
        cross_entropy(local(x), y).backward()
        gradients.append([p.grad for p in local.original.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients, strict=True))


# What is stacked


def test_a_deep_mlp_has_one_product_for_all_updates():
    local = deep()
    training = lowered(local)
    found, count = batched(training, local.graph, ALL)
    assert count == 1
    assert operators(training, aten.mm.default) == 2 * 12 + 1
    assert operators(found, aten.mm.default) == 1  # the output layer's own
    assert operators(found, aten.bmm.default) == 2  # all displacements, all updates
    assert operators(found, aten.tanh.default) == 12 + 1
    actions = {node.meta.get("action") for node in found.module.graph.nodes if node.target is aten.bmm.default}
    assert actions == {"D1-D12", "U1-U12"}


def test_an_inner_batch_reads_the_stack_of_the_outer_one():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x).tanh()).tanh()

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(8, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(4, 8), rule=RecLRA(depth=2), target="batched")
    found = batches(local.graph)
    assert [batch.members for batch in found] == [("0.a", "1.a", "2.a"), ("0.b", "1.b", "2.b")]
    training, count = batched(lowered(local), local.graph, ALL)
    assert count == 2
    stacks = [node for node in training.module.graph.nodes if node.target is aten.stack.default]
    assert len(stacks) == 4 + 4  # h, z, E and what the layer read, of either batch; the outer errors are a stack


def test_operators_with_other_options_are_not_stacked_together():
    layers = []
    for slope in (0.1, 0.1, 0.3, 0.3, 0.3):
        layers += [nn.Linear(8, 8), nn.LeakyReLU(slope)]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(4, 8), target="batched")
    assert [len(batch.members) for batch in batches(local.graph)] == [5]  # the IR does not hold the slope
    _, count = batched(lowered(local), local.graph, ALL)
    assert count == 2


def test_backprop_has_nothing_to_stack():
    local = deep(rule=Backprop())
    assert batches(local.graph) == ()
    cross_entropy(local(torch.randn(8, 16)), torch.randint(3, (8,))).backward()
    assert local.compiled.execution.batches == 0


def test_an_error_pass_that_draws_random_numbers_keeps_its_order():
    local = compiled("dropout_mlp", graphlocal.rules.find("lra-diff"), partition="leaf", target="lowered")
    training = lowered(local)
    assert batched(training, local.graph, ALL) == (training, 0)


def test_labels_of_actions():
    assert label("D", [4, 3, 2]) == "D2-D4"
    assert label("U", [2, 5]) == "U2+U5"


# When


def test_auto_stacks_many_small_layers_and_leaves_few_or_large_ones():
    x, small, few = torch.randn(8, 16), deep(20, target="auto"), deep(4, target="auto")
    for local in (small, few):
        for _ in range(2):
            cross_entropy(local(x), torch.randint(3, (8,))).backward()
    assert small.compiled.execution.batches == 1
    assert few.compiled.execution.batches == 0
    wide = deep(8, 512, target="auto")
    training = lowered(wide)
    assert batched(training, wide.graph, Stacking())[1] == 0
    assert batched(training, wide.graph, replace(Stacking(), margin=float("inf")))[1] > 0


def test_stacks_are_as_large_as_a_cache_holds():
    local = deep()
    one = 16 * 16 * 4  # the gradient of a weight
    for most, count in ((3 * one, 4), (4 * one, 3), (12 * one, 1)):
        assert batched(lowered(local), local.graph, replace(ALL, most=most))[1] == count


# Legality


def test_levels_count_errors_that_wait_for_each_other():
    assert set(error_levels(deep().graph).values()) == {0, 1}
    chain = error_levels(deep(rule=Backprop()).graph)
    assert sorted(chain.values()) == list(range(13))


def test_members_that_wait_for_each_other_are_refused_by_name():
    graph = deep(rule=Backprop()).graph
    with pytest.raises(VerifyError, match=rf"\[{RULE}\] members of the batch 2, 8 wait for each other"):
        require_independent(graph, (Batch(("2", "8")),))
    crossed = compiled("residual_mlp", RecLRA(depth=2), partition="leaf").graph
    levels = error_levels(crossed)
    low, high = min(levels, key=levels.__getitem__), max(levels, key=levels.__getitem__)
    with pytest.raises(VerifyError, match=RULE):
        require_independent(crossed, (Batch((low, high)),))


def test_a_batch_needs_error_neurons_and_a_member_one_batch():
    graph = deep().graph
    with pytest.raises(VerifyError, match="two batches"):
        require_independent(graph, (Batch(("2", "4")), Batch(("4", "6"))))
    with pytest.raises(VerifyError, match="no error neuron"):
        require_independent(graph, (Batch(("2", "nothing")),))
    require_independent(graph, (Batch(("2", "4")), Batch(("6", "8"))))
