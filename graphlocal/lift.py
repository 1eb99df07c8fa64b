"""Lift a traced `torch.fx` graph into the IR: one `Operation` a node, in program order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from graphlocal.guards import is_guard
from graphlocal.ir import Dim, Input, LocalGraph, Operation, State, TensorType
from graphlocal.normalize import GROUP, is_random, written_states
from graphlocal.opaque import OpaqueLeaf
from graphlocal.source import source_line
from graphlocal.trace import TracedModel

# Elementwise operators of one tensor that torch does not tag as pointwise.
_POINTWISE = {f"aten.{name}" for name in (
    "hardswish.default", "log_sigmoid.default", "contiguous.default", "to.dtype", "type_as.default",
)}  # fmt: skip
_NO_ARITHMETIC = re.compile(
    r"(getitem|view|reshape|flatten|transpose|permute|slice|select|expand|squeeze|split|chunk|cat|stack|"
    r"size|arange|zeros|ones|full|clone|contiguous|to|dropout)\b"
)


def lift(traced: TracedModel, model: nn.Module) -> LocalGraph:
    """The IR of a traced model, before any pass: inputs, states, operations, outputs."""
    return _Lifter(traced, model).graph()


class _Lifter:
    def __init__(self, traced: TracedModel, model: nn.Module) -> None:
        self.traced, self.model = traced, model
        self.nodes = list(traced.module.graph.nodes)
        self.parameters = dict(model.named_parameters())
        self.symbols: dict[str, str] = {}
        self.flops = _Flops(self.tensor)
        self.canonical = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}
        for name, tensor in reversed([*model.named_parameters(), *model.named_buffers()]):
            self.canonical[id(tensor)] = name

    def graph(self) -> LocalGraph:
        inputs = tuple(Input(n.name, self.type_of(n.meta.get("val")))
                       for n in self.nodes if n.op == "placeholder")  # fmt: skip
        names = {item.name for item in inputs}
        sizes, operations = [], []
        for node in self.nodes:
            if node.op not in ("call_function", "call_module"):
                continue
            op = self.operation(node)
            if _is_number(node.meta.get("val")) and not op.states and names.issuperset(op.inputs):
                sizes.append(op)
                names.add(op.name)
            else:
                operations.append(op)
        output = next(n for n in self.nodes if n.op == "output")
        return LocalGraph(
            name=type(self.model).__name__,
            inputs=inputs,
            outputs=tuple(str(x) for x in output.args[0] if isinstance(x, fx.Node)),
            states=self.states(operations),
            operations=tuple(operations),
            sizes=tuple(sizes),
        )

    def operation(self, node: fx.Node) -> Operation:
        leaf = self.traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        inputs = dict.fromkeys(n.name for n in node.all_input_nodes if n.op != "get_attr")
        if isinstance(leaf, OpaqueLeaf):
            states = dict.fromkeys(self.canonical[id(t)] for t in _tensors(leaf.submodule))
            writes = [self.canonical[id(b)] for b in leaf.submodule.buffers()]
            target = f"opaque({leaf.path})"
        else:
            attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
            states = dict.fromkeys(str(n.target) for n in attributes if self.tensor(str(n.target)) is not None)
            writes = [str(n.target) for n in written_states(node)]
            target = _target_name(node.target)
        effects = [
            *(["random"] if is_random(node) else []),
            *(["guard"] if is_guard(node) else []),
            *(f"writes {name}" for name in dict.fromkeys(writes)),
        ]
        result = self.type_of(node.meta.get("val"))
        return Operation(
            name=node.name,
            target=target,
            inputs=tuple(inputs),
            states=tuple(states),
            type=result,
            module=_module_path(node),
            source=source_line(node),
            effects=tuple(effects),
            pointwise=_is_pointwise(node, target, states, effects),
            group=node.meta.get(GROUP, ""),
            flops=self.flops.of(node, target),
        )

    def tensor(self, name: str) -> torch.Tensor | None:
        value: Any = self.traced.module
        for part in name.split("."):
            value = getattr(value, part)
        return value if isinstance(value, torch.Tensor) else None

    def states(self, operations: list[Operation]) -> tuple[State, ...]:
        read = dict.fromkeys(name for op in operations for name in op.states)
        tensors = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        ordered = [*(n for n in tensors if n in read), *(n for n in read if n not in tensors)]
        return tuple(self.state(name, tensors.get(name, self.traced.constants.get(name))) for name in ordered)

    def state(self, name: str, tensor: torch.Tensor | None) -> State:
        assert tensor is not None
        kind = "parameter" if name in self.parameters else "constant" if name in self.traced.constants else "buffer"
        described = TensorType(_dtype(tensor), tuple(tensor.shape))
        return State(name, kind, described, kind == "parameter" and tensor.requires_grad)  # type: ignore[arg-type]

    def type_of(self, value: Any) -> TensorType | None:
        if not isinstance(value, torch.Tensor):
            return None
        return TensorType(_dtype(value), tuple(self.dim(size) for size in value.shape))

    def dim(self, size: Any) -> Dim:
        """An int, or an expression in the symbols B (the first one seen), S1, S2, ..."""
        if isinstance(size, int):
            return size
        if size.node.expr.is_number:  # the tracer began with a symbol, then found that forward fixes it
            return int(size)

        def rename(match: re.Match[str]) -> str:
            known = self.symbols
            return known.setdefault(match[0], f"S{len(known)}" if known else "B")

        return re.sub(r"\b[su]\d+\b", rename, str(size)).replace(" ", "")


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _target_name(target: Any) -> str:
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".replace(
        "_operator.", "operator."
    )


def _is_pointwise(node: fx.Node, target: str, states: Any, effects: list[str]) -> bool:
    """Elementwise in one tensor, with that tensor first and nothing else read; shape and float type kept."""
    if states or effects or len(node.all_input_nodes) != 1 or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    result, source = node.meta.get("val"), node.args[0].meta.get("val")
    if (
        not (tagged or target in _POINTWISE)
        or not isinstance(result, torch.Tensor)
        or not isinstance(source, torch.Tensor)
    ):
        return False
    return result.is_floating_point() and source.is_floating_point() and list(result.shape) == list(source.shape)


def _module_path(node: fx.Node) -> str:
    """`b@1.conv@1`: the module's path, each part with `@k` if that module was in its (k+1)-th call."""
    calls: dict[str, str] = {}
    path = ""
    for key, (name, _) in node.meta.get("nn_module_stack", {}).items():
        if key.startswith("_empty"):
            continue
        path = name
        calls[name] = key.rpartition("@")[2] if re.search(r"@\d+$", key) else ""
    parts, prefix = [], ""
    for part in path.split("."):
        prefix = f"{prefix}.{part}" if prefix else part
        parts.append(f"{part}@{calls[prefix]}" if calls.get(prefix) else part)
    return ".".join(parts)


