"""The intermediate representation, on graphs written by hand; the other tests of the IR borrow them."""

from __future__ import annotations

from dataclasses import replace

from graphlocal.ir import (
    OUTPUT,
    Action,
    Connection,
    ErrorNeuron,
    Input,
    LocalGraph,
    Operation,
    Representation,
    State,
    Subgraph,
    TensorType,
)


def f32(*shape: int | str) -> TensorType:
    return TensorType("float32", shape)


def parameter(name: str, *shape: int) -> State:
    return State(name, "parameter", f32(*shape), trainable=True)


def linear(name: str, source: str, module: str, width: int, line: int) -> Operation:
    states = (f"{module}.weight", f"{module}.bias")
    file = f"mlp.py:{line}"
    return Operation(name, "aten.linear.default", (source,), states, f32("B", width), module, file)


def tanh(name: str, source: str, module: str, width: int, line: int) -> Operation:
    file = f"mlp.py:{line}"
    return Operation(name, "aten.tanh.default", (source,), (), f32("B", width), module, file, pointwise=True)


def mlp() -> LocalGraph:
    """Linear(4, 8), tanh, Linear(8, 8), tanh, Linear(8, 2) under rec-LRA, on two streams."""
    widths = {"0": (8, 4), "2": (8, 8), "4": (2, 8)}
    states = [
        state
        for name, shape in widths.items()
        for state in (parameter(f"{name}.weight", *shape), parameter(f"{name}.bias", shape[0]))
    ]
    first = Subgraph(
        "0",
        ("linear", "tanh"),
        ("x",),
        ("0.weight", "0.bias"),
        (Representation("tanh", "linear", 1),),
        ("body",),
    )
    second = Subgraph(
        "2",
        ("linear_1", "tanh_1"),
        ("tanh",),
        ("2.weight", "2.bias"),
        (Representation("tanh_1", "linear_1", 1),),
        ("body",),
    )
    last = Subgraph(
        "4", ("linear_2",), ("tanh_1",), ("4.weight", "4.bias"), (Representation("linear_2", "linear_2", 1),)
    )
    return LocalGraph(
        name="MLP",
        inputs=(Input("x", f32("B", 4)),),
        outputs=("linear_2",),
        states=tuple(states),
        operations=(
            linear("linear", "x", "0", 8, 11),
            tanh("tanh", "linear", "1", 8, 12),
            linear("linear_1", "tanh", "2", 8, 13),
            tanh("tanh_1", "linear_1", "3", 8, 14),
            linear("linear_2", "tanh_1", "4", 2, 15),
        ),
        subgraphs=(first, second, last),
        rule="rec-lra",
        error_neurons=(
            ErrorNeuron("0", ("tanh",)),
            ErrorNeuron("2", ("tanh_1",)),
            ErrorNeuron("4", ("linear_2",)),
        ),
        connections=(
            Connection(OUTPUT, "4", "linear_2", "loss", exact=True),
            Connection("4", "2", "tanh_1", "feedback", depth=1, source_value="linear_2", weight=(8, 2)),
            Connection("4", "0", "tanh", "feedback", depth=1, source_value="linear_2", weight=(8, 2)),
        ),
        schedule=(
            Action(1, 0, "F", 1),
            Action(2, 0, "F", 2),
            Action(3, 0, "F", 3),
            Action(3, 0, "D", 3),
            Action(4, 0, "U", 3),
            Action(4, 1, "D", 2),
            Action(5, 0, "D", 1),
            Action(5, 1, "U", 2),
            Action(6, 0, "U", 1),
        ),
    )


