"""`graphlocal compile`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import graphlocal
from graphlocal.cli.options import Depth, Inputs, Model, PartitionText, RuleName, Settings, console, make_rule, write
from graphlocal.model_spec import example_inputs, load_model, parse_partition
from graphlocal.text import to_text


def compile(
    model: Model, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto", depth: Depth = 1,
    output: Annotated[Path | None, typer.Option(
        "-o", "--output", help="Write the graph's full text here; the whole model if the name ends in .local.",
    )] = None,
    passes: Annotated[bool, typer.Option("--passes", help="Show what each pass changed.")] = False,
) -> None:  # fmt: skip
    """Compile a model and show its subgraphs, error neurons, skip-errors and schedule.

    Example: graphlocal compile torchvision.models:resnet18 --input 8x3x64x64 --depth 2
    """
    built = load_model(model, set)
    start = time.perf_counter()
    local = graphlocal.compile(
        built, example_inputs=example_inputs(input), rule=make_rule(rule, depth), partition=parse_partition(partition)
    )
    seconds = time.perf_counter() - start
    if passes:
        for record in local.compiled.records:
            console.print(str(record), markup=False)
    console.print(str(local.graph), markup=False)
    console.print(f"compiled in {seconds:.1f} s, traced by: {local.compiled.traced.rung}")
    if output is not None:
        if output.suffix == ".local":
            local.save(output)
        else:
            write(output, to_text(local.graph).encode())
        console.print(f"{'model' if output.suffix == '.local' else 'graph'} written to {output}")
