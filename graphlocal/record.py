"""Record one real step of a model whose control flow depends on its data, with guards on the path it took.

The graph holds the operations that ran. Whatever Python read from a tensor (a branch, `.item()`, the number of
rows that a mask selects) is written into it as a constant, with a guard beside it that raises `GuardFailure`
in a step where the data say otherwise. The runtime then records that path, and keeps both.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphlocal.arguments import Arguments
from graphlocal.errors import TraceError
from graphlocal.guards import require_shape, require_value
from graphlocal.normalize import join
from graphlocal.preserve import preserved, watched_calls
from graphlocal.source import source_line

_READS = ("item", "_local_scalar_dense")
_LITERAL = {torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default}
_MODES = (torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast)


def record(model: nn.Module, arguments: Arguments) -> fx.GraphModule:
    """One forward pass as a graph: flat inputs to flat outputs, with the outputs' structure as `_out_spec`.

    The model is left as it was. Raises TraceError where a recording would be wrong for other data.
    """
    specs: list[pytree.TreeSpec] = []

    def run(*leaves: Any) -> list[Any]:
        call = arguments.with_leaves(leaves)
        with _CheckedReads():
            outputs, spec = pytree.tree_flatten(model(*call.args, **call.kwargs))
        specs.append(spec)
        _refuse_unknown(outputs)
        return outputs

    with preserved(model), _paths(model):
        module = make_fx(
            run, tracing_mode="real", pre_dispatch=True, record_stack_traces=True, _error_on_data_dependent_ops=False
        )(*arguments.leaves)
    _refuse_modes(module)
    _refuse_unseen(model, module)
    with preserved(model):
        observer = _Observer(module)
        observer.run(*arguments.leaves)
    _insert_guards(module.graph, observer.values)
    for placeholder, name in zip(module.graph.find_nodes(op="placeholder"), arguments.names, strict=True):
        placeholder.target = name if name.isidentifier() else placeholder.target
        placeholder._rename(str(placeholder.target))
    module._out_spec = specs[-1]
    return module


class _CheckedReads(TorchFunctionMode):
    """Lets Python read tensors by `item` alone, which the recording sees."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist:
            return _elements(args[0])
        if func in (Tensor.numpy, Tensor.__array__):
            raise TraceError(
                "forward turns a tensor into a numpy array",
                why="what numpy does with it is not seen, so a recording would be wrong for other data",
                remedy="use torch's operations, or move that part into a submodule of its own",
            )
        return func(*args, **(kwargs or {}))


def _elements(tensor: Tensor) -> Any:
    return [_elements(row) for row in tensor.unbind()] if tensor.dim() else tensor.item()


def _paths(model: nn.Module) -> AbstractContextManager[None]:
    """Give each recorded node the path of the module that runs, `a.b@1` in its second call."""
    calls: Counter[str] = Counter()

    def enter(path: str, module: nn.Module) -> None:
        key = f"{path}@{calls[path]}" if calls[path] else path
        calls[path] += 1
        _open_modules()[key] = (path, type(module).__qualname__)

    return watched_calls(model, enter, lambda: _open_modules().popitem())


def _open_modules() -> OrderedDict[str, Any]:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.module_stack


class _Observer(fx.Interpreter):
    """Runs a recording once more, and keeps what its reads gave."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if _reads(n):
            self.values[n] = result
        return result


def _reads(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _READS


def _insert_guards(graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """A guard in the place of each read, and one after each operation whose result's size depends on the data."""
    for node in list(graph.nodes):
        if _reads(node):
            with graph.inserting_before(node):
                _guard(graph, require_value, node.args[0], values[node], like=node)
            graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.dynamic_output_shape in node.target.tags:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                with graph.inserting_after(node):
                    _guard(graph, require_shape, node, list(value.shape), like=node)


def _guard(graph: fx.Graph, check: Callable[..., None], source: Any, expected: Any, *, like: fx.Node) -> None:
    node = graph.call_function(check, (source, expected))
    node.meta = {key: like.meta[key] for key in ("nn_module_stack", "stack_trace") if key in like.meta}
    join(node, source)


def _refuse_unknown(outputs: list[Any]) -> None:
    for output in outputs:
        if not isinstance(output, (Tensor, int, float, bool, str, type(None))):
            raise TraceError(
                f"the model returns a {type(output).__name__}",
                why="torch does not know which tensors that holds",
                remedy="return tensors in tuples, lists or dicts, or make the class known: "
                "torch.export.register_dataclass",
            )


def _refuse_modes(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target in _MODES:
            raise TraceError(
                "the recorded forward changes autograd's or autocast's mode",
                where=source_line(node),
                remedy="move that part into a submodule of its own, which then runs as an opaque leaf",
            )


def _refuse_unseen(model: nn.Module, module: fx.GraphModule) -> None:
    """Raise TraceError if the graph holds a tensor that neither the model owns nor the code spells out."""
    owned = {id(x) for m in model.modules() for x in pytree.tree_leaves([vars(m)]) if isinstance(x, Tensor)}
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target))
        literal = all(user.target in _LITERAL for user in node.users)
        if isinstance(value, Tensor) and id(value) not in owned and not literal:
            raise TraceError(
                "forward uses a tensor that it computed out of the recorder's sight",
                where=source_line(next(iter(node.users))),
                why="torch.autograd.grad inside forward, or a tensor kept from an earlier call, does that",
                remedy="move that part into a submodule of its own, which then runs as an opaque leaf",
            )
