"""The rule `auto`: feedback maps that are fitted to true gradients on every N-th step, and no message else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import networkx as nx

from graphlocal.errors import InputError
from graphlocal.ir import Connection, LocalGraph, Operation, Subgraph
from graphlocal.rules.base import Calibration, Rule, features, loss_connections, normalizes, vjp_connections
from graphlocal.rules.wiring import feedback_connection, values_from_parameters
from graphlocal.verify import learning_values


@dataclass(frozen=True)
class Calibrated(Rule):
    """Calibrated feedback: e_v = sum_j E_{j->v} (phi'(h_j) e_j), update VJP(e_v).

    Every `every`-th training step is one of backpropagation on the same subgraphs. Its true gradients are that step's
    update, and each E is refitted to them by ridge regression (`graphlocal.fitting`), so that E is the best linear
    prediction of the gradient at v from the errors of its sources. In all other steps no vector-Jacobian product
    crosses a subgraph's boundary, but for those that hand the error of the output to what the last layers read.

    segments: what `partition="auto"` stands for: segments whose costs have these proportions, from the input up, and
    the model's last layers by themselves (`partition="3:1+head"`). A map that stands for a quarter of the model is far
    better than one for half of it, and much better than a chain of maps, in which errors add up: so (3, 1) is the most
    exact, and (1, 1) and then repeated blocks (`partition="blocks"`, also what () and wiring="skip" stand for) update
    more at one time.

    wiring: `"chain"` takes each error from the subgraphs that read the value: one cheap map after another, after which
    all updates are independent. `"skip"` takes it from the last representations at once: more parallel, less exact on
    convolutions.

    Between maps of positions E is a convolution (strides and poolings are bridged), else a linear map on features, the
    same for all positions. window: its size; a single convolution's own, if that is smaller. pooled: E reads of each
    window the position and the mean, (E e)(p) = A e(p) + B mean_{q in window(p)} e(q) + C mean_q e(q), so that it costs
    two products of features instead of window^2, and fits from fewer rows; None: but for the maps that stand for a
    single convolution, which have no C and lose by it. max_inputs: E is pooled in any case where it would read more
    values than this for each position.

    forgetting, ridge, rows: of the regression; rows bounds how many positions a step takes into it.

    A number of segments as partition puts the last layer into the last segment, whose whole derivative then hands the
    error of the output down: with `partition=2` the rule is backpropagation.

    A subgraph that does nothing but normalize (`partition="leaf"` makes such) hands its error down by its own
    derivative: that takes the mean and the part along the output out of an error, which no linear map can, and one
    such map through a BatchNorm is 60 degrees off.

    Each value keeps the second moments of what its maps read, (inputs x inputs) numbers. E starts at zero and is
    fitted in the first step. Raises InputError for options out of range.
    """

    name: ClassVar[str] = "auto"
    every: int = 10
    wiring: Literal["chain", "skip"] = "chain"
    window: int = 3
    max_inputs: int = 1280
    forgetting: float = 0.8
    ridge: float = 1e-3
    rows: int = 2048
    pooled: bool | None = None
    segments: tuple[int, ...] = (3, 1)

    def __post_init__(self) -> None:
        if self.wiring not in ("chain", "skip"):
            raise InputError(f"Calibrated(wiring={self.wiring!r})", remedy="use 'chain' or 'skip'")
        for option in ("every", "window", "max_inputs", "rows"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"Calibrated({option}={value!r})", why="it is a count, 1 or more")
        shares = self.segments if isinstance(self.segments, tuple) else (0,)
        if not all(isinstance(share, int) and share > 0 for share in shares):
            raise InputError(
                f"Calibrated(segments={self.segments!r})", remedy="pass proportions, such as (3, 1), or ()"
            )
        if self.window % 2 == 0:
            raise InputError(f"Calibrated(window={self.window})", why="a window has a middle", remedy="use an odd size")
        numbers = all(isinstance(value, (int, float)) for value in (self.forgetting, self.ridge))
        if not numbers or not (0 <= self.forgetting < 1 and self.ridge > 0):
            raise InputError(
                f"Calibrated(forgetting={self.forgetting!r}, ridge={self.ridge!r})",
                why="forgetting is in [0, 1), and the ridge is above 0",
            )

    @property
    def feeds(self) -> Literal["preactivation", "representation"]:
        return "representation"

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.every, self.forgetting, self.ridge, self.rows)

    def preferred_partition(self, graph: LocalGraph) -> str | int:
        shares = self.segments if self.wiring == "chain" else ()
        return (
            f"{':'.join(map(str, shares))}+head" if len(shares) > 1 else f"{len(shares)}+head" if shares else "blocks"
        )

    def connect(self, graph: LocalGraph) -> tuple[Connection, ...]:
        exact, senders = _output_error(graph)
        sources = list(dict.fromkeys(c.target for c in exact if c.target not in senders and c.kind == "vjp"))
        learning, wired = learning_values(graph), {(c.source, c.value) for c in exact}
        connections = dict.fromkeys(exact)
        for neuron in graph.error_neurons:
            for value in neuron.values:
                if value not in learning:
                    continue
                readers = [r.name for r in graph.readers.get(value, ()) if r.name in graph.neuron]
                below = [name for name in readers if (name, value) not in wired]
                normalized = all(_only_normalizes(graph, name, value) for name in below)
                if self.wiring == "skip" and below and not normalized and neuron.subgraph not in sources:
                    below = _above(graph, sources, neuron.subgraph) or below
                for source in below:
                    connections.update(dict.fromkeys(self._maps(graph, source, neuron.subgraph, value)))
        return tuple(connections)

    def _maps(self, graph: LocalGraph, source: str, target: str, value: str) -> list[Connection]:
        """The maps from all errors of one subgraph to a value.

        Its own derivative where a size is not fixed, or where all it does is to normalize.
        """
        sources = graph.neuron[source].values
        fixed = all(isinstance(features(graph, v), int) for v in (value, *sources))
        if not fixed or _only_normalizes(graph, source, value):
            return [c for c in vjp_connections(graph, source) if (c.target, c.value) == (target, value)]
        drawn = [feedback_connection(graph, source, v, target, value, depth=1) for v in sources]
        return [self._with_window(graph, replace(c, fitted=True)) for c in drawn]

    def _with_window(self, graph: LocalGraph, connection: Connection) -> Connection:
        """The connection with the window that its map reads, if both ends are maps of positions."""
        shapes = []
        for value in (connection.source_value, connection.value):
            known = graph.type(value)
            assert known is not None
            shapes.append(known.shape if graph.representation[value].axis == 1 else ())
        if {len(shape) for shape in shapes} not in ({3}, {4}):
            return connection
        window = (self.window,) * (len(shapes[0]) - 2)
        reach = _reach(graph, graph.subgraph[connection.source], len(window))
        local = reach is not None and max(reach) <= self.window
        if local and reach is not None:
            window = reach
        many = connection.weight[-1] * math.prod(window) > self.max_inputs
        pooled = math.prod(window) > 1 and (many or (not local if self.pooled is None else self.pooled))
        return replace(connection, window=window, pooled=pooled, local=local)


def _output_error(graph: LocalGraph) -> tuple[list[Connection], set[str]]:
    """The loss's gradient, and the derivatives by which the last subgraphs hand it to what they read.

    The last subgraphs with parameters on each way do, and those without parameters above them and just below them,
    as far as nothing else reads them. Returns the connections and who sends.
    """
    connections = list(loss_connections(graph))
    readers = {
        name: {r.name for v in graph.neuron[name].values for r in graph.readers.get(v, ()) if r.name in graph.neuron}
        for name in graph.neuron
    }
    pending = [name for name in dict.fromkeys(c.target for c in connections) if not readers[name]]
    past_parameters: set[str] = set()
    for name in pending:  # grows while it is walked
        if graph.trainable(graph.subgraph[name]) or readers[name] & past_parameters:
            past_parameters.add(name)
        for connection in vjp_connections(graph, name):
            connections.append(connection)
            target = connection.target
            hands_on = name not in past_parameters or not graph.trainable(graph.subgraph[target])
            if hands_on and target not in pending and readers[target] <= set(pending):
                pending.append(target)
    known = {c.name for c in connections}
    return [*connections, *(c for c in values_from_parameters(graph) if c.name not in known)], set(pending)


def _only_normalizes(graph: LocalGraph, source: str, value: str) -> bool:
    """Whether a subgraph reads the value, and all it does is to normalize, to add, and what is elementwise."""
    subgraph = graph.subgraph[source]
    operations = [graph.operation[name] for name in subgraph.operations if not _counts(graph.operation[name])]
    cheap = all(normalizes(op) or op.pointwise or _ADDS.match(op.target) for op in operations)
    return value in subgraph.inputs and cheap and any(map(normalizes, operations))


def _counts(op: Operation) -> bool:
    """Whether an operation computes no floats, such as the number of batches that a BatchNorm saw."""
    return op.type is not None and not op.type.is_float


_ADDS = re.compile(r"aten\.(add|dropout|feature_dropout)\b")
_CONVOLVES = re.compile(r"aten\.(conv\dd|convolution)\b")


def _reach(graph: LocalGraph, subgraph: Subgraph, axes: int) -> tuple[int, ...] | None:
    """The window of one convolution, whose sizes are odd; None for a subgraph that does anything more to positions."""
    operations = [graph.operation[name] for name in subgraph.operations if not _counts(graph.operation[name])]
    convolutions = [op for op in operations if _CONVOLVES.match(op.target)]
    if len(convolutions) != 1 or not all(
        op in convolutions or op.pointwise or _ADDS.match(op.target) for op in operations
    ):
        return None
    kernels = [graph.state[name].type.shape[2:] for name in convolutions[0].states]
    (kernel,) = [kernel for kernel in kernels if len(kernel) == axes] or [()]
    sizes = tuple(size for size in kernel if isinstance(size, int) and size % 2)
    return sizes if len(sizes) == axes else None


def _above(graph: LocalGraph, sources: list[str], name: str) -> list[str]:
    after = nx.descendants(graph.quotient, name)
    return [source for source in sources if source in after]
