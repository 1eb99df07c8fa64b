"""No autograd path crosses a subgraph boundary: checked on autograd's own graph, node by node."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_runtime import gradients
from torch import Tensor

import graphlocal
import zoo
from graphlocal.feedback import weight_names
from graphlocal.rules import RecLRA

KINDS = (
    "mlp", "dropout_mlp", "frozen_middle", "residual_mlp", "called_twice", "tied_weight", "siamese", "nested_output",
    "several_inputs_outputs", "slice_assignment", "scalar_gain", "step_counter", "small_resnet", "frozen_stem",
    "inception", "unet", "vit", "transformer_dropout", "language_model", "language_model_loss", "embeddings",
    "message_passing", "lstm", "gru_unrolled",
)  # fmt: skip
PARTITIONS = [(1, "auto"), (2, "auto"), (1, "leaf")]
IDS = ["auto", "auto-depth-2", "leaf"]


def compiled(name: str, depth: int = 1, partition: Any = "auto") -> graphlocal.LocalModule:
    model = zoo.MODELS[name]
    rule = RecLRA(depth=depth)
    return graphlocal.compile(
        model.make(), example_inputs=model.example(), rule=rule, partition=partition, target="eager"
    )


def forward_pass(local: graphlocal.LocalModule, name: str) -> dict[str, Any]:
    """What the forward pass keeps for the error pass, by the names of the training graph."""
    output = zoo.call(local, zoo.MODELS[name].example())
    step = next(leaf for leaf in zoo.leaves(output) if leaf.grad_fn is not None).grad_fn.step
    (result,) = step.compiled.passes[0].graph.find_nodes(op="output")
    return dict(zip((node.name for node in result.args[0][1]), step.run.saved, strict=True))


def autograd_graph(*tensors: Any) -> tuple[set[Any], list[Tensor]]:
    """The inner nodes of autograd's graph above some tensors, and the leaf tensors at which it ends."""
    pending = [x.grad_fn for x in tensors if isinstance(x, Tensor) and x.grad_fn is not None]
    inner, ends = set(), {}
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):  # AccumulateGrad
            ends[id(node.variable)] = node.variable
        elif node not in inner:
            inner.add(node)
            pending += [above for above, _ in node.next_functions if above is not None]
    return inner, list(ends.values())


@dataclass(frozen=True)
class Reached:
    """The autograd graph of one subgraph: its nodes, the parameters reached, the other leaves reached."""

    nodes: set[Any]
    parameters: set[str]
    others: list[Tensor]


def reached(local: graphlocal.LocalModule, saved: dict[str, Any]) -> dict[str, Reached]:
    """What autograd reaches from the representations and pre-activations of each subgraph."""
    names = {id(parameter): name for name, parameter in local.original.named_parameters()}
    attached: dict[str, list[Any]] = {}
    for key, value in saved.items():
        if found := re.search(r"_in_F(\d+)$", key):
            attached.setdefault(local.graph.subgraphs[int(found[1]) - 1].name, []).append(value)
    result = {}
    for subgraph, values in attached.items():
        nodes, ends = autograd_graph(*values)
        parameters = {names[id(leaf)] for leaf in ends if id(leaf) in names}
        result[subgraph] = Reached(nodes, parameters, [leaf for leaf in ends if id(leaf) not in names])
    return result


def assert_isolated(local: graphlocal.LocalModule, saved: dict[str, Any]) -> dict[str, Reached]:
    """Every subgraph reaches its own parameters only, no two share a node, and what crosses has no history."""
    graph, found = local.graph, reached(local, saved)
    for name, own in found.items():
        foreign = own.parameters - set(graph.trainable(graph.subgraph[name]))
        assert not foreign, f"{name} reaches {sorted(foreign)}"
    owner: dict[Any, str] = {}
    for name, own in found.items():
        for node in own.nodes:
            assert owner.setdefault(node, name) == name, f"{name} and {owner[node]} share {node.name()}"
    for key, value in saved.items():
        if isinstance(value, Tensor) and not re.search(r"_in_F\d+$", key):
            assert value.grad_fn is None, f"{key} crosses with its history"
    return found


@pytest.mark.parametrize(("depth", "partition"), PARTITIONS, ids=IDS)
@pytest.mark.parametrize("name", KINDS)
def test_the_autograd_graph_of_each_subgraph_ends_at_its_own_parameters(name, depth, partition):
    local = compiled(name, depth, partition)
    found = assert_isolated(local, forward_pass(local, name))
    assert set(found) == set(local.graph.neuron), "every subgraph with an error neuron was looked at"
    trainable = {name for name, p in local.original.named_parameters() if p.requires_grad}
    assert set().union(*(own.parameters for own in found.values())) <= trainable
    for subgraph, own in found.items():
        assert own.parameters == set(local.graph.trainable(local.graph.subgraph[subgraph])), subgraph


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "small_resnet", "transformer_dropout", "gru_unrolled"])
def test_rec_lra_reaches_nothing_but_parameters(name):
    """There is no vector-Jacobian product between its subgraphs, so no representation takes a gradient."""
    local = compiled(name, depth=2)
    assert not any(c.kind == "vjp" for c in local.graph.connections)
    assert not any(own.others for own in reached(local, forward_pass(local, name)).values())


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "language_model"])
def test_vjp_messages_stop_at_the_representation_that_was_read(name):
    """The rule `backprop` sends messages between subgraphs, over cut-off copies and no further."""
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="backprop")
    saved = forward_pass(local, name)
    found = assert_isolated(local, saved)
    assert any(own.others for own in found.values())
    for subgraph, own in found.items():
        read = [saved[value] for value in local.graph.subgraph[subgraph].inputs if value in saved]
        assert {id(leaf) for leaf in own.others} <= {id(value) for value in read}, subgraph


