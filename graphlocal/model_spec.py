"""How the command line names models, their arguments, and example inputs."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graphlocal.errors import InputError, nearest
from graphlocal.torchvision_operators import declare_operators

_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?:(?P<dtype>[a-z]+\d+|bool):)?(?P<shape>\d+(?:x\d+)*)(?:<(?P<high>\d+))?")


def load_model(name: str, settings: Sequence[str]) -> nn.Module:
    """The model that `module:callable` makes with `key=value` settings (Python literals, else strings).

    Raises InputError for a module or callable that does not exist, or a result that is no model.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"MODEL is {name!r}", remedy="write module:callable, such as torchvision.models:resnet18")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    declare_operators()
    try:
        made_by: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when imported
        raise InputError(f"the module {module_name!r} can't be imported", why=_why(error)) from error
    for part in attribute.split("."):
        if not hasattr(made_by, part):
            near = nearest(part, [n for n in dir(made_by) if not n.startswith("_")])
            raise InputError(f"{module_name} has no {part!r}: {near}")
        made_by = getattr(made_by, part)
    arguments = dict(map(_setting, settings))
    try:
        model = made_by if isinstance(made_by, nn.Module) else made_by(**arguments)
    except Exception as error:  # whatever the callable does
        raise InputError(
            f"{name} makes no model from {', '.join(settings) or 'no settings'}", why=_why(error),
            remedy="give the arguments that it takes, each as --set key=value",
        ) from error  # fmt: skip
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} gives a {type(model).__name__}", remedy="name a callable that returns a Module")
    return model


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"--set {text!r}", remedy="write key=value, such as --set num_classes=10")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def example_inputs(specs: Sequence[str]) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """Random example inputs: `8x3x64x64` (floats), `int64:8x16<1000` (integers below 1000), `ids=...` by name.

    Raises InputError for a malformed description, or positional inputs mixed with named ones.
    """
    named: dict[str, torch.Tensor] = {}
    positional: list[torch.Tensor] = []
    for spec in specs:
        match = _INPUT.fullmatch(spec)
        if match is None:
            raise InputError(
                f"--input {spec!r}", remedy="write SHAPE, dtype:SHAPE<HIGH or name=..., such as ids=int64:8x16<1000"
            )
        tensor = _tensor(spec, match)
        if match["name"]:
            named[match["name"]] = tensor
        else:
            positional.append(tensor)
    if named and positional:
        raise InputError("some inputs have a name and some have none", remedy="name all of them, or none")
    if not named and not positional:
        raise InputError("no --input is given", remedy="give one for each input, such as --input 8x3x64x64")
    return named or tuple(positional)


def _tensor(spec: str, match: re.Match[str]) -> torch.Tensor:
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--input {spec!r}: torch has no dtype {match['dtype']!r}")
    shape = tuple(map(int, match["shape"].split("x")))
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype)
    return torch.randint(0, int(match["high"] or 2), shape).to(dtype)


def parse_partition(text: str) -> str | int | list[str]:
    """`auto`, `blocks`, `leaf`, a number of segments, `2+head`, or globs between commas."""
    if text.isdigit():
        return int(text)
    return text.split(",") if "," in text or "*" in text else text