_COUNTED = re.compile(r"linear|mm\b|matmul|conv|attention|einsum|lstm|gru|rnn|bilinear|\b(v?dot|mv)\b")


class _Flops:
    """Floating-point operations of nodes on the example batch: by torch's own counter, or one for each element.

    The counter runs an operator on tensors without memory, once for each operator and shapes.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.known: dict[str, int] = {}

    def of(self, node: fx.Node, target: str) -> int:
        value = node.meta.get("val")
        elements = int(_hint(value.numel()) or 0) if isinstance(value, torch.Tensor) else 0
        if not isinstance(node.target, torch._ops.OpOverload) or _NO_ARITHMETIC.search(target):
            return 0
        if not _COUNTED.search(target) or is_random(node):  # running a random one would move the generator
            return elements
        described = str(fx.map_arg((node.args, dict(node.kwargs)), self._described))
        key = f"{target} {described}"
        if key not in self.known:
            self.known[key] = self._counted(node) or elements
        return self.known[key]

    def _counted(self, node: fx.Node) -> int:
        assert callable(node.target)
        try:
            with FlopCounterMode(display=False) as counter:
                node.target(*fx.map_arg(node.args, self._on_meta), **fx.map_arg(node.kwargs, self._on_meta))
            return int(counter.get_total_flops())
        except Exception:  # an operator without a meta kernel
            return 0

    def _value(self, node: fx.Node) -> Any:
        return self.tensor(str(node.target)) if node.op == "get_attr" else node.meta.get("val")

    def _described(self, node: fx.Node) -> Any:
        value = self._value(node)
        return f"{value.dtype}{[_hint(n) for n in value.shape]}" if isinstance(value, torch.Tensor) else node.name

    def _on_meta(self, node: fx.Node) -> Any:
        value = self._value(node)
        if isinstance(value, torch.Tensor):
            return torch.empty([_hint(n) for n in value.shape], dtype=value.dtype, device="meta")
        return _hint(value) if _is_number(value) else value


def _hint(size: Any) -> Any:
    return size if isinstance(size, (int, float, bool)) else size.node.hint
