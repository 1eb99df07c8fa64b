"""Properties of compiled random models: partition, forward pass, oracle, text form, schedules, determinism."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import hypothesis
import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from training import Step, assert_same_forward, assert_same_gradients, step

import graphlocal
from graphlocal.errors import PartitionError
from graphlocal.ir import Action, LocalGraph, Operation
from graphlocal.passes.schedule import Schedule
from graphlocal.rules import RecLRA
from graphlocal.targets.eager import emit
from graphlocal.targets.training_graph import split
from graphlocal.text import parse, to_text
from graphlocal.verify import action_dependencies, verify
from strategies import DagModel, dag_models, loss

DOUBLE = torch.float64


# Partition policies


@dataclass(frozen=True)
class Scattered:
    """A callable policy: a box, or none, for each operation by a hash of its name."""

    boxes: tuple[str | None, ...]

    def __call__(self, op: Operation) -> str | None:
        return self.boxes[zlib.crc32(op.name.encode()) % len(self.boxes)]


@dataclass(frozen=True)
class Runs:
    """A callable policy: boxes of consecutive operations, which are always convex."""

    lengths: tuple[int, ...]
    seen: dict[str, int] = field(default_factory=dict, compare=False)

    def __call__(self, op: Operation) -> str:
        position = self.seen.setdefault(op.name, len(self.seen)) % sum(self.lengths)
        rounds = self.seen[op.name] // sum(self.lengths)
        ends = [sum(self.lengths[: i + 1]) for i in range(len(self.lengths))]
        return f"run{rounds}.{next(i for i, end in enumerate(ends) if position < end)}"


CONVEX = st.sampled_from(["auto", "leaf", 1, 2, 3]) | st.builds(
    Runs, st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
)
BOXES = st.sampled_from(["abc", ["a", "b", None]]).flatmap(
    lambda names: st.lists(st.sampled_from(names), min_size=2, max_size=6)
)
SCATTERED = st.builds(Scattered, BOXES.map(tuple))
RULES = st.sampled_from(["backprop", "rec-lra", RecLRA(depth=2), RecLRA(depth=64, error_weights="kp", derivative=True)])


def make(model: DagModel) -> nn.Module:
    torch.manual_seed(0)
    return model.build().double()


def compiled(model: DagModel, partition="auto", rule="backprop", seed: int = 0) -> graphlocal.LocalModule:
    """Compile the model; an int above the number of its layers becomes that number."""
    module = make(model)
    torch.manual_seed(seed)
    options = {"example_inputs": model.example(dtype=DOUBLE), "rule": rule}
    if isinstance(partition, int):
        graph = graphlocal.compile(module, **options, partition="leaf").graph
        parameters = {state.name for state in graph.states if state.kind == "parameter"}
        partition = min(partition, sum(not parameters.isdisjoint(op.states) for op in graph.operations))
    return graphlocal.compile(module, **options, partition=partition)


def take_step(module: nn.Module, model: DagModel, scale: float = 1) -> Step:
    return step(module, model.example(dtype=DOUBLE), lambda output: scale * loss(output), seed=1)


# Partition and text


def assert_partition(graph: LocalGraph, traced: torch.fx.GraphModule) -> None:
    """Every operation once, and subgraphs that can run one after the other; from the traced nodes alone."""
    called = [node for node in traced.graph.nodes if node.op in ("call_function", "call_module")]
    placed = [op for subgraph in graph.subgraphs for op in subgraph.operations] + [op.name for op in graph.sizes]
    assert sorted(placed) == sorted(node.name for node in called)
    owner = {op: subgraph.name for subgraph in graph.subgraphs for op in subgraph.operations}
    quotient = nx.DiGraph()
    for node in called:
        pairs = [(owner.get(source.name), owner.get(node.name)) for source in node.all_input_nodes]
        quotient.add_edges_from((a, b) for a, b in pairs if a and b and a != b)
    assert nx.is_directed_acyclic_graph(quotient)
    rank = {subgraph.name: i for i, subgraph in enumerate(graph.subgraphs)}
    assert all(rank[a] < rank[b] for a, b in quotient.edges)


@given(dag_models(), CONVEX, RULES)
def test_every_operation_is_in_one_subgraph_and_the_quotient_is_acyclic(model, partition, rule):
    local = compiled(model, partition, rule)
    assert_partition(local.graph, local.compiled.traced.module)
    assert nx.is_directed_acyclic_graph(nx.DiGraph(local.graph.error_graph))
    verify(local.graph)


@given(dag_models(), CONVEX | SCATTERED, RULES)
def test_the_text_form_parses_back_to_the_same_graph(model, partition, rule):
    try:
        local = compiled(model, partition, rule)
    except PartitionError:
        hypothesis.assume(False)
    for record in local.compiled.records:
        assert parse(to_text(record.after)) == record.after
    assert to_text(parse(to_text(local.graph))) == to_text(local.graph)


def forms_a_cycle(graph: LocalGraph, policy: Callable[[Operation], str | None]) -> bool:
    """Whether the boxes of a policy that labels every operation wait for each other; a group keeps its first box."""
    first: dict[str, str | None] = {}
    for op in graph.operations:
        first.setdefault(op.group or op.name, policy(op))
    box = {op.name: first[op.group or op.name] for op in graph.operations}
    quotient = nx.DiGraph((box[a], box[b]) for a, b in graph.operation_dag.edges if box[a] != box[b])
    return not nx.is_directed_acyclic_graph(quotient)


@given(dag_models(), SCATTERED)
def test_a_cut_is_refused_where_its_boxes_form_a_cycle_and_then_nothing_is_changed(model, partition):
    module = make(model)
    operations = compiled(model).graph
    before = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {path: dict(child.__dict__) for path, child in module.named_modules()}
    random_state = torch.get_rng_state()
    options = {"example_inputs": model.example(dtype=DOUBLE), "rule": "backprop", "partition": partition}
    if None not in partition.boxes and forms_a_cycle(operations, partition):
        with pytest.raises(PartitionError, match=r"the cut is not convex(.|\n)* needs "):
            graphlocal.compile(module, **options)
    else:
        with contextlib.nullcontext() if None not in partition.boxes else contextlib.suppress(PartitionError):
            local = graphlocal.compile(module, **options)
            assert_partition(local.graph, local.compiled.traced.module)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {path: dict(child.__dict__) for path, child in module.named_modules()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


# Forward pass and oracle


@given(dag_models(), CONVEX | SCATTERED)
def test_forward_is_bit_exact_and_backprop_is_autograd_for_any_partition(model, partition):
    try:
        local = compiled(model, partition)
    except PartitionError:
        hypothesis.assume(False)
    true, found = take_step(make(model), model), take_step(local, model)
    assert_same_forward(found, true)
    assert_same_gradients(found.gradients, true.gradients)


@given(dag_models(), CONVEX, RULES.filter(lambda rule: rule != "backprop"))
def test_rec_lra_leaves_the_forward_pass_alone_and_reaches_every_parameter(model, partition, rule):
    local = compiled(model, partition, rule)
    true, found = take_step(make(model), model), take_step(local, model)
    assert_same_forward(found, true)
    for name, gradient in found.gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


@given(dag_models(), CONVEX, RULES)
def test_a_fused_step_of_sgd_equals_backward_and_step(model, partition, rule):
    whole, fused = (compiled(model, partition, rule) for _ in range(2))
    optimizers = [torch.optim.SGD(local.parameters(), 0.1) for local in (whole, fused)]
    take_step(whole, model)
    optimizers[0].step()
    torch.manual_seed(1)
    graphlocal.train_step(fused, lambda output, _: loss(output), optimizers[1])(model.example(dtype=DOUBLE), None)
    state = fused.state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12, msg=name)


# Schedules


def any_legal_order(graph: LocalGraph, seed: int) -> LocalGraph:
    """The same graph with its actions in a random topological order of what they need."""
    needs, draw = action_dependencies(graph), random.Random(seed)
    order: list[tuple] = []
    while len(order) < len(needs):
        ready = [action for action in needs if action not in order and needs[action].issubset(order)]
        order.append(draw.choice(ready))
    return replace(graph, schedule=tuple(Action(i, 0, kind, number) for i, (kind, number) in enumerate(order)))


def run(local: graphlocal.LocalModule, graph: LocalGraph, model: DagModel) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and all updates of one step in the order of the graph's schedule; buffers are put back."""
    verify(graph)
    parts = local.compiled
    training = emit(graph, parts.traced, parts.model, parts.options.rule, parts.error_weights)
    forward, error = split(training)
    buffers = {name: buffer.clone() for name, buffer in local.original.named_buffers()}
    torch.manual_seed(1)
    outputs, saved = forward(*model.example(dtype=DOUBLE))
    cut = [output.detach().requires_grad_() for output in outputs]
    total = loss(cut[0] if len(cut) == 1 else tuple(cut))
    weights, feedback, _ = error(saved, torch.autograd.grad(total, cut), False)
    with torch.no_grad():
        for name, buffer in local.original.named_buffers():
            buffer.copy_(buffers[name])
    updates = dict(zip((*training.weights, *training.feedback), (*weights, *feedback), strict=True))
    return [x.detach() for x in outputs], [updates[name] for name in sorted(updates)]


