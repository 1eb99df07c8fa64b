"""Random models for property tests: a DAG of small operations over (batch, features) tensors.

`dag_models()` draws a `DagModel`, a frozen description that prints short, shrinks well and builds
the same `nn.Module` every time. Values are numbered: the inputs first, then what each node gives,
one value a node, two for `split`. Every node is an ancestor of an output, the first output depends
on a trainable parameter, and autograd accepts the model as it stands.

In-place nodes (`relu_`, `add_`) change an earlier value, so that all later readers of either
number see the change and earlier ones don't. They are drawn only where autograd allows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 7  # no width is 7: widths are 3 to 6 (the halves of a split down to 1, a concat up to 12)
WIDTHS = st.integers(3, 6)
WIDEST = 12

UNARY = ("tanh", "relu", "sigmoid", "scale", "layernorm", "batchnorm", "average", "dropout")
OWN_WEIGHTS = ("residual", "twice")  # width in, width out
PARAMETRIC = ("linear", "reuse", "tied", "scale", "layernorm", "batchnorm", *OWN_WEIGHTS)
BORROWING = ("reuse", "tied")  # with an earlier linear node's weight
IN_PLACE = ("relu_", "add_")
BINARY = ("add", "multiply", "concat")
OPERATIONS = ("linear", *UNARY, *OWN_WEIGHTS, *BINARY, "split", *BORROWING, *IN_PLACE)

# Autograd saves neither the result of the first nor any operand of the second.
MAY_BE_CHANGED = ("linear", "reuse", "tied", "add", "concat", "layernorm", "batchnorm", "add_")
MAY_READ_BEFORE_A_CHANGE = ("add", "concat", "add_")


@dataclass(frozen=True)
class Node:
    op: str
    sources: tuple[int, ...]  # numbers of the values it reads; the first is what it changes
    size: int = 0  # linear: width of the result; split: width of the first part
    owner: int = 0  # reuse, tied: the index of the linear node whose weight is used


@dataclass(frozen=True)
class DagModel:
    inputs: tuple[int, ...]  # widths
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]  # numbers of values

    def build(self) -> nn.Module:
        """A fresh module in training mode, in float32; the caller seeds."""
        return DagModule(self).train()

    def example(self, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(batch, width, generator=generator).to(dtype) for width in self.inputs)

    def random(self) -> bool:
        """Whether a step draws random numbers."""
        return any(node.op == "dropout" for node in self.nodes)


def loss(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Mean squared distance of every output to fixed values, summed."""
    total = torch.zeros(())
    for leaf in (output,) if isinstance(output, Tensor) else output:
        target = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf)
        total = total + F.mse_loss(leaf, target)
    return total


# The description: widths, value numbers, pruning


def first_values(inputs: tuple[int, ...], nodes: tuple[Node, ...]) -> list[int]:
    """The number of each node's first value."""
    numbers, following = [], len(inputs)
    for node in nodes:
        numbers.append(following)
        following += 2 if node.op == "split" else 1
    return numbers


def value_widths(inputs: tuple[int, ...], nodes: tuple[Node, ...]) -> list[int]:
    widths = list(inputs)
    for node in nodes:
        before = [widths[source] for source in node.sources]
        if node.op in ("linear", *BORROWING):
            widths.append(node.size)
        elif node.op == "concat":
            widths.append(sum(before))
        elif node.op == "split":
            widths.extend([node.size, before[0] - node.size])
        else:
            widths.append(before[0])
    return widths


def makers(inputs: tuple[int, ...], nodes: tuple[Node, ...]) -> list[int | None]:
    """For each value the node that gives it; None for inputs."""
    result: list[int | None] = [None] * len(inputs)
    for index, node in enumerate(nodes):
        result.extend([index] * (2 if node.op == "split" else 1))
    return result


def learns(inputs: tuple[int, ...], nodes: tuple[Node, ...]) -> list[bool]:
    """For each value, whether it depends on a trainable parameter."""
    result = [False] * len(inputs)
    for node in nodes:
        reached = node.op in PARAMETRIC or any(result[source] for source in node.sources)
        result.extend([reached] * (2 if node.op == "split" else 1))
    return result


