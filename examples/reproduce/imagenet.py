"""rec-LRA (2023), the ImageNet recipe: a residual net, 90 epochs, top-1 and top-5 error, on any folder of classes.

    python examples/reproduce/imagenet.py --data-dir IMAGENET        # with train/CLASS/*.jpg and val/CLASS/*.jpg

trains the net by rec-LRA and by backpropagation, each with a checkpoint after every epoch (in --run), from which the
same command goes on after an interruption. The recipe is the usual one of residual nets: SGD with momentum 0.9 and
weight decay 1e-4, learning rate 0.1 for 256 pictures, divided by 10 every 30 epochs, random crops and flips.
`--quick` runs it on a small made-up folder, where only the ratio of the step times means something.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import Table, publish
from images import loaders, make_folder
from rich.console import Console
from rich.progress import Progress, TextColumn
from tables import NOT_AT_HAND, RESULTS, mean_std
from torch import Tensor, nn
from torch.utils.data import DataLoader

import graphlocal
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.files import write_with
from graphlocal.model_spec import load_model
from graphlocal.rules import find
from graphlocal.training import step_for, step_time_ratio

TITLE = "rec-LRA: the ImageNet recipe"
SIZES = {  # classes, pictures of each class to train and to test on, their size; the options that go with them
    "tiny": ((3, 8, 4, 32), ["--image-size=16", "--epochs=1", "--batch=8", "--model=imagenet:tiny_net"]),
    "quick": ((10, 40, 10, 72), ["--image-size=64", "--epochs=6", "--batch=32"]),
}


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says; the small sizes come with options of their own."""
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--data-dir", type=Path, help="the folder that holds train/CLASS and val/CLASS")
    parser.add_argument("--run", type=Path, default=Path("runs/imagenet"), help="the folder for checkpoints")
    parser.add_argument(
        "--model", default="torchvision.models:resnet18", help="module:callable, called with num_classes"
    )
    parser.add_argument("--rule", default="rec-lra")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.1, help="for batches of 256; others take their share")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("local", "backprop"), help="train one of the two only, and write no table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a made-up folder of 400 pictures, six epochs")
    parser.add_argument("--tiny", action="store_true", help="a made-up folder of 24 pictures, one epoch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that results are written to")
    first = parser.parse_args(argv)
    preset = SIZES["tiny" if first.tiny else "quick"][1] if first.tiny or first.quick else []
    return parser.parse_args([*preset, *(sys.argv[1:] if argv is None else argv)])


def tiny_net(num_classes: int) -> nn.Module:
    """A residual net that takes no time."""
    from reclra_cifar import ResidualNet

    return ResidualNet(3, num_classes, 4, 1)


