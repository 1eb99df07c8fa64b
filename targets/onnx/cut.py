"""Cuts a flat ONNX graph at its boundary marks into pieces, one for each subgraph.

A piece is what its subgraph's outputs are computed from, back to values that other pieces or the user give. Two
things need care:

- the size of a tensor that the piece doesn't read otherwise (a batch size, a position): the tensor itself is not
  passed. Its shape is: from a piece `sizes` if it is an input of the model's, else as a further output of the
  piece that has the tensor;
- a model output that no subgraph computes (an input or a state that is returned as it is, a value returned
  twice): a last piece `results` copies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import networkx as nx
import onnx
from onnx import helper

from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.targets.onnx.convert import BOUNDARY, BOUNDARY_DOMAIN, Converted

SIZES, RESULTS = "sizes", "results"


@dataclass(frozen=True)
class Piece:
    """A part of the model as ONNX nodes.

    subgraph: what it computes; None for the pieces `sizes` and `results`. inputs: the values that it reads, in main
    names; states: the states, by the model's own names. outputs: the values that it gives. nodes: with these names.
    infos: types of the values inside.
    """

    name: str
    subgraph: Subgraph | None
    inputs: tuple[str, ...]
    states: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]
    infos: tuple[onnx.ValueInfoProto, ...] = ()


@dataclass(frozen=True)
class Cut:
    """The pieces in the order in which they run.

    types: type of every value that passes between pieces, of the model's inputs and of its outputs. inputs, outputs:
    of the model. A value is named as in the LocalGraph, with a number behind it where a state has that name. unused:
    subgraphs that the evaluation doesn't need, such as auxiliary heads. opset: version of ONNX's operators.
    """

    pieces: tuple[Piece, ...]
    types: dict[str, onnx.TypeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    unused: tuple[str, ...]
    opset: int


def cut(converted: Converted, graph: LocalGraph) -> Cut:
    """The pieces of a converted model."""
    return _Cutter(converted, graph).cut()


@dataclass
class _Core:
    """A piece in the making, in names of the flat graph.

    outputs: main name -> what is marked. nodes: by their place in the flat graph. leaves: Shape nodes that may be
    another piece's business. shapes: the shapes that it is passed, by their main names. further: main name of a
    shape that it gives -> its node.
    """

    subgraph: Subgraph
    outputs: dict[str, str]
    nodes: dict[int, onnx.NodeProto] = field(default_factory=dict)
    reads: dict[str, None] = field(default_factory=dict)
    leaves: dict[int, onnx.NodeProto] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    further: dict[str, onnx.NodeProto] = field(default_factory=dict)


class _Cutter:
    def __init__(self, converted: Converted, graph: LocalGraph) -> None:
        self.proto, self.graph = converted.model, graph
        flat = self.proto.graph
        self.nodes = list(flat.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in flat.initializer}
        self.infos = {info.name: info for info in (*flat.input, *flat.value_info, *flat.output)}
        self.states = set(converted.states)
        self.inputs = [item.name for item in flat.input if item.name not in self.states]
        taken = {*self.states}
        self.main: dict[str, str] = {}  # flat name of a model input or of a marked value -> main name
        for given, name in zip(self.inputs, converted.inputs, strict=True):
            self.main[given] = _unique(name, taken)
        self.inner: dict[str, str] = {}  # main name of a marked value -> flat name of what is marked
        self.marked: dict[str, str] = {}  # value of the LocalGraph -> main name
        for node in flat.node:
            if node.op_type == BOUNDARY and node.domain == BOUNDARY_DOMAIN:
                value = helper.get_attribute_value(node.attribute[0]).decode()
                self.marked[value] = self.main[node.output[0]] = _unique(value, taken)
                self.inner[self.marked[value]] = node.input[0]
        self.taken = taken
        self.types = {self.main[name]: self.infos[name].type for name in self.main}
        self.shape_names: dict[tuple[str, int, int], str] = {}

    def cut(self) -> Cut:
        cores = []
        for subgraph in self.graph.subgraphs:
            outputs = {self.marked[o.value]: self.inner[self.marked[o.value]]
                       for o in subgraph.outputs if o.value in self.marked}  # fmt: skip
            if outputs:
                cores.append(_Core(subgraph, outputs))
        for core in cores:
            self._collect(core, core.outputs.values())
        sizes: dict[str, onnx.NodeProto] = {}
        for core in cores:
            self._settle(core, cores, sizes)
        pieces = [self._piece(core) for core in cores]
        returned, results = self._results()
        if sizes:
            pieces.insert(0, self._sizes(sizes))
        if results is not None:
            pieces.append(results)
        used = {core.subgraph.name for core in cores}
        opset = next(item.version for item in self.proto.opset_import if item.domain in ("", "ai.onnx"))
        return Cut(
            _ordered(pieces), self.types, tuple(self.main[name] for name in self.inputs), returned,
            tuple(s.name for s in self.graph.subgraphs if s.name not in used), opset,
        )  # fmt: skip

    # Which nodes a piece consists of.

    def _collect(self, core: _Core, starts: Iterable[str]) -> None:
        """Add what the values `starts` are computed from, but leave Shape nodes for later."""
        pending = list(starts)
        while pending:
            name = pending.pop()
            if self.main.get(name) in core.outputs:  # its own output, read by way of the mark
                name = self.inner[self.main[name]]
            if name in self.main or name in self.states or name in self.constants:
                core.reads[name] = None
                continue
            index = self.producer[name]
            node = self.nodes[index]
            if index in core.nodes:
                continue
            if node.op_type in ("Shape", "Size") and not node.domain:
                core.leaves[index] = node
                continue
            core.nodes[index] = node
            pending.extend(_read(node))

    def _settle(self, core: _Core, cores: list[_Core], sizes: dict[str, onnx.NodeProto]) -> None:
        """Decide for each shape that a piece needs whether it computes it itself or is passed it."""
        declared = {self.marked.get(value, value) for value in core.subgraph.inputs}
        while core.leaves:
            index, node = core.leaves.popitem()
            source = node.input[0]
            owner = self._owner(source, core, cores)
            if owner is core or self.main.get(source) in declared or source in self.states:
                core.nodes[index] = node
                self._collect(core, [source])
            elif owner is not None:
                core.shapes[node.output[0]] = self._shape_of(node, self.main.get(source, source), owner.further)
            elif source in self.main:
                core.shapes[node.output[0]] = self._shape_of(node, self.main[source], sizes)
            else:  # computed from shapes alone
                core.nodes[index] = node
                self._collect(core, [source])

    def _owner(self, source: str, core: _Core, cores: list[_Core]) -> _Core | None:
        """The piece that has a tensor; `core` first, None if it is the model's input or nobody's."""
        if source in self.main:
            if source in core.reads:
                return core
            return next((c for c in cores if self.main[source] in c.outputs), None)
        index = self.producer.get(source)
        return core if index in core.nodes else next((c for c in cores if index in c.nodes), None)

    def _shape_of(self, node: onnx.NodeProto, source: str, made: dict[str, onnx.NodeProto]) -> str:
        """The main name of a shape, which `made` computes."""
        start, end = ([a.i for a in node.attribute if a.name == key] or [default]
                      for key, default in (("start", 0), ("end", 2**62)))  # fmt: skip
        key = f"{source}:{node.op_type}", start[0], end[0]
        if key not in self.shape_names:
            name = _unique(f"{node.op_type.lower()}_of_{source}", self.taken)
            self.shape_names[key] = name
            self.types[name] = self.infos[node.output[0]].type
            made[name] = node
        return self.shape_names[key]

    # A piece with its own names.

    def _piece(self, core: _Core) -> Piece:
        nodes = [core.nodes[index] for index in sorted(core.nodes)]
        outputs = (*core.outputs, *core.further)
        names = {name: self.main[name] for name in core.reads if name in self.main}
        names |= core.shapes
        names |= {name: name for name in core.reads if name in self.states}
        used = {*names.values(), *outputs}
        for output, inner in core.outputs.items():
            if inner not in names and inner not in self.constants:
                names[inner] = output
        inside = [name for node in nodes for name in _defined(node)]
        for name in (*(n for n in core.reads if n in self.constants), *inside):
            if name not in names:
                names[name] = _unique(name, used)
        body = [_constant(self.constants[name], names[name]) for name in core.reads if name in self.constants]
        body += [_renamed(node, names) for node in nodes]
        for output, inner in core.outputs.items():
            if names[inner] != output:
                body.append(_identity(names[inner], output))
        for name, node in core.further.items():
            inner = self.inner.get(self.main.get(node.input[0], ""), node.input[0])
            body.append(_renamed(node, {**names, node.input[0]: names[inner], node.output[0]: name}))
        called: set[str] = set()
        for node in body:
            node.name = _unique(node.name or f"{node.op_type}_{node.output[0]}", called)
        values = [names[name] for name in core.reads if name in self.main]
        declared = [self.marked.get(value, self.main.get(value, value)) for value in core.subgraph.inputs]
        ordered = [*(n for n in declared if n in values), *(n for n in values if n not in declared)]
        states = [name for name in core.subgraph.states if name in core.reads]
        states += [name for name in core.reads if name in self.states and name not in states]
        infos = [_info(names[n], self.infos[n].type) for n in inside if n in self.infos and names[n] not in outputs]
        return Piece(core.subgraph.name, core.subgraph, (*ordered, *dict.fromkeys(core.shapes.values())),
                     tuple(states), outputs, tuple(body), tuple(infos))  # fmt: skip

    def _sizes(self, sizes: dict[str, onnx.NodeProto]) -> Piece:
        nodes = [_renamed(node, {**self.main, node.output[0]: name}) for name, node in sizes.items()]
        for node in nodes:
            node.name = node.output[0]
        return Piece(SIZES, None, tuple(dict.fromkeys(n.input[0] for n in nodes)), (), tuple(sizes), tuple(nodes))

    def _results(self) -> tuple[tuple[str, ...], Piece | None]:
        """The names of the model's outputs, and the piece that copies those which no other piece gives."""
        outputs: list[str] = []
        nodes, body = [], list[onnx.NodeProto]()
        for item in self.proto.graph.output:
            flat = item.name
            while flat in self.producer and self.nodes[self.producer[flat]].op_type == "Identity":
                flat = self.nodes[self.producer[flat]].input[0]
            name = self.main.get(flat, flat)
            if name in self.inner and name not in outputs:
                outputs.append(name)
                continue
            if flat in self.constants:
                body.append(_constant(self.constants[flat], _unique(f"{name}_value", self.taken)))
                name = body[-1].output[0]
            outputs.append(_unique(f"{name}_output", self.taken))
            self.types[outputs[-1]] = item.type
            nodes.append(_identity(name, outputs[-1]))
        if not nodes:
            return tuple(outputs), None
        read = dict.fromkeys(node.input[0] for node in nodes if node.input[0] not in {n.output[0] for n in body})
        states = tuple(name for name in read if name in self.states)
        inputs = tuple(name for name in read if name not in self.states)
        given = tuple(node.output[0] for node in nodes)
        return tuple(outputs), Piece(RESULTS, None, inputs, states, given, (*body, *nodes))


