"""`graphlocal export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import graphlocal
from graphlocal.cli.options import Depth, Inputs, Model, PartitionText, RuleName, Settings, console, make_rule
from graphlocal.errors import InputError
from graphlocal.model_spec import example_inputs, load_model, parse_partition


def export(
    model: Model, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto", depth: Depth = 1,
    onnx: Annotated[Path | None, typer.Option(help="Write one ONNX file, each subgraph a function in it.")] = None,
    split: Annotated[Path | None, typer.Option(help="Write one ONNX file a subgraph into this folder.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that --split suggests a placement on.")] = 2,
    weights: Annotated[Path | None, typer.Option(help="A state_dict to load, as train --save writes it.")] = None,
    check: Annotated[bool, typer.Option(help="Compare what was written with the model, in ONNX Runtime.")] = True,
) -> None:  # fmt: skip
    """Export a model, as it evaluates, as ONNX with its partition and error graph.

    Example: graphlocal export torchvision.models:resnet18 --input 8x3x64x64 --onnx resnet18.onnx
    """
    if onnx is None and split is None:
        raise InputError("nothing to export to", remedy="pass --onnx FILE, --split FOLDER, or both")
    built = load_model(model, set)
    if weights is not None:
        _load(built, weights)
    local = graphlocal.compile(
        built, example_inputs=example_inputs(input), rule=make_rule(rule, depth), partition=parse_partition(partition)
    )
    if onnx is not None:
        console.print(str(local.export(onnx, check=check)), markup=False)
    if split is not None:
        console.print(str(local.export(split, kind="split", devices=devices, check=check)), markup=False)


def _load(model: torch.nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise InputError(f"{path} does not hold the weights of {type(model).__name__}", why=str(error)[:500]) from error
