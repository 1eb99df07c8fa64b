"""`graphlocal demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphlocal.cli.options import console


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("graphlocal-demo"),
    seed: Annotated[int, typer.Option(help="Of the weights, the feedback maps and the order of the data.")] = 0,
    epochs: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train a small ResNet and an MLP on the digits, local learning beside backpropagation (about a minute).

    Example: graphlocal demo --out pictures
    """
    from graphlocal.demo import run

    run(out, console, seed, epochs)
