"""`graphlocal report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphlocal.cli.options import console, write
from graphlocal.report import report as make_report


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder that `graphlocal train --run` wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page. [default: report.html in the run's folder]")] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
) -> None:
    """Write one HTML page of a training run: curves, local losses, angles, representations, the partition.

    Example: graphlocal report run
    """
    path = out or run / "report.html"
    write(path, make_report(run, title).encode())
    console.print(f"written: {path}", markup=False)