def joined(value: Any, differentiable: bool) -> Any:
    """In the place of `boundary`: cuts nothing off."""
    return value


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "transformer_encoder", "gru_unrolled"])
def test_the_check_fails_where_the_boundaries_do_not_cut(name, monkeypatch):
    monkeypatch.setattr("graphlocal.targets.eager.boundary", joined)
    local = compiled(name)
    with pytest.raises(AssertionError, match="reaches"):
        assert_isolated(local, forward_pass(local, name))


def test_the_check_finds_a_single_missing_cut(monkeypatch):
    from graphlocal.targets.bodies import boundary

    def leaking(value: Tensor, differentiable: bool) -> Tensor:
        return value if value.shape[-1] == 8 else boundary(value, differentiable)  # the first hidden layer only

    monkeypatch.setattr("graphlocal.targets.eager.boundary", leaking)
    local = compiled("mlp")
    with pytest.raises(AssertionError, match=r"2 reaches \['0\.bias', '0\.weight'\]"):
        assert_isolated(local, forward_pass(local, "mlp"))


@pytest.mark.parametrize("name", ["mlp", "small_resnet"])
def test_the_plain_model_is_one_graph_that_reaches_every_parameter(name):
    model = zoo.MODELS[name].make()
    nodes, ends = autograd_graph(zoo.call(model, zoo.MODELS[name].example()))
    assert len(nodes) > len(list(model.children()))
    assert {id(leaf) for leaf in ends} == {id(parameter) for parameter in model.parameters()}


# The drop-in module's output


@pytest.mark.parametrize("name", ["mlp", "frozen_middle", "small_resnet", "nested_output", "language_model_loss"])
def test_the_outputs_grad_fn_is_the_one_local_updates_node(name):
    local = compiled(name)
    outputs = [leaf for leaf in zoo.leaves(zoo.call(local, zoo.MODELS[name].example())) if leaf.grad_fn is not None]
    nodes, ends = autograd_graph(*outputs)
    assert len(outputs) == sum(local.compiled.differentiable)
    assert [node.name() for node in nodes] == ["_LocalUpdatesBackward"]
    trainable = [state.name for state in local.graph.states if state.trainable]
    assert {id(leaf) for leaf in ends} == {id(local.original.get_parameter(path)) for path in trainable}


def test_an_input_that_wants_a_gradient_hangs_on_the_same_node():
    local = compiled("mlp")
    x = zoo.vectors()[0].requires_grad_()
    nodes, ends = autograd_graph(local(x))
    assert len(nodes) == 1
    assert any(leaf is x for leaf in ends)


# Errors stay with their subgraph


def updates(local: graphlocal.LocalModule, name: str) -> dict[str, Tensor]:
    model = zoo.MODELS[name]
    found = gradients(local, model.example(), model.loss)
    return {key.removeprefix("original."): grad.clone() for key, grad in found.items() if grad is not None}


def without_feedback(local: graphlocal.LocalModule, subgraph: str) -> Callable[[], None]:
    """Set every E that ends at a subgraph to zero; returns what undoes it."""
    names = weight_names(local.graph)
    ending = [c for c in local.graph.incoming(subgraph) if c.kind == "feedback"]
    assert ending
    maps = [getattr(local.error_weights, name) for c in ending for name in names[c.name]]
    before = [E.clone() for E in maps]
    for E in maps:
        E.zero_()
    return lambda: [E.copy_(value) for E, value in zip(maps, before, strict=True)] and None


SEPARATE = ("mlp", "residual_mlp", "small_resnet", "unet", "transformer_encoder", "lstm")


@pytest.mark.parametrize("partition", ["auto", "leaf"])
@pytest.mark.parametrize("name", SEPARATE)
def test_a_subgraph_whose_skip_errors_are_zero_learns_nothing_and_the_others_as_before(name, partition):
    local = compiled(name, partition=partition)
    graph = local.graph
    before = updates(local, name)
    targets = [s for s in graph.neuron if any(c.kind == "feedback" for c in graph.incoming(s))]
    assert len(targets) == len(graph.neuron) - 1, "all but the head"
    for target in targets[:6]:
        undo = without_feedback(local, target)
        after = updates(local, name)
        undo()
        own = set(graph.trainable(graph.subgraph[target]))
        for parameter, update in after.items():
            assert torch.equal(update, torch.zeros_like(update) if parameter in own else before[parameter]), parameter
    assert any(update.any() for update in before.values())


def test_inside_a_block_only_what_its_own_error_feeds_goes_silent():
    """At depth 2 the exit of a block hands its error to the block's other parts, and to no other block."""
    local = compiled("residual_mlp", depth=2)
    before = updates(local, "residual_mlp")
    silent = {
        "blocks.1.inner": ["blocks.1.inner"],  # a part
        "blocks.1.outer": ["blocks.1.inner", "blocks.1.outer"],  # the exit, whose error the part follows
    }
    for target, expected in silent.items():
        undo = without_feedback(local, target)
        after = updates(local, "residual_mlp")
        undo()
        changed = {key.rpartition(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert sorted(changed) == expected
        assert not any(after[f"{part}.weight"].any() for part in expected)


def test_zeroing_the_error_of_the_head_silences_everything():
    """With no gradient at the output there is nothing for any E to carry."""
    local = compiled("small_resnet", depth=2)
    found = gradients(local, zoo.pictures(), lambda output: 0.0 * output.sum())
    assert not any(gradient.any() for gradient in found.values() if gradient is not None)
    assert any(gradient.any() for gradient in updates(local, "small_resnet").values())
