"""The command line: check, compile, train, demo."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import graphlocal
from graphlocal.data import Dataset, load
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.model_spec import example_inputs, load_model, parse_partition
from graphlocal.rules import RecLRA, Rule, find
from graphlocal.text import to_text
from graphlocal.training import History, step_for, train

app = typer.Typer(
    help="Turn any PyTorch model into local learners.", no_args_is_help=True, add_completion=False,
    rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
console = Console(highlight=False, soft_wrap=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="module:callable, such as torchvision.models:resnet18")]
Inputs = Annotated[list[str], typer.Option(
    "--input", help="An example input: SHAPE (8x3x64x64), dtype:SHAPE<HIGH (int64:8x16<1000), or name=... ; repeat.",
)]  # fmt: skip
Settings = Annotated[list[str], typer.Option("--set", help="An argument of the callable, key=value; repeat.")]
RuleName = Annotated[str, typer.Option("--rule", help="The learning rule: rec-lra or backprop.")]
PartitionText = Annotated[
    str, typer.Option("--partition", help="auto, leaf, a number of segments, or globs between commas.")
]
Depth = Annotated[int, typer.Option(min=1, help="Recursion depth of rec-lra.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        console.print(f"graphlocal {graphlocal.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.command()
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


@app.command()
def compile(
    model: Model, input: Inputs = [], set: Settings = [], rule: RuleName = "rec-lra",  # noqa: B006
    partition: PartitionText = "auto", depth: Depth = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the graph's full text here.")] = None,
    passes: Annotated[bool, typer.Option("--passes", help="Show what each pass changed.")] = False,
) -> None:  # fmt: skip
    """Compile a model and show its subgraphs, error neurons, skip-errors and schedule.

    Example: graphlocal compile torchvision.models:resnet18 --input 8x3x64x64 --depth 2
    """
    built = load_model(model, set)
    start = time.perf_counter()
    local = graphlocal.compile(
        built, example_inputs=example_inputs(input), rule=_rule(rule, depth), partition=parse_partition(partition)
    )
    seconds = time.perf_counter() - start
    if passes:
        for record in local.compiled.records:
            console.print(str(record), markup=False)
    console.print(str(local.graph), markup=False)
    console.print(f"compiled in {seconds:.1f} s, traced by: {local.compiled.traced.rung}")
    if output is not None:
        _write(output, to_text(local.graph).encode())
        console.print(f"graph written to {output}")


@app.command("train")
def train_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="module:callable")] = "graphlocal.demo:digits_mlp",
    data: Annotated[str, typer.Option(help="digits, mnist or fashion-mnist.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Where mnist and fashion-mnist lie.")] = None,
    set: Settings = [], rule: RuleName = "rec-lra", partition: PartitionText = "auto", depth: Depth = 1,  # noqa: B006
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training data.")] = 3,
    batch_size: Annotated[int, typer.Option(min=2, help="Samples a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    optimizer: Annotated[str, typer.Option(help="adam or sgd (momentum 0.9).")] = "adam",
    flatten: Annotated[bool, typer.Option(help="Give the model vectors instead of images.")] = False,
    backprop: Annotated[bool, typer.Option(help="Train the same model by backpropagation beside it.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights, the feedback maps and the order of the data.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Write the trained model's state_dict here.")] = None,
) -> None:  # fmt: skip
    """Train a model with local updates on digits, MNIST or Fashion-MNIST.

    Example: graphlocal train --data digits --epochs 10 --backprop
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {optimizer!r}", remedy=f"use one of {', '.join(OPTIMIZERS)}")
    if save is not None and (save.is_dir() or not os.access(_first_folder(save), os.W_OK)):
        raise InputError(f"{save} can't be written", remedy="give --save a file in a folder of yours")
    dataset = load(data, data_dir)
    if flatten:
        dataset = replace(dataset, train_x=dataset.train_x.flatten(1), test_x=dataset.test_x.flatten(1))
    torch.manual_seed(seed)
    built = load_model(model, set)
    others = {"backprop": copy.deepcopy(built)} if backprop else {}
    chosen = _rule(rule, depth)
    example = (dataset.train_x[:8],)
    local = graphlocal.compile(built, example_inputs=example, rule=chosen, partition=parse_partition(partition))
    histories = {
        name: _train_one(name, one, dataset, optimizer, lr, epochs, batch_size, seed)
        for name, one in {**others, chosen.name: local}.items()
    }
    console.print(_history_table(histories))
    if save is not None:
        _write_with(save, lambda path: torch.save(built.state_dict(), path))
        console.print(f"weights written to {save}")


@app.command()
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


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def _first_folder(path: Path) -> Path:
    """The innermost folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _rule(name: str, depth: int) -> Rule:
    rule = find(name)
    if depth > 1 and not isinstance(rule, RecLRA):
        raise InputError(f"--depth {depth} with rule {name!r}", remedy="recursion depth is an option of rec-lra")
    return replace(rule, depth=depth) if isinstance(rule, RecLRA) else rule


def _train_one(name: str, model: nn.Module, data: Dataset, optimizer: str, lr: float, epochs: int,
               batch_size: int, seed: int) -> History:  # fmt: skip
    step = step_for(model, OPTIMIZERS[optimizer](model.parameters(), lr))
    total = epochs * -(-len(data.train_x) // batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    history = History()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=total, note="")

        def on_batch(loss: float) -> None:
            progress.update(task, advance=1, note=f"loss {loss:.3f}")

        for history in train(model, step, data, epochs=epochs, batch_size=batch_size, seed=seed, on_batch=on_batch):
            epoch = len(history.loss)
            progress.console.print(f"{name} epoch {epoch}: test error {history.test_error[-1]:.2f} %")
    return history


def _history_table(histories: dict[str, History]) -> Table:
    table = Table("rule", "training loss", "test error", "seconds an epoch")
    for name, history in histories.items():
        seconds = sum(history.seconds) / len(history.seconds)
        table.add_row(name, f"{history.loss[-1]:.4f}", f"{history.test_error[-1]:.2f} %", f"{seconds:.1f}")
    return table


def _write(path: Path, content: bytes) -> None:
    _write_with(path, lambda temporary: temporary.write_bytes(content))


def _write_with(path: Path, write: Any) -> None:
    """Write a file whole or not at all. Raises InputError where it can't be written."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} can't be written", why=str(error)) from error
    finally:
        with contextlib.suppress(OSError):  # gone, if all went well
            temporary.unlink()


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