def assert_same_run(local: graphlocal.LocalModule, graphs: list[LocalGraph], model: DagModel) -> None:
    outputs, updates = run(local, local.graph, model)
    for graph in graphs:
        other_outputs, other_updates = run(local, graph, model)
        assert all(map(torch.equal, other_outputs, outputs))
        torch.testing.assert_close(other_updates, updates, rtol=1e-12, atol=1e-12)


@given(dag_models(), CONVEX, RULES, st.integers(0, 999))
def test_any_legal_order_of_the_schedule_gives_the_same_update(model, partition, rule, seed):
    local = compiled(model, partition, rule)
    assert_same_run(local, [any_legal_order(local.graph, seed), any_legal_order(local.graph, seed + 1)], model)


@given(dag_models(), CONVEX, RULES)
def test_any_number_of_streams_gives_the_same_update_in_no_more_steps(model, partition, rule):
    local = compiled(model, partition, rule)
    graphs = [Schedule(streams).apply(local.graph) for streams in (1, 2, 3, 99)]
    lengths = [graph.schedule[-1].step for graph in graphs]
    assert lengths == sorted(lengths, reverse=True)
    assert to_text(graphs[0]) == to_text(local.graph)
    assert_same_run(local, graphs[1:], model)


# Determinism


@given(dag_models(), CONVEX, RULES)
def test_compile_is_deterministic(model, partition, rule):
    first, second, other = (compiled(model, partition, rule, seed) for seed in (3, 3, 4))
    assert to_text(first.graph) == to_text(second.graph) == to_text(other.graph)
    assert first.training_graph.code == second.training_graph.code
    maps = [dict(local.error_weights.state_dict()) for local in (first, second, other)]
    assert list(maps[0]) == list(maps[1])
    for name, value in maps[0].items():
        assert torch.equal(value, maps[1][name])
        assert not torch.equal(value, maps[2][name])


