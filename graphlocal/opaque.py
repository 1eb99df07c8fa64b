"""Opaque leaves: submodules that no tracer can see through, such as data-dependent control flow.

While a model is exported, an offending submodule is replaced by one call of the operator
`graphlocal::opaque`; the traced graph then calls an `OpaqueLeaf`, which runs the user's submodule eagerly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphlocal.errors import TraceError

_library = torch.library.Library("graphlocal", "DEF")
_library.define("opaque(Tensor[] inputs, int key) -> Tensor[]")
_calls: dict[int, OpaqueLeaf] = {}
_keys = itertools.count()


class NotALeafError(TraceError):
    """A submodule that can't be an opaque leaf; `modules` holds its path."""

    def __init__(self, path: str, why: str) -> None:
        self.modules = (path,)
        super().__init__(f"{path} can't be an opaque leaf: {why}")


class OpaqueLeaf(nn.Module):
    """One call of a user's submodule: flat tensors in, flat tuple of tensors out.

    The submodule is held by reference, not registered, so that its parameters keep one owner.
    """

    def __init__(self, path: str, submodule: nn.Module, leaves: list[Any], in_spec: pytree.TreeSpec,
                 result: Any) -> None:  # fmt: skip
        super().__init__()
        self.path, self.in_spec = path, in_spec
        self._submodule = (submodule,)
        self._constants = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        self._is_tensor = [isinstance(x, torch.Tensor) for x in leaves]
        outputs, self.out_spec = pytree.tree_flatten(result)
        self.sizes_in = [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]
        self.outputs = [torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x for x in outputs]

    def takes(self, spec: pytree.TreeSpec, leaves: list[Any]) -> bool:
        """Whether a call has the structure of the recorded one, with tensors in the same places."""
        return spec == self.in_spec and [isinstance(x, torch.Tensor) for x in leaves] == self._is_tensor

    @property
    def submodule(self) -> nn.Module:
        return self._submodule[0]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the submodule. Raises TraceError if what it returns has another structure than when traced."""
        given = iter(tensors)
        leaves = [next(given) if is_tensor else constant
                  for is_tensor, constant in zip(self._is_tensor, self._constants, strict=True)]  # fmt: skip
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        outputs, spec = pytree.tree_flatten(self.submodule(*args, **kwargs))
        if spec != self.out_spec:
            raise TraceError(
                f"the opaque leaf {self.path} returned another structure than when it was traced",
                where=self.path,
                remedy="let it return the same structure of tensors for every input",
            )
        return tuple(x for x in outputs if isinstance(x, torch.Tensor))

    def tensors_to_result(self, tensors: list[torch.Tensor]) -> Any:
        """Flat tensors back into what the submodule returns."""
        given = iter(tensors)
        flat = [next(given) if isinstance(x, torch.Tensor) else x for x in self.outputs]
        return pytree.tree_unflatten(flat, self.out_spec)


def _fake(inputs: list[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Outputs with the sizes of the real call; a size that an input had follows that input's symbol."""
    leaf = _calls[key]
    symbols: dict[int, Any] = {}
    for real, fake in zip(leaf.sizes_in, inputs, strict=True):
        for size, symbol in zip(real, fake.shape, strict=True):
            if not isinstance(symbol, int):
                symbols.setdefault(size, symbol)
    return [
        torch.empty([symbols.get(n, n) for n in x.shape], dtype=x.dtype, device=inputs[0].device)
        for x in leaf.outputs
        if isinstance(x, torch.Tensor)
    ]


torch.library.register_fake("graphlocal::opaque", _fake, lib=_library)


@contextmanager
def opaque_leaves(model: nn.Module, paths: tuple[str, ...], run: Any) -> Iterator[None]:
    """Make the submodules at `paths` opaque to the tracer; `run()` is one eager call that records their shapes.

    Raises NotALeafError for a submodule that is not called, or called without a tensor.
    """
    if not paths:
        yield
        return
    recorded = _record_calls(model, paths, run)
    missing = [path for path in paths if not recorded[path]]
    if missing:
        raise NotALeafError(missing[0], "it was not called")
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(_stubbed(model.get_submodule(path), recorded[path]))
        yield


def _record_calls(model: nn.Module, paths: tuple[str, ...], run: Any) -> dict[str, list[OpaqueLeaf]]:
    recorded: dict[str, list[OpaqueLeaf]] = {path: [] for path in paths}

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if not any(isinstance(x, torch.Tensor) for x in leaves):
                raise NotALeafError(path, "it is called without a tensor")
            recorded[path].append(OpaqueLeaf(path, module, leaves, spec, result))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True) for path in paths]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return recorded


@contextmanager
def _stubbed(module: nn.Module, calls: list[OpaqueLeaf]) -> Iterator[None]:
    """Replace the module's forward by one operator a call, cycling through the recorded calls."""
    upcoming = itertools.cycle(calls)

    def stub(*args: Any, **kwargs: Any) -> Any:
        leaf = next(upcoming)
        key = next(_keys)
        _calls[key] = leaf
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if not leaf.takes(spec, leaves):
            raise NotALeafError(leaf.path, "while it is traced its caller passes other arguments than when it runs")
        return leaf.tensors_to_result(torch.ops.graphlocal.opaque(tensors, key))

    before = module.__dict__.get("forward")
    module.forward = stub
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


def insert_leaves(module: fx.GraphModule) -> tuple[str, ...]:
    """Turn every `graphlocal::opaque` node into a call of its `OpaqueLeaf`; return the leaves' paths."""
    paths: list[str] = []
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.graphlocal.opaque.default):
        inputs, key = node.args
        leaf = _calls.pop(key)
        name = f"opaque_{len(paths)}"
        module.add_submodule(name, leaf)
        paths.append(leaf.path)
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, tuple(inputs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    return tuple(paths)
