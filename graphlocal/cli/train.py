"""`graphlocal train`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import graphlocal
from graphlocal.cli.options import Depth, PartitionText, RuleName, Settings, console, make_rule, write_with
from graphlocal.cli.watching import Every, LiveTable, RunFolder, TensorBoardFolder, Watch, Watched, watching
from graphlocal.data import Dataset, load
from graphlocal.errors import InputError
from graphlocal.model_spec import load_model, parse_partition
from graphlocal.onnx_training import OnnxStep
from graphlocal.training import History, step_for
from graphlocal.training import train as train_epochs

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}

BACKENDS = ("torch", "onnxruntime")


def train(
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
    backend: Annotated[str, typer.Option(help="What runs the training steps: torch or onnxruntime.")] = "torch",
    seed: Annotated[int, typer.Option(help="Of the weights, the feedback maps and the order of the data.")] = 0,
    save: Annotated[Path | None, typer.Option(
        help="Write the trained model's state_dict here; all of it if the name ends in .local.",
    )] = None,
    run: RunFolder = None, tensorboard: TensorBoardFolder = None, live: LiveTable = False, every: Every = None,
) -> None:  # fmt: skip
    """Train a model with local updates on digits, MNIST or Fashion-MNIST.

    Example: graphlocal train --data digits --epochs 10 --backprop
    """
    if backend == "onnxruntime" and (run or tensorboard or live):
        raise InputError(
            "--run, --tensorboard and --live with --backend onnxruntime",
            why="the weights are in ONNX Runtime while it trains, where nothing can observe them",
            remedy="leave one of them out",
        )
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {optimizer!r}", remedy=f"use one of {', '.join(OPTIMIZERS)}")
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}", remedy=f"use one of {', '.join(BACKENDS)}")
    if save is not None and (save.is_dir() or not os.access(_first_folder(save), os.W_OK)):
        raise InputError(f"{save} can't be written", remedy="give --save a file in a folder of yours")
    dataset = load(data, data_dir)
    if flatten:
        dataset = replace(dataset, train_x=dataset.train_x.flatten(1), test_x=dataset.test_x.flatten(1))
    torch.manual_seed(seed)
    built = load_model(model, set)
    others = {"backprop": copy.deepcopy(built)} if backprop else {}
    chosen = make_rule(rule, depth)
    example = (dataset.train_x[:8],)
    local = graphlocal.compile(built, example_inputs=example, rule=chosen, partition=parse_partition(partition))
    settings = {"optimizer": optimizer, "lr": lr, "seed": seed, "callable": model}
    with watching(Watch(run, tensorboard, live, every), local, dataset, epochs, batch_size, settings) as watched:
        histories = {
            name: _train_one(name, one, dataset, optimizer, lr, epochs, batch_size, seed, backend, watched)
            for name, one in {**others, chosen.name: local}.items()
        }
    console.print(_history_table(histories))
    if save is not None:
        if save.suffix == ".local":
            local.save(save)
        else:
            write_with(save, lambda path: torch.save(built.state_dict(), path))
        console.print(f"{'model' if save.suffix == '.local' else 'weights'} written to {save}")


def _first_folder(path: Path) -> Path:
    """The innermost folder above a path that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _train_one(name: str, model: nn.Module, data: Dataset, optimizer: str, lr: float, epochs: int,
               batch_size: int, seed: int, backend: str, watched: Watched) -> History:  # fmt: skip
    chosen = OPTIMIZERS[optimizer](model.parameters(), lr)
    if backend == "onnxruntime" and isinstance(model, graphlocal.LocalModule):
        step: Any = OnnxStep(model, chosen, data.train_y)
        read_back = step.read_back
    else:
        step, read_back = watched.step(model, step_for(model, chosen)), lambda: None
    total = epochs * -(-len(data.train_x) // batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    history = History()
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    with watched.around(model, progress):
        task = progress.add_task(name, total=total, note="")

        def on_batch(loss: float) -> None:
            progress.update(task, advance=1, note=f"loss {loss:.3f}")

        for history in train_epochs(
            model,
            step,
            data,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            on_batch=on_batch,
            before_test=read_back,
        ):
            epoch = len(history.loss)
            progress.console.print(f"{name} epoch {epoch}: test error {history.test_error[-1]:.2f} %")
            watched.epoch(model, name, history)
    return history


def _history_table(histories: dict[str, History]) -> Table:
    table = Table("rule", "training loss", "test error", "seconds an epoch")
    for name, history in histories.items():
        seconds = sum(history.seconds) / len(history.seconds)
        table.add_row(name, f"{history.loss[-1]:.4f}", f"{history.test_error[-1]:.2f} %", f"{seconds:.1f}")
    return table
