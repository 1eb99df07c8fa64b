"""`graphlocal export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy

import graphlocal
from graphlocal.cli.compiled import compiled_model
from graphlocal.cli.options import Depth, Inputs, ModelOrFile, PartitionText, RuleName, Settings, console
from graphlocal.cli.train import OPTIMIZERS
from graphlocal.errors import InputError
from graphlocal.targets.torch_export import SUFFIX


def export(
    model: ModelOrFile, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto", depth: Depth = 1,
    onnx: Annotated[Path | None, typer.Option(help="Write one ONNX file, each subgraph a function in it.")] = None,
    split: Annotated[Path | None, typer.Option(help="Write one ONNX file a subgraph into this folder.")] = None,
    training_step: Annotated[
        Path | None, typer.Option(help="Write the training step, cross-entropy: .pt2 for torch.export.load, else ONNX.")
    ] = None,
    torch_export: Annotated[Path | None, typer.Option(help="Write a program for torch.export.load (.pt2).")] = None,
    optimizer: Annotated[str, typer.Option(help="Of --training-step: adam, or sgd (momentum 0.9).")] = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate that --training-step starts with.")] = 1e-3,
    devices: Annotated[int, typer.Option(min=1, help="Devices that --split suggests a placement on.")] = 2,
    weights: Annotated[Path | None, typer.Option(help="A state_dict to load, as train --save writes it.")] = None,
    check: Annotated[bool, typer.Option(help="Compare what was written with the model.")] = True,
) -> None:  # fmt: skip
    """Export a model, as it evaluates, with its partition and error graph: ONNX, or a program of torch.export.

    Example: graphlocal export torchvision.models:resnet18 --input 8x3x64x64 --onnx resnet18.onnx
    """
    if onnx is None and split is None and training_step is None and torch_export is None:
        raise InputError(
            "nothing to export to",
            remedy="pass --onnx FILE, --split FOLDER, --training-step FILE or --torch-export FILE.pt2",
        )
    if torch_export is not None and torch_export.suffix != SUFFIX:
        raise InputError(f"--torch-export {torch_export}", remedy=f"give it the suffix {SUFFIX}, which torch expects")
    if onnx is not None and onnx.suffix == SUFFIX:
        raise InputError(f"--onnx {onnx}", remedy=f"{SUFFIX} is the suffix of --torch-export")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {optimizer!r}", remedy=f"use one of {', '.join(OPTIMIZERS)}")
    local = compiled_model(model, input, set, rule, partition, depth)
    if weights is not None:
        _load(local.original, weights)
    if onnx is not None:
        console.print(str(local.export(onnx, check=check)), markup=False)
    if split is not None:
        console.print(str(local.export(split, kind="split", devices=devices, check=check)), markup=False)
    if torch_export is not None:
        console.print(str(local.export(torch_export, check=check)), markup=False)
    if training_step is not None:
        options = {"loss_fn": cross_entropy, "optimizer": OPTIMIZERS[optimizer](local.parameters(), lr)}
        y = _labels(local)
        written = local.export(training_step, kind="training-step", y=y, check=check, **options)
        console.print(str(written), markup=False)


def _labels(local: graphlocal.LocalModule) -> torch.Tensor:
    """Example labels for cross-entropy: classes along axis 1 of the output."""
    local.eval()
    with torch.no_grad():
        inputs = local.compiled.traced.arguments
        output = local(*inputs.args, **inputs.kwargs)
    local.train()
    if not isinstance(output, torch.Tensor) or output.dim() < 2:
        raise InputError(
            "--training-step trains with cross-entropy, and the model does not return one tensor of (batch, classes)",
            remedy="from Python, local.export(path, kind='training-step', loss_fn=..., ...) takes any loss",
        )
    return torch.zeros(output[:, 0].shape, dtype=torch.long, device=output.device)


def _load(model: torch.nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise InputError(f"{path} does not hold the weights of {type(model).__name__}", why=str(error)[:500]) from error
