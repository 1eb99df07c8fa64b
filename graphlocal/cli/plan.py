"""`graphlocal plan`."""

from __future__ import annotations

from typing import Annotated

import typer

import graphlocal
from graphlocal.cli.compiled import compiled_model
from graphlocal.cli.options import Depth, Inputs, ModelOrFile, PartitionText, RuleName, Settings, console


def plan(
    model: ModelOrFile, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto", depth: Depth = 1,
    devices: Annotated[int, typer.Option(min=1, help="Devices to spread the subgraphs over.")] = 8,
    bandwidth: Annotated[str, typer.Option(help="Of a device's link: 10Gb (bits a second), 1GB (bytes).")] = "10Gb",
    latency: Annotated[str, typer.Option(help="Of a link, such as 5us.")] = "5us",
    streams: Annotated[int, typer.Option(min=1, help="Actions that a device runs at one time, at full speed.")] = 1,
    microbatches: Annotated[
        int | None, typer.Option(min=1, help="Parts that the batch is cut into: 8, or the batch if that is smaller.")
    ] = None,
    flops: Annotated[str, typer.Option(help="A device's rate of arithmetic, such as 19.5T.")] = "1T",
    memory: Annotated[str, typer.Option(help="A device's rate of memory traffic, such as 1.6TB.")] = "100GB",
    launch: Annotated[str, typer.Option(help="A device's time to start an operator, for the roofline: 5us.")] = "0s",
    measured: Annotated[bool, typer.Option("--measured", help="Time every action on this machine instead.")] = False,
    peak: Annotated[bool, typer.Option("--peak", help="Predict and measure the memory of a step, too.")] = False,
    recompute: Annotated[str, typer.Option(help="Subgraphs that keep less: globs between commas, * for all.")] = "",
) -> None:  # fmt: skip
    """Simulate a training step on several devices, beside backpropagation's pipelines GPipe and 1F1B.

    Example: graphlocal plan torchvision.models:resnet18 --input 32x3x64x64 --devices 8 --bandwidth 10Gb
    """
    local = compiled_model(model, input, set, rule, partition, depth, recompute)
    found = graphlocal.plan(
        local, devices, bandwidth, latency, streams, microbatches, flops=flops, memory=memory, measured=measured,
        peak=peak, launch=launch,
    )  # fmt: skip
    console.print(str(found), markup=False)
