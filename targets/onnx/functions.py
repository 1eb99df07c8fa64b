"""Pieces as ONNX model-local functions, named after their subgraphs, with what they mean as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping

import onnx
from onnx import helper

from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.targets.onnx.cut import Piece

DOMAIN = "graphlocal.subgraph"
"""The domain of the functions; a function's name is its subgraph's."""

PREFIX = "graphlocal."
"""What the keys of all metadata begin with."""


def function(piece: Piece, graph: LocalGraph, opset: int) -> onnx.FunctionProto:
    """A subgraph's piece as a function of its inputs, then its states."""
    assert piece.subgraph is not None
    domains = {node.domain for node in piece.nodes} - {""}
    made = helper.make_function(
        DOMAIN, piece.name, [*piece.inputs, *piece.states], list(piece.outputs), list(piece.nodes),
        [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))],
        doc_string=description(graph, piece.subgraph), value_info=list(piece.infos),
    )  # fmt: skip
    set_metadata(made, subgraph_metadata(graph, piece.subgraph))
    return made


def call(piece: Piece, graph: LocalGraph) -> onnx.NodeProto:
    """The node of the main graph that runs a subgraph's function; it knows the subgraph's place in learning."""
    assert piece.subgraph is not None
    node = helper.make_node(
        piece.name, [*piece.inputs, *piece.states], list(piece.outputs), name=piece.name, domain=DOMAIN,
        doc_string=description(graph, piece.subgraph),
    )  # fmt: skip
    set_metadata(node, {**subgraph_metadata(graph, piece.subgraph), **learning_metadata(graph, piece.subgraph)})
    return node


def subgraph_metadata(graph: LocalGraph, subgraph: Subgraph) -> dict[str, str]:
    """Where a subgraph comes from and what its values mean; lists are JSON."""
    modules = list(dict.fromkeys(graph.operation[name].module for name in subgraph.operations))
    sources = dict.fromkeys(graph.operation[name].source for name in subgraph.operations)
    return {
        "number": str(graph.number[subgraph.name]),
        "module": module_path(modules),
        "modules": json.dumps(modules),
        "regions": json.dumps(subgraph.regions),
        "operations": json.dumps(subgraph.operations),
        "representations": json.dumps([output.value for output in subgraph.outputs]),
        "preactivations": json.dumps([output.preactivation for output in subgraph.outputs]),
        "parameters": json.dumps([n for n in subgraph.states if graph.state[n].kind == "parameter"]),
        "trainable": json.dumps(graph.trainable(subgraph)),
        "buffers": json.dumps([n for n in subgraph.states if graph.state[n].kind != "parameter"]),
        "source": json.dumps([source for source in sources if source]),
    }


def learning_metadata(graph: LocalGraph, subgraph: Subgraph) -> dict[str, str]:
    """The subgraph's error neuron, what arrives at it, and its actions in the schedule; {} if it has no neuron."""
    if subgraph.name not in graph.neuron:
        return {}
    number = graph.number[subgraph.name]
    actions = {str(action): action.step for action in graph.schedule if action.subgraph == number}
    return {
        "error_neuron": json.dumps(graph.neuron[subgraph.name].values),
        "errors_from": json.dumps([connection.name for connection in graph.incoming(subgraph.name)]),
        "schedule": json.dumps(actions),
    }


def description(graph: LocalGraph, subgraph: Subgraph) -> str:
    """One sentence for people who open the file."""
    modules = [graph.operation[name].module for name in subgraph.operations]
    path = module_path(list(dict.fromkeys(modules)))
    represented = ", ".join(output.value for output in subgraph.outputs)
    learns = f", learns {len(graph.trainable(subgraph))} parameters" if graph.trainable(subgraph) else ""
    place = f" of module {path}" if path else ""
    return (
        f"Subgraph {graph.number[subgraph.name]}{place}: {len(subgraph.operations)} operations{learns}; "
        f"represents {represented}"
    )


def module_path(modules: list[str]) -> str:
    """The innermost module that holds all of `modules`."""
    parts = [path.split(".") for path in modules] or [[""]]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return ".".join(parts[0][:shared])


def set_metadata(holder: onnx.ModelProto | onnx.FunctionProto | onnx.NodeProto, data: Mapping[str, str]) -> None:
    """Write metadata, its keys below `PREFIX`."""
    for key, value in data.items():
        holder.metadata_props.add(key=f"{PREFIX}{key}", value=value)