def pruned(model: DagModel) -> DagModel:
    """The model without the nodes that no output needs; values are numbered anew."""
    maker = makers(model.inputs, model.nodes)
    kept: set[int] = set()
    waiting = [maker[number] for number in model.outputs]
    while waiting:
        index = waiting.pop()
        if index is None or index in kept:
            continue
        kept.add(index)
        waiting.extend(maker[source] for source in model.nodes[index].sources)
    return without(model, [index for index in range(len(model.nodes)) if index not in kept])


def without(model: DagModel, dropped: list[int]) -> DagModel:
    """The model less these nodes; one that borrowed a dropped node's weight gets its own."""
    maker = makers(model.inputs, model.nodes)
    values = [number for number, index in enumerate(maker) if index not in dropped]
    value_number = {old: new for new, old in enumerate(values)}
    indices = [index for index in range(len(model.nodes)) if index not in dropped]
    node_number = {old: new for new, old in enumerate(indices)}
    nodes = []
    for index in indices:
        node = model.nodes[index]
        sources = tuple(value_number[source] for source in node.sources)
        if node.op not in BORROWING:
            nodes.append(Node(node.op, sources, node.size))
        elif node.owner in dropped:
            nodes.append(Node("linear", sources, node.size))
        else:
            nodes.append(Node(node.op, sources, node.size, node_number[node.owner]))
    outputs = tuple(value_number[number] for number in model.outputs)
    return DagModel(model.inputs, tuple(nodes), outputs)


# The strategy


class Drawing:
    """A model half drawn: what may be drawn next depends on what there is."""

    def __init__(self, draw: st.DrawFn, inputs: tuple[int, ...]) -> None:
        self.draw, self.inputs = draw, inputs
        self.nodes: tuple[Node, ...] = ()

    def widths(self) -> list[int]:
        return value_widths(self.inputs, self.nodes)

    def pick(self, numbers: list[int], beside: int | None = None) -> int:
        """One of the values: half of the time, and when shrunk, the newest that nobody reads.

        An operation's first operand, `beside`, counts as read.
        """
        read = {source for node in self.nodes for source in node.sources} | {beside}
        ordered = sorted(numbers, key=lambda number: (number not in read, number), reverse=True)
        return self.draw(st.just(ordered[0]) | st.sampled_from(ordered))

    def aliases(self, number: int) -> set[int]:
        """All numbers of the tensor that value `number` is."""
        same = {number}
        pairs = [
            (node.sources[0], first)
            for node, first in zip(self.nodes, first_values(self.inputs, self.nodes), strict=True)
            if node.op in IN_PLACE
        ]
        for old, new in (*pairs, *reversed(pairs)):
            if old in same or new in same:
                same |= {old, new}
        return same

    def changeable(self) -> list[int]:
        """The values that an in-place node may change."""
        maker = makers(self.inputs, self.nodes)

        def allowed(number: int) -> bool:
            same = self.aliases(number)
            made_by = [maker[alias] for alias in same]
            readers = [node for node in self.nodes if same & set(node.sources)]
            return all(index is not None and self.nodes[index].op in MAY_BE_CHANGED for index in made_by) and all(
                node.op in MAY_READ_BEFORE_A_CHANGE for node in readers
            )

        return [number for number in range(len(maker)) if allowed(number)]

    def linears(self, width: int, op: str) -> list[int]:
        """Linear nodes whose weight (or its transpose) takes an input of this width."""
        widths = self.widths()
        return [
            index
            for index, node in enumerate(self.nodes)
            if node.op == "linear" and width == (widths[node.sources[0]] if op == "reuse" else node.size)
        ]

    def node(self) -> Node:
        """The next node; where the drawn operation doesn't fit, a linear one."""
        op = self.draw(st.sampled_from(OPERATIONS))
        widths = self.widths()
        first = self.pick(list(range(len(widths))))
        if op in IN_PLACE and self.changeable():
            first = self.pick(self.changeable())
            return Node(op, self.pair(first) if op == "add_" else (first,))
        if op in ("add", "multiply"):
            return Node(op, self.pair(first))
        if op == "concat":
            fitting = [n for n, width in enumerate(widths) if width + widths[first] <= WIDEST]
            if fitting:
                return Node(op, (first, self.pick(fitting, beside=first)))
        if op == "split" and widths[first] > 1:
            return Node(op, (first,), self.draw(st.integers(1, widths[first] - 1)))
        if op in BORROWING and self.linears(widths[first], op):
            return self.borrowing(op, first)
        if op in UNARY or op in OWN_WEIGHTS:
            return Node(op, (first,))
        return Node("linear", (first,), self.draw(WIDTHS))

    def pair(self, first: int) -> tuple[int, int]:
        """`first` and a value of the same width, perhaps itself."""
        widths = self.widths()
        fitting = [n for n, width in enumerate(widths) if width == widths[first]]
        return first, self.pick(fitting, beside=first)

    def borrowing(self, op: str, first: int) -> Node:
        widths = self.widths()
        owner = self.draw(st.sampled_from(self.linears(widths[first], op)))
        linear = self.nodes[owner]
        size = linear.size if op == "reuse" else widths[linear.sources[0]]
        return Node(op, (first,), size, owner)


