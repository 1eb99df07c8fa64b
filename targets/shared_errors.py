"""Weight gradients from an error that all positions share, on a lowered graph.

A skip-error from class logits sends every position of an image or a sequence the same displacement, and where phi is
the identity that is the local error: e(n, p) = e(n). The gradient of a weight then needs its input summed over the
positions only, sum_np e(n) x(n, p) = sum_n e(n) (sum_p x(n, p)): a product over samples in place of one over all
positions. A convolution's reads one sum for each place in its window. The sums are taken in the forward pass, and x is
not kept for the update. Backpropagation has no such errors to save by.

The numbers are the same but for the order of their sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphlocal.targets.simplify import VIEWS
from graphlocal.targets.training_graph import TrainingGraph

aten = torch.ops.aten

SUMMED = "summed"
"""In the `meta` of a sum that the forward pass takes so that what it is taken of need not be kept."""

ENOUGH = 4
"""Positions below which a sum of its own costs more than it saves."""

_MOVES = {aten.clone.default, aten.transpose.int, aten.permute.default, aten._to_copy.default}
_SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

LARGEST = 2**22
"""Numbers in the largest table of a convolution's windows."""


def sum_positions(training: TrainingGraph) -> int:
    """Rewrite the gradients of shared errors, in place; returns how many values are computed otherwise.

    Nothing before the loss is computed otherwise, and nothing in float16, which may hold every input and not their sum.
    bfloat16 holds that: to as many places as the error that it is multiplied with.
    """
    rewriting = _Rewriting(training)
    for node in list(rewriting.after):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None and _known(node):
            rewrite(rewriting, node)
    if rewriting.done:
        training.module.graph.eliminate_dead_code()
        training.module.recompile()
    return rewriting.done


@dataclass(frozen=True)
class _Rows:
    """The different rows of a matrix whose rows are samples and positions; all sizes of those, and the shared axes."""

    matrix: fx.Node
    sizes: tuple[int, ...]
    shared: tuple[int, ...]


