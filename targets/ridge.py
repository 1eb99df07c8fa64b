"""The closed-form update of a subgraph that is one linear layer: damped ridge regression onto its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.ir import Representation, Subgraph
from graphlocal.rules.nlp import NLP
from graphlocal.targets.bodies import subgraph_body
from graphlocal.targets.nodes import Nodes, Run


class Ridge:
    """The linear layer of one subgraph: q = U W^T + b, with trainable W (and b) that nothing else reads.

    value: the node whose pre-activation q is. Raises InputError, naming the operation, for any other subgraph.
    """

    def __init__(self, nodes: Nodes, subgraph: Subgraph, values: Sequence[str]) -> None:
        self.nodes, self.subgraph = nodes, subgraph
        graph = nodes.graph
        made = [output for output in subgraph.outputs if output.value in values]
        trainable = graph.trainable(subgraph)
        op = graph.operation[made[0].preactivation if len(made) == 1 else subgraph.operations[-1]]
        shared = [s for s in graph.subgraphs if s is not subgraph and set(graph.trainable(s)) & set(trainable)]
        if len(made) != 1 or not op.target.startswith("aten.linear") or op.states != trainable or shared:
            raise InputError(
                f"the subgraph {subgraph.name!r} has no ridge update",
                where=", ".join(part for part in (op.module, op.source) if part),
                why=f"its parameters are those of {shared[0].name!r} too"
                if shared
                else f"its pre-activation {op.name!r} ({op.target}) is no linear layer that holds all its parameters",
                remedy="use NLP(update='gradient'), or compile with partition='leaf' for one layer a subgraph",
            )
        self.value = made[0].value
        source = next(name for name in op.inputs if name not in op.states)
        self._source = source
        inner = replace(subgraph, outputs=(Representation(source, source, -1),))
        self._body = None if source in subgraph.inputs else subgraph_body(nodes.traced.module, graph, inner)
        node = next(n for n in nodes.traced.module.graph.nodes if n.name == op.name)
        self.weight, self.bias = str(node.args[1].target), (str(node.args[2].target) if len(node.args) > 2 else None)

    def solve(self, run: Run, target: Tensor, rule: NLP) -> Tensor:
        """A + step (A* - A), with the bias as the last column."""
        with torch.no_grad():
            U = self._features(run).flatten(0, -2)
            Y = target.flatten(0, -2)
            A: Tensor = self.nodes.state(self.weight)
            if self.bias is not None:
                A = torch.cat([A, self.nodes.state(self.bias).unsqueeze(1)], 1)
                U = torch.cat([U, U.new_ones(len(U), 1)], 1)
            eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
            gram, cross = U.T @ U / len(U) + rule.mu * eye, Y.T @ U / len(U) + rule.mu * A
            best: Tensor = torch.linalg.solve(gram, cross, left=False)
            return A + rule.step * (best - A)

    def write(self, A: Tensor) -> None:
        """Put the solution into the layer."""
        with torch.no_grad():
            weight = self.nodes.state(self.weight)
            weight.copy_(A[:, : weight.shape[1]])
            if self.bias is not None:
                self.nodes.state(self.bias).copy_(A[:, -1])

    def _features(self, run: Run) -> Tensor:
        if self._body is None:
            features = run.inputs[self._source]
        else:
            states = map(self.nodes.state, self.subgraph.states)
            (features,) = self._body(*run.inputs.values(), *states)
        assert isinstance(features, Tensor)
        return features
