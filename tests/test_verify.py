"""The verifier: valid graphs pass, and each corrupted graph breaks the named rule and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from textwrap import dedent
from typing import Any

import pytest
from test_ir import f32, mlp, residual, tied

from graphlocal.errors import CycleError, InputError, VerifyError
from graphlocal.ir import (
    OUTPUT,
    Action,
    Connection,
    ErrorNeuron,
    Input,
    LocalGraph,
    Operation,
    Representation,
    Subgraph,
    TensorType,
)
from graphlocal.verify import RULES, action_dependencies, influential_operations, verify, violations


def op(name: str, *inputs: str, **known: Any) -> Operation:
    known = {"type": f32("B", 4), "module": f"net.{name}", "source": f"net.py:{ord(name[0]) - 96}", **known}
    return Operation(name, "aten.add.Tensor", inputs, **known)


def cut(operations: tuple[Operation, ...], **parts: str) -> LocalGraph:
    """A graph of these operations on the input x, cut as in `first="a b", second="c"`."""
    consumers = {source: op.name for op in operations for source in op.inputs}
    outputs = tuple(op.name for op in operations if op.name not in consumers)
    graph = LocalGraph("Net", (Input("x", f32("B", 4)),), outputs, (), operations)
    subgraphs = []
    for name, members in parts.items():
        inside = [op for op in operations if op.name in members.split()]
        names = [op.name for op in inside]
        inputs = dict.fromkeys(value for op in inside for value in op.inputs if value not in names)
        read = {value for op in operations if op not in inside for value in op.inputs}
        given = (Representation(name, name, 1) for name in names if name in read or name in outputs)
        subgraphs.append(Subgraph(name, tuple(names), tuple(inputs), (), tuple(given)))
    return replace(graph, subgraphs=tuple(subgraphs))


def changed(graph: LocalGraph, field: str, index: int, **changes: object) -> LocalGraph:
    """The graph with some fields of `graph.field[index]` changed."""
    items = list(getattr(graph, field))
    items[index] = replace(items[index], **changes)
    return replace(graph, **{field: tuple(items)})


@pytest.mark.parametrize("make", [mlp, residual, tied])
def test_valid_graphs_break_no_rule_at_any_stage(make: Callable[[], LocalGraph]) -> None:
    graph = make()
    wired = replace(graph, schedule=())
    neurons = replace(wired, connections=())
    partitioned = replace(neurons, error_neurons=())
    for stage in (graph, wired, neurons, partitioned, replace(partitioned, subgraphs=())):
        assert violations(stage) == []
        verify(stage)


# Every rule, broken.

CROSSING = (op("a", "x"), op("b", "x"), op("c", "b"), op("d", "a"))
CYCLE_WITH_CONVEX_PARTS = cut(CROSSING, first="a c", second="b d")
LOOP = (op("a", "x"), op("b", "a"), op("c", "b", "a"))
STRAY = Connection("0", "2", "tanh_1", "feedback", depth=1, source_value="tanh", weight=(8, 8))
TO_EMBED = Connection(OUTPUT, "embed", "embed", "loss", exact=True)
BACK = Connection("2", "0", "tanh", "vjp")


def operation(index: int, **changes: object) -> LocalGraph:
    return changed(mlp(), "operations", index, **changes)


def subgraph(index: int, **changes: object) -> LocalGraph:
    return changed(mlp(), "subgraphs", index, **changes)


def link(index: int, **changes: object) -> LocalGraph:
    return changed(mlp(), "connections", index, **changes)


def gives(value: str, preactivation: str, axis: int = 1) -> dict[str, Any]:
    return {"outputs": (Representation(value, preactivation, axis),)}


def with_neuron(graph: LocalGraph, subgraph: str, value: str) -> LocalGraph:
    return replace(graph, error_neurons=(*graph.error_neurons, ErrorNeuron(subgraph, (value,))))


def without_feedback_to(subgraph: str) -> LocalGraph:
    connections = tuple(c for c in mlp().connections if c.target != subgraph)
    return replace(mlp(), connections=connections, schedule=())


def linked(*more: Connection) -> LocalGraph:
    return replace(mlp(), connections=(*mlp().connections, *more))


def unpacked_outside() -> LocalGraph:
    unpack = replace(op("g", "s"), target="operator.getitem")
    return cut((op("s", "x", type=None), unpack), first="s", second="g")


def tail_through_another_subgraph(preactivation: str) -> LocalGraph:
    graph = operation(2, states=(), pointwise=True)
    return changed(graph, "subgraphs", 1, states=(), **gives("tanh_1", preactivation))


def shuffled() -> LocalGraph:
    first, second, last = mlp().subgraphs
    return replace(mlp(), subgraphs=(second, first, last), schedule=())


def unlearned_head() -> LocalGraph:
    """The head is not reached by any error, and its weight is not taught elsewhere."""
    states = (*tied().states, replace(tied().states[0], name="head.weight"))
    graph = replace(tied(), states=states, outputs=("embed", "best"))
    graph = replace(graph, error_neurons=tied().error_neurons[:1], connections=(TO_EMBED,))
    graph = changed(graph, "operations", 1, states=("head.weight",))
    return changed(graph, "subgraphs", 1, states=("head.weight",))


ACTIONS = mlp().schedule
EARLY = replace(mlp(), schedule=(*ACTIONS[:4], replace(ACTIONS[4], step=3), replace(ACTIONS[5], step=3), *ACTIONS[6:]))

# fmt: off
BROKEN: dict[str, list[tuple[str, LocalGraph]]] = {
    "unique-names": [
        ("2 values are called 'linear'", operation(1, name="linear")),
        ("2 states are called '0.bias'", changed(mlp(), "states", 0, name="0.bias")),
        ("2 subgraphs are called '2'", subgraph(0, name="2")),
        ("a subgraph is called 'output'", subgraph(0, name=OUTPUT)),
    ],
    "program-order": [
        ("operation 'linear' reads 'tanh', which comes no earlier", operation(0, inputs=("tanh",))),
        ("operation 'linear' reads 'z', which nothing defines", operation(0, inputs=("z",))),
        ("'linear' uses the state 'lost', which the graph does not have", operation(0, states=("lost",))),
        ("'linear' uses the state 'lost', which the graph", operation(0, effects=("writes lost",))),
        ("the model returns 'loss', which nothing defines", replace(mlp(), outputs=("loss",))),
    ],
    "coverage": [
        ("operation 'tanh' must be in one subgraph once; it is in none", subgraph(0, operations=("linear",))),
        ("it is in '0', '2'", subgraph(1, operations=("linear", "linear_1", "tanh_1"))),
        ("subgraph '4' runs 'conv', no operation of", subgraph(2, operations=("linear_2", "conv"))),
        ("'0' does not list its operations in program order", subgraph(0, operations=("tanh", "linear"))),
        ("'idle' runs no operation", replace(mlp(), subgraphs=(*mlp().subgraphs, Subgraph("idle", ())))),
    ],
    "groups": [
        ("the group 'bn' is cut: 'norm' is in subgraph 'stem', 'add' is in subgraph 'b'",
         changed(residual(), "operations", 4, group="bn")),
    ],
    "regions": [
        ("region 'net' lies in none at subgraph 'stem', but in 'model' at subgraph 'b'",
         changed(residual(), "subgraphs", 1, regions=("model", "net"))),
        ("region 'net' encloses itself at subgraph 'b'",
         changed(residual(), "subgraphs", 1, regions=("net", "net"))),
    ],
    "acyclic-quotient": [("the subgraphs wait for each other in a cycle", CYCLE_WITH_CONVEX_PARTS)],
    "topological": [
        ("subgraph '2' (number 1) is listed before subgraph '0' (number 2), which it waits for", shuffled()),
    ],
    "boundary": [
        ("inputs of subgraph '0' are not those of its operations: it wrongly has 'y'",
         subgraph(0, inputs=("x", "y"))),
        ("inputs of subgraph 'head' are not those of its operations: it lacks 'add', wrongly has 'size'",
         changed(residual(), "subgraphs", 2, inputs=("size",))),
        ("it lacks '0.bias', repeats '0.weight'", subgraph(0, states=("0.weight", "0.weight"))),
        ("it lacks 'tanh_1', wrongly has 'linear_1'", subgraph(1, **gives("linear_1", "linear_1"))),
        ("the tuple 's' leaves subgraph 'first': 'g' unpacks it in 'second'", unpacked_outside()),
    ],
    "tail": [
        ("comes 'linear', which is not an elementwise function", subgraph(0, **gives("tanh", "x"))),
        ("comes 'tanh', which is not in the subgraph", tail_through_another_subgraph("linear")),
        ("'tanh' is not in the subgraph", tail_through_another_subgraph("tanh")),
    ],
    "error-neurons": [
        ("subgraph '0' has no error neuron for its parameters '0.weight', '0.bias'",
         replace(mlp(), error_neurons=mlp().error_neurons[1:])),
        ("subgraph '0' has more than one error neuron", with_neuron(mlp(), "0", "tanh")),
        ("belongs to the subgraph '9', which does not exist", with_neuron(mlp(), "9", "tanh")),
        ("'best' measures 'best'; it must measure float", with_neuron(tied(), "best", "best")),
    ],
    "connections": [
        ("output -> 4:linear_2 is there more than once", linked(mlp().connections[0])),
        ("only connections of kind loss start from 'output'", link(1, source=OUTPUT)),
        ("'9' is no subgraph with an error neuron", link(1, target="9")),
        ("the error neuron of '2' measures 'tanh_1', not 'linear_1'", link(1, value="linear_1")),
        ("an exact connection has no recursion depth", link(0, depth=1)),
        ("'4' measures 'linear_2', not its source value", link(1, source_value="tanh")),
        ("a feedback map has two sizes, target and source features", link(1, weight=())),
        ("a feedback map is never exact", link(1, exact=True, depth=0)),
        ("a vjp connection has neither a source value", changed(residual(), "connections", 1, weight=(6, 3))),
        ("the model does not return 'tanh_1'", link(0, target="2", value="tanh_1")),
        ("'head' does not read 'relu'", changed(residual(), "connections", 2, source="head")),
    ],
    "acyclic-error-graph": [("the error paths form a cycle", linked(STRAY, BACK))],
    "error-reach": [
        ("no error reaches subgraph '0', so these parameters would never learn", without_feedback_to("0")),
        ("head.weight, read by head", unlearned_head()),
    ],
    "message-shapes": [
        ("needs an E of 8x2, the features of 'tanh_1', f32[B,8] and 'linear_2'", link(1, weight=(2, 8))),
        ("needs an E of Bx2", subgraph(0, **gives("tanh", "linear", 0))),
        ("needs an E of (no axis 2)x2", subgraph(0, **gives("tanh", "linear", 2))),
        ("needs an E of 1x2", operation(1, type=f32("B"))),
    ],
    "schedule-legal": [
        ("the schedule has no U1 (subgraph '0')", replace(mlp(), schedule=ACTIONS[:-1])),
        ("U4 is no action of this graph", replace(mlp(), schedule=(*ACTIONS, Action(7, 0, "U", 4)))),
        ("U1 is there 2 times", replace(mlp(), schedule=(*ACTIONS, ACTIONS[-1]))),
        ("U1 is listed after U2, which is later", changed(mlp(), "schedule", 8, step=4, stream=2)),
        ("D2 runs before what it needs: D3 (subgraph '4')", EARLY),
    ],
}
# fmt: on
CASES = [(rule, message, graph) for rule, cases in BROKEN.items() for message, graph in cases]


@pytest.mark.parametrize(
    ("rule", "message", "graph"), CASES, ids=[f"{rule}: {message[:40]}" for rule, message, _ in CASES]
)
def test_corrupted_graph_breaks_the_named_rule_alone(rule: str, message: str, graph: LocalGraph) -> None:
    found = violations(graph)
    assert {error.rule for error in found} == {rule}
    assert any(message in str(error) for error in found), found
    assert all(f"[{rule}]" in str(error) and "remedy" in str(error) and "why" in str(error) for error in found)
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert str(caught.value) == str(found[0])


def test_a_non_convex_subgraph_breaks_convexity_first_and_the_quotient_too() -> None:
    graph = cut(LOOP, outer="a c", inner="b")
    assert [error.rule for error in violations(graph)] == ["convexity", "acyclic-quotient"]


def test_every_rule_has_a_corrupted_graph() -> None:
    assert {*BROKEN, "convexity"} == set(RULES)


# The messages.


def test_cycle_of_subgraphs_prints_the_operations_of_each_step() -> None:
    with pytest.raises(CycleError) as caught:
        verify(CYCLE_WITH_CONVEX_PARTS)
    assert caught.value.cycle == ("first", "second", "first")
    assert str(caught.value) == dedent("""\
        [acyclic-quotient] the subgraphs wait for each other in a cycle
            first -> second: d in net.d, net.py:4 reads a in net.a, net.py:1
            second -> first: c in net.c, net.py:3 reads b in net.b, net.py:2
          why: each subgraph runs as one unit, so none of these can run first: the cut is not convex
          remedy: join 'first', 'second' into one subgraph, or cut one where the cycle enters it""")


def test_path_out_of_a_subgraph_and_back_is_printed() -> None:
    with pytest.raises(VerifyError) as caught:
        verify(cut(LOOP, outer="a c", inner="b"))
    assert str(caught.value) == dedent("""\
        [convexity] subgraph 'outer' is not convex: this path leaves it and comes back
            a in net.a, net.py:1  [subgraph 'outer']
            b in net.b, net.py:2  [subgraph 'inner']
            c in net.c, net.py:3  [subgraph 'outer']
          why: a subgraph runs as one unit, so it cannot wait in the middle for a result from outside
          remedy: move 'b' into subgraph 'outer', or cut it in two, one part up to 'a' and one from 'c'""")


def test_long_path_is_cut_short_in_the_middle() -> None:
    chain = [op("a", "x"), *(op(f"b{n}", f"b{n - 1}" if n else "a") for n in range(40)), op("c", "b39")]
    graph = cut(tuple(chain), outer="a c", inner=" ".join(f"b{n}" for n in range(40)))
    with pytest.raises(VerifyError, match=r"(?s)\.\.\. 26 more \.\.\..*'b7', 32 more into") as caught:
        verify(graph)
    assert len(str(caught.value).splitlines()) == 20


def test_cycle_of_errors_prints_connection_by_connection() -> None:
    with pytest.raises(CycleError) as caught:
        verify(linked(STRAY, BACK))
    assert caught.value.cycle == ("0", "2", "0")
    assert str(caught.value) == dedent("""\
        [acyclic-error-graph] the error paths form a cycle
            0 ~> 2 : tanh_1  (feedback E 8x8, of tanh, depth 1)
            2 -> 0 : tanh  (vjp)
          why: an error neuron waits for every error that reaches it, so none of these could ever start
          remedy: take out one of the skip-errors '0:tanh -> 2:tanh_1'""")


def test_an_error_neuron_that_reaches_itself_is_a_cycle() -> None:
    loop = Connection("2", "2", "tanh_1", "feedback", depth=1, source_value="tanh_1", weight=(8, 8))
    with pytest.raises(CycleError) as caught:
        verify(linked(loop))
    assert caught.value.cycle == ("2", "2")


def test_unreached_parameters_are_listed_with_module_and_line() -> None:
    with pytest.raises(VerifyError) as caught:
        verify(without_feedback_to("0"))
    assert str(caught.value) == dedent("""\
        [error-reach] no error reaches subgraph '0', so these parameters would never learn
            0.weight, read by linear in 0, mlp.py:11
            0.bias, read by linear in 0, mlp.py:11
          why: there is no path from 'output' to its error neuron in the error graph
          remedy: freeze them with requires_grad_(False), or add a path: skip_errors=[("output", "0")]""")


def test_illegal_action_is_marked_in_the_grid_around_it() -> None:
    with pytest.raises(VerifyError) as caught:
        verify(EARLY)
    assert str(caught.value) == dedent("""\
        [schedule-legal] D2 runs before what it needs: D3 (subgraph '4') (step 3, stream 1)
            step  stream 0  stream 1
               1  F1        -
               2  F2        -
               3  F3 D3 U3  >D2<
               5  D1        U2
               6  U1        -
          why: an action is over before the next step, and before the next action of its own stream
          remedy: put the action behind what it needs; report a schedule that graphlocal itself made""")


def test_violations_lists_all_and_leaves_out_what_needs_a_broken_rule() -> None:
    graph = changed(mlp(), "operations", 0, inputs=("z",), states=("lost",))
    graph = changed(graph, "subgraphs", 1, regions=("body", "body"))
    assert [error.rule for error in violations(graph)] == ["program-order", "program-order", "regions"]


# The rest of the interface.


def test_verify_runs_the_named_rules_only() -> None:
    graph = replace(mlp(), schedule=mlp().schedule[:-1])
    verify(graph, rules=["coverage", "convexity"])
    with pytest.raises(VerifyError, match="schedule-legal"):
        verify(graph, rules=["schedule-legal"])


def test_unknown_rule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"no rule 'convex'\n  remedy: did you mean 'convexity'\?"):
        verify(mlp(), rules=["convex"])


def test_dependencies_of_a_feedback_graph() -> None:
    forward = {("F", 1), ("F", 2), ("F", 3)}
    assert action_dependencies(mlp()) == {
        ("F", 1): set(),
        ("F", 2): {("F", 1)},
        ("F", 3): {("F", 2)},
        ("D", 1): {("F", 1), ("D", 3)},
        ("U", 1): {("D", 1)},
        ("D", 2): {("F", 2), ("D", 3)},
        ("U", 2): {("D", 2)},
        ("D", 3): forward,
        ("U", 3): {("D", 3)},
    }


def test_dependencies_of_backpropagation_go_through_the_updates() -> None:
    needs = action_dependencies(residual())
    assert needs["D", 2] == {("F", 2), ("U", 3)}
    assert needs["D", 1] == {("F", 1), ("U", 2)}


def test_what_only_argmax_reads_has_no_influence() -> None:
    graph = replace(tied(), outputs=("embed", "best"))
    assert influential_operations(graph) == {"embed"}
    assert influential_operations(replace(tied(), outputs=("best",))) == frozenset()


def test_what_only_detach_reads_has_no_influence() -> None:
    operations = (op("a", "x"), replace(op("d", "a"), target="aten.detach.default"), op("e", "d"))
    assert influential_operations(cut(operations, all="a d e")) == {"e"}


def test_complex_values_carry_influence_inside_a_subgraph_only() -> None:
    operations = (op("a", "x"), op("f", "a", type=TensorType("complex64", ("B", 4))), op("i", "f"))
    assert influential_operations(cut(operations, all="a f i")) == {"a", "f", "i"}
    assert influential_operations(cut(operations, time="a", frequency="f", back="i")) == {"i"}


def test_a_parameter_that_a_tied_copy_teaches_needs_no_second_error() -> None:
    graph = replace(tied(), outputs=("embed", "best"), error_neurons=(ErrorNeuron("embed", ("embed",)),))
    assert violations(replace(graph, connections=(TO_EMBED,))) == []