class Training:
    """One net under training: by the rule, or by backpropagation; goes on from its checkpoint if there is one."""

    def __init__(self, way: str, given: argparse.Namespace, classes: int, example: Tensor) -> None:
        torch.manual_seed(given.seed)
        self.way, self.given, self.path, self.done = way, given, given.run / f"{way}.pt", 0
        self.model = load_model(given.model, [f"num_classes={classes}"]).to(given.device)
        if way == "local":
            example = example[:8].to(given.device)
            self.model = graphlocal.compile(self.model, example_inputs=(example,), rule=find(given.rule))
        decay = {"momentum": 0.9, "weight_decay": 1e-4}
        self.optimizer = torch.optim.SGD(self.model.parameters(), given.lr * given.batch / 256, **decay)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 30)
        self.step = step_for(self.model, self.optimizer)
        if self.path.is_file():
            self.restore()

    def save(self) -> None:
        parts = {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "schedule")}
        write_with(self.path, lambda path: torch.save({**parts, "done": self.done}, path))

    def restore(self) -> None:
        """Raises InputError for a damaged checkpoint, or one of another net."""
        try:
            saved = torch.load(self.path, map_location=self.given.device, weights_only=True)
            for part in ("model", "optimizer", "schedule"):
                getattr(self, part).load_state_dict(saved[part])
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            remedy = "remove it, or name another folder by --run"
            raise InputError(
                f"{self.path} is damaged, or of another net", why=str(error)[:200], remedy=remedy
            ) from None
        self.done = saved["done"]

    def epoch(self, train: DataLoader[Any], bar: Progress) -> None:
        """One pass over the training pictures; its crops and its order depend on seed and epoch alone."""
        torch.manual_seed(self.given.seed + 1 + self.done)
        task = bar.add_task(f"{self.way}, epoch {self.done + 1} of {self.given.epochs}", total=len(train), loss="")
        self.model.train()
        losses = []
        for x, y in train:
            losses.append(float(self.step(x.to(self.given.device), y.to(self.given.device))))
            bar.update(task, advance=1, loss=f"loss {losses[-1]:.3f}")
        bar.remove_task(task)
        self.schedule.step()
        self.done += 1
        self.save()
        bar.console.print(f"{self.way}, epoch {self.done} of {self.given.epochs}: loss {statistics.mean(losses):.4f}")

    def errors(self, train: DataLoader[Any], val: DataLoader[Any]) -> tuple[float, float]:
        """Top-1 and top-5 error in per cent, after recalibrating BatchNorm on 20 batches."""
        device = self.given.device
        graphlocal.recalibrate(self.model, [x.to(device) for (x, _), _ in zip(train, range(20), strict=False)])
        self.model.eval()
        wrong, count = torch.zeros(2), 0
        with torch.no_grad():
            for x, y in val:
                ranked = self.model(x.to(device)).cpu().topk(5 if len(val.dataset.classes) >= 5 else 1).indices
                hits = ranked == y[:, None]
                wrong += torch.tensor([(~hits[:, :1]).sum(), (~hits.any(1)).sum()])
                count += len(y)
        return 100 * float(wrong[0]) / count, 100 * float(wrong[1]) / count


def train_all(given: argparse.Namespace) -> Table | None:
    """Train by both ways, or by one; the table, if it was both."""
    train, val, classes = loaders(given.data_dir, given.image_size, given.batch, given.workers)
    x, y = (part.to(given.device) for part in next(iter(train)))
    ways = {way: Training(way, given, classes, x) for way in (given.only and [given.only]) or ("local", "backprop")}
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"))
    found = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for way, training in ways.items():
            while training.done < given.epochs:
                training.epoch(train, bar)
            found[way] = training.errors(train, val)
            bar.console.print(f"{way}: top-1 error {found[way][0]:.2f} %, top-5 error {found[way][1]:.2f} %")
    if len(found) < 2:
        return None
    for training in ways.values():
        training.model.train()
    steps = [lambda x, y, step=training.step: step(x, y).cpu() for training in ways.values()]  # waits for the device
    ratios = [step_time_ratio(*steps, x, y, 5) for _ in range(3)]
    notes = (
        f"{given.model} by {find(given.rule)}, partition 'auto'; {len(train.dataset):,} pictures of {classes} "
        f"classes at {given.image_size} pixels, {given.epochs} epochs, batches of {given.batch}, one seed. Step "
        "time: medians of 5 steps that alternate with backpropagation's, three times."
    )
    if given.quick or given.tiny:
        notes += " The pictures are made up, and their errors say no more than that the recipe runs."
    rows = [
        (name, NOT_AT_HAND, *(f"{found[way][place]:.1f}" for way in ("local", "backprop")))
        for place, name in enumerate(("top-1 error %", "top-5 error %"))
    ]
    rows.append(("step time, relative to backpropagation", NOT_AT_HAND, mean_std(ratios, digits=2), "1"))
    return Table(("quantity",), notes, rows)


def main(argv: Sequence[str] | None = None) -> None:
    given = options(argv)
    ending = "-tiny" if given.tiny else "-quick" if given.quick else ""
    torch.set_num_threads(1 if ending else torch.get_num_threads())
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if ending:
                given.data_dir = given.run = Path(temporary)
                make_folder(given.data_dir, *SIZES[ending[1:]][0])
            if given.data_dir is None:
                raise InputError("no pictures", remedy="name a folder with train/CLASS and val/CLASS by --data-dir")
            table = train_all(given)
    except GraphLocalError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last whole epoch", file=sys.stderr)
        raise SystemExit(130) from None
    if table is not None:
        print(publish("imagenet", TITLE, table, ending, given.results))


if __name__ == "__main__":
    main()