@given(dag_models(max_nodes=6), RULES)
def test_compile_moves_neither_the_random_state_nor_the_model(model, rule):
    module = make(model)
    before, state = {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()
    local = graphlocal.compile(module, example_inputs=model.example(dtype=DOUBLE), rule=rule)
    assert torch.equal(torch.get_rng_state(), state)
    assert local.original is module
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@given(dag_models(), CONVEX, RULES)
def test_the_updates_of_a_repeated_step_are_the_same(model, partition, rule):
    hypothesis.assume(not any(node.op in ("batchnorm", "average") for node in model.nodes))
    local = compiled(model, partition, rule)
    first, second = take_step(local, model), take_step(local, model)
    for name, gradient in first.gradients.items():
        assert torch.equal(second.gradients[name], gradient), name


@given(dag_models(), CONVEX, RULES)
def test_updates_grow_in_proportion_to_the_loss(model, partition, rule):
    local = compiled(model, partition, rule)
    buffers = {name: buffer.clone() for name, buffer in local.original.named_buffers()}
    small = take_step(local, model)
    local.original.load_state_dict(buffers, strict=False)
    large = take_step(local, model, scale=1000)
    scaled = {name: gradient * 1000 for name, gradient in small.gradients.items()}
    assert_same_gradients(large.gradients, scaled)