@st.composite
def dag_models(draw: st.DrawFn, max_nodes: int = 12) -> DagModel:
    """A random model of 2 to `max_nodes` nodes, 1 or 2 inputs and 1 or 2 outputs."""
    drawing = Drawing(draw, tuple(draw(st.lists(WIDTHS, min_size=1, max_size=2))))
    drawing.nodes = (Node("linear", (0,), draw(WIDTHS)),)
    for _ in range(draw(st.integers(1, max_nodes - 1))):
        drawing.nodes = (*drawing.nodes, drawing.node())
    trained = [n for n, reached in enumerate(learns(drawing.inputs, drawing.nodes)) if reached]
    outputs = trained[-1:]
    others = [n for n in range(len(drawing.inputs), len(drawing.widths())) if n not in outputs]
    if draw(st.booleans()) and others:
        outputs.append(drawing.pick(others))
    model = pruned(DagModel(drawing.inputs, drawing.nodes, tuple(outputs)))
    if len(model.nodes) > 1:
        return model
    nodes = (*model.nodes, Node("tanh", model.outputs[:1]))
    return DagModel(model.inputs, nodes, (len(model.inputs) + 1,))


# The module


class Average(nn.Module):
    """Subtracts a moving average of its input, kept in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


LAYERS = {
    "tanh": lambda width: nn.Tanh(),
    "relu": lambda width: nn.ReLU(),
    "sigmoid": lambda width: nn.Sigmoid(),
    "relu_": lambda width: nn.ReLU(inplace=True),
    "dropout": lambda width: nn.Dropout(0.25),
    "scale": Scale,
    "average": Average,
    "layernorm": nn.LayerNorm,
    "batchnorm": nn.BatchNorm1d,
    "residual": lambda width: nn.Linear(width, width),
    "twice": lambda width: nn.Linear(width, width),
}


class DagModule(nn.Module):
    def __init__(self, model: DagModel) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleDict()
        widths = value_widths(model.inputs, model.nodes)
        for index, node in enumerate(model.nodes):
            width = widths[node.sources[0]]
            if node.op == "linear":
                self.layers[str(index)] = nn.Linear(width, node.size)
            elif node.op in LAYERS:
                self.layers[str(index)] = LAYERS[node.op](width)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        values = [x] if y is None else [x, y]
        for index, node in enumerate(self.model.nodes):
            result = self.run(index, node, *[values[source] for source in node.sources])
            values.extend([result] if isinstance(result, Tensor) else result)
        outputs = tuple(values[number] for number in self.model.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def run(self, index: int, node: Node, *operands: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = operands[0]
        if node.op == "add":
            return x + operands[1]
        if node.op == "add_":
            return x.add_(operands[1])
        if node.op == "multiply":
            return x * operands[1]
        if node.op == "concat":
            return torch.cat(operands, 1)
        if node.op == "split":
            return x.split([node.size, x.shape[1] - node.size], 1)
        layer = self.layers[str(node.owner if node.op in BORROWING else index)]
        if node.op == "tied":
            return F.linear(x, layer.weight.t())
        if node.op == "residual":
            return x + torch.tanh(layer(x))
        if node.op == "twice":
            return layer(torch.tanh(layer(x)))
        return layer(x)
