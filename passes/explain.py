"""Why a partition is what it is: a sentence for every subgraph."""

from __future__ import annotations

from graphlocal.ir import LocalGraph, Subgraph
from graphlocal.passes.boxes import PRELUDE, TAIL, Labels, complete, is_parametric, module_prefixes
from graphlocal.passes.module_boxes import module_boxes
from graphlocal.passes.policies import WITH_HEADS, Policy
from graphlocal.text import type_label


def explain(graph: LocalGraph, policy: Policy) -> str:
    """For each subgraph of a partitioned graph: why it is one, what it took in, and what crosses its border."""
    policy = "auto" if policy == "blocks" else policy
    reasons: dict[str, str] = {}
    drawn: Labels = {}
    if policy == "auto" or not isinstance(policy, (str, int)):
        drawn = complete(graph, graph.operations, module_boxes(graph, graph.operations, reasons=reasons), light=False)
    width = max(len(s.name) for s in graph.subgraphs)
    lines = [f"{s.name:<{width}}  {_why(graph, s, policy, reasons, drawn)}" for s in graph.subgraphs]
    return "\n".join(lines)


def _why(graph: LocalGraph, subgraph: Subgraph, policy: Policy, reasons: dict[str, str], drawn: Labels) -> str:
    sentences = [_reason(graph, subgraph, policy, reasons, drawn)]
    taken = _taken_in(graph, subgraph)
    if taken:
        sentences.append(f"takes in {', '.join(taken)}")
    crossing = [f"{o.value} {type_label(graph.type(o.value))}" for o in subgraph.outputs]
    sentences.append(f"hands on {', '.join(crossing)}" if crossing else "hands on nothing")
    return "; ".join(sentences)


def _reason(graph: LocalGraph, subgraph: Subgraph, policy: Policy, reasons: dict[str, str], drawn: Labels) -> str:
    if subgraph.name == PRELUDE:
        return "comes before every parameter and serves several subgraphs"
    if subgraph.name == TAIL:
        return "comes after the last parameter"
    if subgraph.regions:
        return f"a part of {subgraph.regions[-1]}, at recursion depth {len(subgraph.regions) + 1}"
    heads = isinstance(policy, str) and WITH_HEADS.fullmatch(policy) is not None
    if heads and not subgraph.name.startswith("segment"):
        return "one of the last layers"
    if heads or isinstance(policy, int):
        share = sum(graph.operation[op].flops for op in subgraph.operations) / max(
            1, sum(o.flops for o in graph.operations)
        )
        return f"segment with {share:.0%} of the cost"
    merged = list(dict.fromkeys(drawn[op] for op in subgraph.operations if op in drawn)) if policy == "auto" else []
    if len(merged) > 1:
        return f"one block: values of more than one of {', '.join(merged)} cross between them, as in a residual block"
    if subgraph.name in reasons:
        return reasons[subgraph.name]
    parametric = sum(is_parametric(graph, graph.operation[op]) for op in subgraph.operations)
    if policy == "auto" and parametric == 1:
        return "one operation with parameters, in the forward of the model itself"
    return "one operation with parameters" if parametric == 1 else f"{parametric} operations with parameters"


def _taken_in(graph: LocalGraph, subgraph: Subgraph) -> list[str]:
    """Modules outside the box's own whose operations joined it."""
    operations = [graph.operation[name] for name in subgraph.operations]
    foreign = [op for op in operations if op.module and subgraph.name not in module_prefixes(op)]
    return list(dict.fromkeys(op.module for op in foreign if not op.module.startswith(subgraph.name)))