def _ordered(pieces: list[Piece]) -> tuple[Piece, ...]:
    """The pieces, each after those that it reads from, otherwise in the order in which they stand."""
    giver = {value: i for i, piece in enumerate(pieces) for value in piece.outputs}
    dag = nx.DiGraph()
    dag.add_nodes_from(range(len(pieces)))
    dag.add_edges_from((giver[value], i) for i, piece in enumerate(pieces) for value in piece.inputs if value in giver)
    return tuple(pieces[i] for i in nx.lexicographical_topological_sort(dag))


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it if it is taken; takes it."""
    chosen, number = name, 0
    while chosen in taken:
        number += 1
        chosen = f"{name}_{number}"
    taken.add(chosen)
    return chosen


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node: branches, loop bodies."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those of the graphs inside it that come from outside included."""
    yield from (name for name in node.input if name)
    for graph in _graphs(node):
        own = {item.name for item in (*graph.input, *graph.initializer)}
        own |= {name for inner in graph.node for name in inner.output}
        read = [name for inner in graph.node for name in _read(inner)] + [item.name for item in graph.output]
        yield from (name for name in read if name not in own)


def _defined(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node gives, in the graphs inside it too."""
    yield from (name for name in node.output if name)
    for graph in _graphs(node):
        yield from (item.name for item in (*graph.input, *graph.initializer))
        for inner in graph.node:
            yield from _defined(inner)


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    _rename(copy, names)
    return copy


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for graph in _graphs(node):
        for item in (*graph.input, *graph.initializer, *graph.output, *graph.value_info):
            item.name = names.get(item.name, item.name)
        for inner in graph.node:
            _rename(inner, names)


def _identity(source: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [source], [name], name=f"Identity_{name}")


def _constant(tensor: onnx.TensorProto, name: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=tensor)


def _info(name: str, type: onnx.TypeProto) -> onnx.ValueInfoProto:
    return helper.make_value_info(name, type)
