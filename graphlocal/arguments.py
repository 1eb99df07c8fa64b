"""How a model is called: binds positional and keyword inputs to one flat list of tensors and constants."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphlocal.errors import InputError

UNSIGNED = "_unsigned"
"""The name under which a class of `with_signature` has the one that it was made of."""

Module = TypeVar("Module", bound=nn.Module)
ExampleInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """One call's inputs in canonical form: defaults left out, flattened by torch's pytree.

    names: a readable path for each leaf, such as `x` or `batch['mask']`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    spec: pytree.TreeSpec

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def map(self, function: Any) -> Arguments:
        """The same call with `function` applied to every tensor."""
        return self.with_leaves([function(x) if isinstance(x, torch.Tensor) else x for x in self.leaves])

    def with_leaves(self, leaves: Sequence[Any]) -> Arguments:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return Arguments(args, kwargs, tuple(leaves), self.names, self.spec)


def call_of(inputs: ExampleInputs, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a tensor, a tuple (or list), or a dict stands for.

    Raises InputError, with the `name` that the user knows the inputs by, for anything else.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise InputError(
        f"{name} is a {type(inputs).__name__}",
        remedy="pass a tuple of positional inputs, such as (torch.randn(8, 3, 32, 32),), or a dict of keyword inputs",
    )


def holds_no_sample(values: Iterable[Any]) -> bool:
    """Whether a tensor among the inputs or outputs of a call has an axis of size 0; the batch may be on any one."""
    return any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in values)


def empty_batch(why: str) -> InputError:
    """The error of a step that a batch of size 0 can't be trained on."""
    return InputError("the batch is empty", why=why, remedy="leave out batches of size 0")


class Binder:
    """Binds calls of one model's `forward` to canonical arguments."""

    def __init__(self, model: nn.Module) -> None:
        self.signature = inspect.signature(model.forward)
        self.model_name = type(model).__name__
        self._defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.default is not parameter.empty
        }
        self._starred = any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())
        self._of_tensors: dict[int, pytree.TreeSpec] = {}  # structures of calls with so many tensors and nothing else

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
        """The leaves and structure of a call.

        Raises InputError if the call does not fit the model's signature.
        """
        plain = not kwargs
        for x in args:
            plain = plain and type(x) is torch.Tensor
        if plain and len(args) in self._of_tensors:
            return list(args), self._of_tensors[len(args)]
        leaves, spec = pytree.tree_flatten(self._canonical(args, kwargs))
        if plain and len(leaves) == len(args) and not any(isinstance(x, torch.Tensor) for x in self._defaults.values()):
            self._of_tensors[len(args)] = spec
        return leaves, spec

    def _canonical(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the inputs do not fit {self.model_name}.forward{self.signature}",
                why=str(error),
                remedy="pass example_inputs as a tuple of positional inputs or a dict of keyword inputs",
            ) from None
        for name, default in self._defaults.items():
            if name in bound.arguments and bound.arguments[name] is default:
                del bound.arguments[name]
        keywords = bound.kwargs
        return bound.args, dict(sorted(keywords.items())) if self._starred else keywords

    def example(self, example_inputs: ExampleInputs) -> Arguments:
        """Canonical arguments from what a user passes as `example_inputs`; every tensor is copied.

        Raises InputError for inputs that do not fit the model's signature or hold no tensor.
        """
        arguments = self.arguments(*self._canonical(*call_of(example_inputs, "example_inputs")))
        if not arguments.tensors:
            raise InputError("example_inputs hold no tensor", remedy="pass the tensors of one batch")
        batched = [x for x in arguments.tensors if x.dim() > 0]
        if batched and all(x.shape[0] == 1 for x in batched):
            raise InputError(
                "example_inputs hold a batch of 1",
                why="a size of 1 can't be told from a constant, so the graph would take no other batch",
                remedy="pass a batch of 2 or more",
            )
        return arguments

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Canonical arguments with a name for each leaf; every tensor is copied."""
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        parameters = list(self.signature.parameters)
        names = tuple(_leaf_name(path, parameters) for path, _ in paths)
        leaves = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for _, x in paths)
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        return Arguments(args, kwargs, leaves, names, spec)


def with_signature(kind: type[Module], signature: inspect.Signature) -> type[Module]:
    """The class, by the same name, with a `forward` that shows the signature of another model's.

    Training loops look there to see which inputs a model takes; transformers' Trainer gives it no others.
    """
    own: Any = kind.forward
    forward: Any = FunctionType(own.__code__, own.__globals__, "forward", own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
    names = {"__doc__": kind.__doc__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"forward": forward, UNSIGNED: kind, **names})


def _leaf_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """`(SequenceKey(0), SequenceKey(1), ...)` -> the name of the second parameter, and the path inside it."""
    where, key, *inside = path
    if where.idx == 1:
        name = str(key.key)
    else:
        name = parameters[key.idx] if key.idx < len(parameters) else f"{parameters[-1]}[{key.idx}]"
    return name + pytree.keystr(tuple(inside))
