"""`graphlocal check`."""

from __future__ import annotations

import typer

import graphlocal
from graphlocal.cli.options import Inputs, Model, PartitionText, RuleName, Settings, console
from graphlocal.model_spec import example_inputs, load_model, parse_partition


def check(
    model: Model, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto",
) -> None:  # fmt: skip
    """List every obstacle between a model and local learning, and what to do about each.

    Exits with 1 if the model can't be compiled.

    Example: graphlocal check torchvision.models:resnet18 --input 8x3x64x64 --set num_classes=10
    """
    report = graphlocal.check(
        load_model(model, set), example_inputs(input), rule=rule, partition=parse_partition(partition)
    )
    console.print(str(report), markup=False)
    raise typer.Exit(0 if report.ok else 1)
