"""The command line, one command a file."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

import graphlocal
from graphlocal.cli.check import check
from graphlocal.cli.compile import compile
from graphlocal.cli.demo import demo
from graphlocal.cli.export import export
from graphlocal.cli.options import console
from graphlocal.cli.show import show
from graphlocal.cli.train import train
from graphlocal.errors import GraphLocalError

app = typer.Typer(
    help="Turn any PyTorch model into local learners.", no_args_is_help=True, add_completion=False,
    rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
for _command in (check, compile, show, export, train, demo):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        console.print(f"graphlocal {graphlocal.__version__} (torch {torch.__version__})")
        raise typer.Exit


def main() -> None:
    """Run the command line: exit code 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except GraphLocalError as error:
        errors.print(f"error: {error}", markup=False)
        raise SystemExit(1) from None
    except (typer.Abort, KeyboardInterrupt):
        errors.print("stopped")
        raise SystemExit(130) from None
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()  # the command line was not understood
        raise SystemExit(error.exit_code) from None
    raise SystemExit(code or 0)