def residual() -> LocalGraph:
    """relu(a(x)) goes to b and around it, with BatchNorm and a size; learns by backpropagation."""

    def op(name: str, target: str, *inputs: str, **known: object) -> Operation:
        known = {"type": f32("B", 6), "module": name, "source": f"my models/net.py:{len(name)}", **known}
        return Operation(name, f"aten.{target}", inputs, **known)  # type: ignore[arg-type]

    a = op("a", "linear.default", "x", states=("a.weight",), flops=72)
    writes = ("writes bn.mean", "random")
    norm = op("norm", "batch_norm.default", "a", states=("bn.weight", "bn.mean"), effects=writes, group="bn")
    relu = op("relu", "relu.default", "norm", pointwise=True)
    b = op("b", "linear.default", "relu", states=("b.weight",))
    add = op("add", "add.Tensor", "b", "relu")
    view = op("view", "view.default", "add", "size")
    head = op("head", "linear.default", "view", states=("head.weight",), type=f32("B", 3))
    return LocalGraph(
        name="Residual net",
        inputs=(Input("x", f32("B", 6)), Input("scale", None)),
        outputs=("head", "head"),
        states=(
            *(parameter(name, 6, 6) for name in ("a.weight", "b.weight")),
            State("bn.weight", "parameter", f32(6)),
            State("bn.mean", "buffer", f32(6)),
            parameter("head.weight", 3, 6),
        ),
        sizes=(Operation("size", "aten.sym_size.int", ("x",)),),
        operations=(a, norm, relu, b, add, view, head),
        subgraphs=(
            Subgraph(
                "stem",
                ("a", "norm", "relu"),
                ("x",),
                ("a.weight", "bn.weight", "bn.mean"),
                (Representation("relu", "norm", 1),),
                ("net", "net.early"),
            ),
            Subgraph("b", ("b", "add"), ("relu",), ("b.weight",), (Representation("add", "add", 1),), ("net",)),
            Subgraph(
                "head",
                ("view", "head"),
                ("add",),
                ("head.weight",),
                (Representation("head", "head", 1),),
            ),
        ),
        rule="backprop",
        error_neurons=(
            ErrorNeuron("head", ("head",)),
            ErrorNeuron("b", ("add",)),
            ErrorNeuron("stem", ("relu",)),
        ),
        connections=(
            Connection(OUTPUT, "head", "head", "loss", exact=True),
            Connection("head", "b", "add", "vjp", exact=True),
            Connection("b", "stem", "relu", "vjp", exact=True),
        ),
        schedule=tuple(
            Action(step, 0, kind, number)  # type: ignore[arg-type]
            for step, (kind, number) in enumerate(
                [("F", 1), ("F", 2), ("F", 3), ("D", 3), ("U", 3), ("D", 2), ("U", 2), ("D", 1), ("U", 1)]
            )
        ),
    )


def tied() -> LocalGraph:
    """An embedding whose weight the head reads again; the argmax of the head is returned too."""
    weight = parameter("embed.weight", 50, 16)
    words = TensorType("int64", ("B", "2*S1"))
    embed = Operation("embed", "aten.embedding.default", ("words",), ("embed.weight",), f32("B", "2*S1", 16))
    head = Operation("head", "aten.linear.default", ("embed",), ("embed.weight",), f32("B", "2*S1", 50))
    best = Operation("best", "aten.argmax.default", ("head",), type=words)
    return LocalGraph(
        name="Tied",
        inputs=(Input("words", words),),
        outputs=("head", "best"),
        states=(weight,),
        operations=(embed, head, best),
        subgraphs=(
            Subgraph("embed", ("embed",), ("words",), ("embed.weight",), (Representation("embed", "embed", 2),)),
            Subgraph("head", ("head",), ("embed",), ("embed.weight",), (Representation("head", "head", 2),)),
            Subgraph("best", ("best",), ("head",), (), (Representation("best", "best", 1),)),
        ),
        rule="rec-lra",
        error_neurons=(ErrorNeuron("embed", ("embed",)), ErrorNeuron("head", ("head",))),
        connections=(
            Connection(OUTPUT, "head", "head", "loss", exact=True),
            Connection("head", "embed", "embed", "feedback", depth=1, source_value="head", weight=(16, 50)),
        ),
    )


def test_tail_is_the_operations_after_the_preactivation() -> None:
    graph = mlp()
    assert graph.tail(graph.representation["tanh"]) == ("tanh",)
    assert graph.tail(graph.representation["linear_2"]) == ()


def test_quotient_has_an_edge_for_each_crossing_value() -> None:
    assert list(residual().quotient.edges) == [("stem", "b"), ("b", "head")]


def test_readers_are_the_subgraphs_that_read_a_value_from_outside() -> None:
    graph = residual()
    assert {value: [s.name for s in found] for value, found in graph.readers.items()} == {
        "x": ["stem"],
        "relu": ["b"],
        "add": ["head"],
    }


def test_a_reader_of_a_buffer_waits_for_the_write_before_and_precedes_the_write_after() -> None:
    def op(name: str, *effects: str) -> Operation:
        return Operation(name, "bn", ("x",), ("mean",), effects=effects)

    operations = (op("read"), op("write", "writes mean"), op("again"), op("last", "writes mean"))
    graph = LocalGraph("g", (Input("x", None),), (), (State("mean", "buffer", f32(1)),), operations)
    assert set(graph.operation_dag.edges) == {
        ("read", "write"),
        ("write", "again"),
        ("write", "last"),
        ("again", "last"),
    }


def test_random_operations_keep_their_order() -> None:
    operations = tuple(Operation(name, "aten.rand", (), effects=("random",)) for name in "abc")
    assert list(LocalGraph("g", (), (), (), operations).operation_dag.edges) == [("a", "b"), ("b", "c")]


def test_tied_parameter_is_trainable_in_both_subgraphs() -> None:
    graph = tied()
    assert [graph.trainable(subgraph) for subgraph in graph.subgraphs] == [
        ("embed.weight",),
        ("embed.weight",),
        (),
    ]


def test_incoming_connections_are_those_of_the_target() -> None:
    graph = mlp()
    assert [connection.source for connection in graph.incoming("0")] == ["4"]
    assert replace(graph, connections=()).incoming("0") == ()