class _Rewriting:
    """done: how many nodes were replaced."""

    def __init__(self, training: TrainingGraph) -> None:
        self.module, self.graph, self.done = training.module, training.module.graph, 0
        nodes = list(self.graph.nodes)
        loss = next(i for i, node in enumerate(nodes) if node.name == training.loss)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.forward, self.after = set(nodes[:loss]), nodes[loss + 1 :]
        self.written = _written(self.after)
        self.cores: dict[fx.Node, fx.Node | None] = {}
        self.known_rows: dict[fx.Node, _Rows | None] = {}
        self.sums: dict[Any, fx.Node] = {}
        self.windows: dict[Any, str] = {}

    def core(self, node: Any) -> fx.Node | None:
        """The node of size 1 along the axes that a value is constant along, of which the value is the expansion."""
        if not isinstance(node, fx.Node) or node in self.forward or node in self.written or not _known(node):
            return None
        if not isinstance(_value(node), Tensor) or _value(node).dtype not in _DTYPES:
            return None
        if node not in self.cores:
            self.cores[node] = self._core(node)
        return self.cores[node]

    def _core(self, node: fx.Node) -> fx.Node | None:
        x: Any = node.args[0] if node.args else None
        if node.target is aten.expand.default:
            if not _known(x) or x in self.written or _value(x).dim() != _value(node).dim():
                return None
            return x if math.prod(_repeats(node, x)) >= ENOUGH else None
        scales = node.target in _SCALES and not node.kwargs and _is_number(node.args[1])
        if not scales and node.target not in _MOVES:
            return None
        core = self.core(x)
        if core is None or node.target is aten.clone.default:
            return core
        options: dict[str, Any] = dict(node.kwargs)
        return self.new(node, node.target, core, *node.args[1:], **options)

    def new(self, like: fx.Node, target: Any, *args: Any, action: str | None = None, **options: Any) -> fx.Node:
        """A node just before `like`, of the same action by default, with its value on tensors without data."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, options)
        action = like.meta.get("action", "") if action is None else action
        node.meta = {"action": action, "val": target(*fx.map_arg(args, _value), **options)}
        return node

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)
        self.done += 1

    def replace_results(self, node: fx.Node, by: dict[int, fx.Node]) -> None:
        """The same for the results of an operator that has several."""
        for taken in list(node.users):
            self.replace(taken, by[cast("int", taken.args[1])])

    def where_read(self, update: fx.Node, x: fx.Node) -> fx.Node:
        """Where the subgraph of an update reads x in the forward pass, and x holds what it reads; else the update."""
        action = f"F{update.meta.get('action', '')[1:]}"
        readers = [node for node in x.users if node in self.forward and node.meta.get("action") == action]
        return max(readers, key=self.order.__getitem__, default=update)

    def constant(self, like: fx.Node, name: str) -> fx.Node:
        """A table among the constants of the graph."""
        with self.graph.inserting_before(like):
            node = self.graph.get_attr(f"lifted.{name}")
        node.meta = {"val": self.module.get_submodule("lifted").get_buffer(name)}
        return node

    # The operators that read an error.

    def total(self, node: fx.Node) -> None:
        """A sum over axes that hold all the positions: the gradient of a bias."""
        x, axes, *rest = cast("tuple[Any, ...]", node.args)
        rows, found = self.rows(x), self.core(x)
        if node.kwargs or not axes:
            return
        if rows is not None and axes == [0]:
            core, count = rows.matrix, math.prod(rows.sizes[axis] for axis in rows.shared)
        elif found is not None and _shared_axes(x, found) <= {axis % _value(found).dim() for axis in axes}:
            core, count = found, math.prod(_repeats(x, found))
        else:
            return
        self.replace(node, self.sum_of_all(node, core, axes, count, *rest))

    def sum_of_all(self, like: fx.Node, core: fx.Node, axes: Sequence[int], count: int, *keepdim: bool) -> fx.Node:
        """The sum over axes of a value that repeats its core so many times."""
        return self.new(like, aten.mul.Tensor, self.new(like, aten.sum.dim_IntList, core, axes, *keepdim), float(count))

    def product(self, node: fx.Node) -> None:
        """error^T x, or x^T error, over rows that are samples and positions: the gradient of an affine weight."""
        left, right = cast("tuple[Any, ...]", node.args)
        handed_down = self.rows(left)
        if handed_down is not None:
            self.replace(node, self.repeated(node, handed_down))
            return
        if not isinstance(left, fx.Node) or left.target is not aten.t.default:
            return
        turned = self.rows(left.args[0])
        straight = self.rows(right)
        if turned is not None:
            summed = self.summed(node, right, turned)
            self.replace(node, self.new(node, aten.mm.default, self.new(node, aten.t.default, turned.matrix), summed))
        elif straight is not None:
            summed = self.summed(node, left.args[0], straight)
            self.replace(node, self.new(node, aten.mm.default, self.new(node, aten.t.default, summed), straight.matrix))

    def rows(self, node: Any) -> _Rows | None:
        """A matrix whose rows are samples and positions, if positions share theirs."""
        if not isinstance(node, fx.Node) or node.target not in (aten.view.default, aten._unsafe_view.default):
            return None
        if node not in self.known_rows:
            self.known_rows[node] = self._rows(node)
        return self.known_rows[node]

    def _rows(self, node: fx.Node) -> _Rows | None:
        inner: Any = node.args[0]
        core = self.core(inner)
        if core is None or _value(node).dim() != 2:
            return None
        *sizes, features = _value(inner).shape
        shared = _shared_axes(inner, core)
        if _value(node).shape[1] != features or len(sizes) in shared:
            return None
        different = math.prod(size for axis, size in enumerate(sizes) if axis not in shared)
        matrix = self.new(node, aten.reshape.default, core, [different, features])
        return _Rows(matrix, tuple(sizes), tuple(sorted(shared)))

    def repeated(self, node: fx.Node, rows: _Rows) -> fx.Node:
        """Error W, which an affine operation hands to its input: worked out for the different rows."""
        features = _value(node).shape[1]
        message = self.new(node, aten.mm.default, rows.matrix, node.args[1])
        once = [1 if axis in rows.shared else size for axis, size in enumerate(rows.sizes)]
        placed = self.new(node, aten.reshape.default, message, [*once, features])
        spread = self.new(node, aten.expand.default, placed, [*rows.sizes, features])
        return self.new(node, aten.reshape.default, spread, [-1, features])

    def summed(self, update: fx.Node, x: Any, rows: _Rows) -> fx.Node:
        """The other factor's rows, summed over the axes that the error's rows share."""
        key = x, rows.sizes, rows.shared
        if key not in self.sums:
            features, at = _value(x).shape[1], self.where_read(update, x)
            placed = self.new(at, aten.reshape.default, x, [*rows.sizes, features])
            total = self.new(at, aten.sum.dim_IntList, placed, list(rows.shared))
            self.sums[key] = self.new(at, aten.reshape.default, total, [-1, features])
            self.sums[key].meta[SUMMED] = True
        return self.sums[key]

    def normalization(self, node: fx.Node) -> None:
        """The gradients of a layer norm's weight and bias; not in bfloat16, where torch's own are off by a third."""
        error, x, normalized, mean, scale, _, _, (for_x, for_weight, for_bias) = cast("tuple[Any, ...]", node.args)
        core = self.core(error)
        kinds = {_value(value).dtype for value in (x, mean, scale)} if core is not None else set()
        if core is None or for_x or len(kinds) != 1 or torch.bfloat16 in kinds or _value(mean).dim() != _value(x).dim():
            return
        shared = _shared_axes(error, core)
        samples = list(range(_value(x).dim() - len(normalized)))
        if not shared <= set(samples):
            return
        parts = {}
        if for_weight:
            at, action = (scale.next if scale in self.forward else node), scale.meta.get("action", "")
            centred = self.new(at, aten.sub.Tensor, x, mean, action=action)
            normal = self.new(at, aten.mul.Tensor, centred, scale, action=action)
            sums = self.new(at, aten.sum.dim_IntList, normal, sorted(shared), True, action=action)
            sums.meta[SUMMED] = True
            parts[1] = self.new(node, aten.sum.dim_IntList, self.new(node, aten.mul.Tensor, core, sums), samples)
        if for_bias:
            parts[2] = self.sum_of_all(node, core, samples, math.prod(_repeats(error, core)))
        self.replace_results(node, parts)

    def convolution(self, node: fx.Node) -> None:
        """The gradients of a convolution's weight and bias."""
        arguments = cast("tuple[Any, ...]", node.args)
        error, x, weight, _, stride, padding, dilation, transposed, _, groups, (for_x, _, for_bias) = arguments
        core = self.core(error)
        if core is None or for_x or transposed or not _known(x) or not _value(weight).is_contiguous():
            return
        samples, channels, *image = _value(x).shape
        _, _, *window = _value(weight).shape
        outer = _value(error).shape[2:]
        features = _value(error).shape[1]
        if list(_value(core).shape) != [samples, features, *([1] * len(image))]:
            return
        if not len(stride) == len(padding) == len(dilation) == len(window):
            return
        if math.prod(image) * math.prod(window) > LARGEST:
            return
        places = math.prod(window)
        geometry = map(tuple, (image, window, stride, padding, dilation))
        key: Any = (*geometry, _value(x).dtype, _value(x).device)
        if key not in self.windows:
            self.windows[key] = f"windows{len(self.windows)}"
            table = _windows(image, outer, window, stride, padding, dilation).to(_value(x).device, _value(x).dtype)
            self.module.get_submodule("lifted").register_buffer(self.windows[key], table)
        at = self.where_read(node, x)
        flat = self.new(at, aten.reshape.default, x, [samples * channels, math.prod(image)])
        sums = self.new(at, aten.mm.default, flat, self.constant(at, self.windows[key]))
        sums.meta[SUMMED] = True
        error_rows = self.new(node, aten.reshape.default, core, [samples, groups, features // groups])
        input_rows = self.new(node, aten.reshape.default, sums, [samples, groups, channels // groups * places])
        turned = self.new(node, aten.permute.default, error_rows, [1, 2, 0])
        placed = self.new(node, aten.permute.default, input_rows, [1, 0, 2])
        found = self.new(node, aten.bmm.default, turned, placed)
        gradient = self.new(node, aten.reshape.default, found, list(_value(weight).shape))
        parts = {1: gradient}
        if for_bias:
            axes = [0, *range(2, _value(core).dim())]
            parts[2] = self.sum_of_all(node, core, axes, math.prod(outer))
        self.replace_results(node, parts)


_REWRITES: dict[Any, Any] = {
    aten.sum.dim_IntList: _Rewriting.total,
    aten.mm.default: _Rewriting.product,
    aten.native_layer_norm_backward.default: _Rewriting.normalization,
    aten.convolution_backward.default: _Rewriting.convolution,
}


def _value(node: Any) -> Any:
    return node.meta["val"]


def _known(node: fx.Node) -> bool:
    """Whether a node's value is a tensor (or several) whose sizes are all numbers."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, Tensor) for v in values) and all(
        type(size) is int for v in values if isinstance(v, Tensor) for size in v.shape
    )


def _written(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The values whose memory operators change, as far as views lead back to them."""
    found: set[fx.Node] = set()
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            pending = [x for x in node.all_input_nodes if x not in found]
            while pending:
                value = pending.pop()
                found.add(value)
                pending += [x for x in value.all_input_nodes[:1] if value.target in VIEWS and x not in found]
    return found


def _is_number(value: Any) -> bool:
    """Whether an argument is a number, or a node of a tensor of one."""
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), Tensor) and _value(value).dim() == 0
    return isinstance(value, (int, float))


def _repeats(node: Any, core: fx.Node) -> list[int]:
    """How often each axis of a value repeats its core."""
    pairs = zip(_value(node).shape, _value(core).shape, strict=True)
    return [size if one == 1 else 1 for size, one in pairs]


def _shared_axes(node: Any, core: fx.Node) -> set[int]:
    return {axis for axis, times in enumerate(_repeats(node, core)) if times > 1}


def _windows(
    image: Sequence[int], outer: Sequence[int], window: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Image positions x places of the window: how often a convolution reads a position at that place."""
    axes = []
    for size, many, taps, step, edge, spread in zip(image, outer, window, stride, padding, dilation, strict=True):
        table = torch.zeros(size, taps)
        for tap in range(taps):
            at = torch.arange(many) * step + tap * spread - edge
            table[at[(at >= 0) & (at < size)], tap] = 1
        axes.append(table)
    return reduce(torch.kron, axes)
