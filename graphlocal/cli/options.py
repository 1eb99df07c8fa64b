"""What the commands share: arguments that several of them take, and the console."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from graphlocal.errors import InputError
from graphlocal.files import write as write  # the commands take these from here too
from graphlocal.files import write_with as write_with
from graphlocal.rules import RecLRA, Rule, find

console = Console(highlight=False, soft_wrap=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="module:callable, such as torchvision.models:resnet18")]
ModelOrFile = Annotated[
    str, typer.Argument(metavar="MODEL", help="module:callable, such as torchvision.models:resnet18, or a file.local.")
]
Inputs = Annotated[list[str], typer.Option(
    "--input", help="An example input: SHAPE (8x3x64x64), dtype:SHAPE<HIGH (int64:8x16<1000), or name=... ; repeat.",
)]  # fmt: skip
Settings = Annotated[list[str], typer.Option("--set", help="An argument of the callable, key=value; repeat.")]
RuleName = Annotated[str, typer.Option("--rule", help="The learning rule: rec-lra or backprop.")]
PartitionText = Annotated[
    str, typer.Option("--partition", help="auto, blocks, leaf, a number of segments, 2+head, or globs between commas.")
]
Depth = Annotated[int, typer.Option(min=1, help="Recursion depth of rec-lra.")]


def make_rule(name: str, depth: int) -> Rule:
    """The rule of that name, at that recursion depth."""
    rule = find(name)
    if depth > 1 and not isinstance(rule, RecLRA):
        raise InputError(f"--depth {depth} with rule {name!r}", remedy="recursion depth is an option of rec-lra")
    return replace(rule, depth=depth) if isinstance(rule, RecLRA) else rule
