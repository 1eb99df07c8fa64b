"""Graphs for the tests of the partition page, made without tracing a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from graphlocal.ir import (
    OUTPUT,
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
from graphlocal.passes.schedule import Schedule

FLOAT = TensorType("float32", ("B", 8))


def chain(
    names: Sequence[str],
    *,
    operations: int = 2,
    regions: Callable[[int], tuple[str, ...]] = lambda i: (),
    word: Callable[[int], str] = "op{}".format,
    streams: int = 1,
) -> LocalGraph:
    """Subgraphs one after the other, each a linear operation and elementwise ones, with skip-errors from the last.

    names: of the subgraphs. word: the name of the i-th operation.
    """
    ops, subgraphs, states = [], [], []
    value = "x"
    for i, name in enumerate(names):
        read, own = value, []
        weight = State(f"{name}.weight", "parameter", TensorType("float32", (8, 8)), True)
        states.append(weight)
        for k in range(operations):
            op = Operation(
                word(i * operations + k),
                "aten.tanh.default" if k else "aten.linear.default",
                (value,),
                () if k else (weight.name,),
                FLOAT,
                name,
                f"model.py:{i + 1}",
                pointwise=bool(k),
                flops=0 if k else 100 * (i + 1),
            )
            ops.append(op)
            own.append(op.name)
            value = op.name
        z = Representation(value, own[0], 1)
        subgraphs.append(Subgraph(name, tuple(own), (read,), (weight.name,), (z,), regions(i)))
    last = subgraphs[-1]
    errors = [Connection(OUTPUT, last.name, value, "loss", exact=True)]
    for subgraph in subgraphs[:-1]:
        z = subgraph.outputs[0].value
        errors.append(Connection(last.name, subgraph.name, z, "feedback", False, 1, value, (8, 8)))
    graph = LocalGraph("chain", (Input("x", FLOAT),), (value,), tuple(states), tuple(ops),
                       subgraphs=tuple(subgraphs), rule="RecLRA(beta=0.2)",
                       error_neurons=tuple(ErrorNeuron(s.name, (s.outputs[0].value,)) for s in subgraphs),
                       connections=tuple(errors))  # fmt: skip
    return Schedule(streams).apply(graph)


def block_net() -> LocalGraph:
    """Three regions of two subgraphs, and a head; six operations each; two streams."""
    names = [f"layer{i}.conv{k}" for i in (1, 2, 3) for k in (1, 2)]
    return chain([*names, "head"], operations=6, regions=lambda i: (f"layer{i // 2 + 1}",) if i < 6 else (), streams=2)


def large() -> LocalGraph:
    """3,000 operations in 600 subgraphs, 60 regions."""
    names = [f"stage{i // 100}.block{i // 10}.unit{i}" for i in range(600)]
    return chain(names, operations=5, regions=lambda i: (f"stage{i // 100}.block{i // 10}",))


HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "{{data}} {{scripts}} $& \\1",
    "__proto__",
    "<!--<script>",
    "a\u2028b\u2029c\x00\x1b",
    "\ud800 lone surrogate",
    "quotes \" ' ` & &amp; ]]>",
    "עברית\u202e ünïcödé 🧠",
)


def hostile() -> LocalGraph:
    """Names that mean something to HTML, JavaScript, JSON or templates, in every place that has names."""
    graph = chain(
        HOSTILE, word=lambda i: f"{HOSTILE[i % len(HOSTILE)]}{i}", regions=lambda i: HOSTILE[:2] if i < 3 else ()
    )
    ops = tuple(replace(op, source=HOSTILE[i % len(HOSTILE)]) for i, op in enumerate(graph.operations))
    return replace(graph, name=HOSTILE[0], rule=HOSTILE[1], operations=ops)
