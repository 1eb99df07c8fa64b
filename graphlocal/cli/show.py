"""`graphlocal show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from graphlocal.cli.compiled import compiled_model
from graphlocal.cli.options import Depth, Inputs, ModelOrFile, PartitionText, RuleName, Settings, console, write
from graphlocal.errors import InputError
from graphlocal.targets.show import render

DRAWINGS = frozenset({".svg", ".dot", ".mmd", ".graphml"})
"""The formats that take --operations and --errors; the others hold everything."""


def _file(option: str, what: str) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(option, metavar="FILE", help=f"Write {what} here.")
    return info


def show(
    model: ModelOrFile, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto", depth: Depth = 1,
    html: Annotated[Path | None, _file("--html", "a page to explore it, without network,")] = None,
    svg: Annotated[Path | None, _file("--svg", "an SVG (needs Graphviz)")] = None,
    dot: Annotated[Path | None, _file("--dot", "Graphviz's language")] = None,
    mermaid: Annotated[Path | None, _file("--mermaid", "a Mermaid flowchart")] = None,
    graphml: Annotated[Path | None, _file("--graphml", "GraphML")] = None,
    json: Annotated[Path | None, _file("--json", "the whole graph as JSON")] = None,
    model_explorer: Annotated[Path | None, _file("--model-explorer", "Model Explorer's JSON")] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the graph too; without a file that is all.")] = False,
    operations: Annotated[bool, typer.Option("--operations", help="Draw the operations in the subgraphs.")] = False,
    errors: Annotated[Literal["all", "none"], typer.Option(help="The error connections that are drawn.")] = "all",
) -> None:  # fmt: skip
    """Draw what a model is compiled to: subgraphs, values, error connections. Several files at once are fine.

    Example: graphlocal show torchvision.models:resnet18 --input 8x3x64x64 --html resnet18.html
    """
    wanted = {
        ".html": html, ".svg": svg, ".dot": dot, ".mmd": mermaid, ".graphml": graphml, ".json": json,
        ".me.json": model_explorer,
    }  # fmt: skip
    paths = {format: path for format, path in wanted.items() if path is not None}
    if (operations or errors != "all") and not DRAWINGS.intersection(paths):
        raise InputError(
            "--operations and --errors are for drawings", remedy="add --svg, --dot, --mermaid or --graphml"
        )
    local = compiled_model(model, input, set, rule, partition, depth)
    drawn = {
        path: render(
            local.graph, format, **({"operations": operations, "errors": errors} if format in DRAWINGS else {})
        )
        for format, path in paths.items()
    }
    for path, content in drawn.items():
        write(path, content.encode())
        console.print(f"written: {path}", markup=False)
    if text or not drawn:
        console.print(str(local.graph), markup=False)
