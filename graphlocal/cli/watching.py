"""What `graphlocal train` shows and keeps while it trains: --run, --tensorboard, --live, --every."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from graphlocal.cli.options import console
from graphlocal.data import Dataset
from graphlocal.live_view import LiveView
from graphlocal.monitor import Monitor
from graphlocal.runtime import LocalModule
from graphlocal.snapshots import Keeper
from graphlocal.training import History, Step

RunFolder = Annotated[Path | None, typer.Option(
    "--run", metavar="DIR", help="Keep a log of the run in this new folder, for `graphlocal report`.",
)]  # fmt: skip
TensorBoardFolder = Annotated[Path | None, typer.Option(
    "--tensorboard", metavar="DIR", help="Write scalars and histograms for TensorBoard here.",
)]  # fmt: skip
LiveTable = Annotated[bool, typer.Option("--live", help="Show every subgraph's local loss and angle while training.")]
Every = Annotated[int | None, typer.Option(
    "--every", min=1, help="Observe every so many steps. [default: 50; 5 or more in a short run]",
)]  # fmt: skip

SELDOMEST, OFTENEST, OBSERVATIONS, ANGLES = 50, 5, 100, 20
"""Steps between observations, at most and at least, for so many of them in a run, and so many angles."""
HELD = 256
"""Training samples that angles are measured on."""


@dataclass(frozen=True)
class Watch:
    """The options of one run."""

    run: Path | None
    tensorboard: Path | None
    live: bool
    every: int | None

    @property
    def on(self) -> bool:
        return bool(self.run or self.tensorboard or self.live)


@dataclass
class Watched:
    """A training that is watched; without a monitor it does nothing."""

    local: LocalModule
    monitor: Monitor | None = None
    live: LiveView | None = None
    keeper: Keeper | None = None

    def step(self, model: object, step: Step) -> Step:
        """The step to train a model with."""
        if model is not self.local or self.monitor is None:
            return step
        if self.keeper is not None:
            self.keeper.keep(0)
        return self.monitor.watch(step)

    def around(self, model: object, progress: Progress) -> AbstractContextManager[Any]:
        """What shows a training's progress."""
        return self.live.around(progress) if self.live is not None and model is self.local else progress

    def epoch(self, model: object, name: str, history: History) -> None:
        """Note that an epoch ended."""
        if self.monitor is None:
            return
        epoch, mine = len(history.loss), model is self.local
        seconds, error = history.seconds[-1], history.test_error[-1]
        self.monitor.epoch(epoch, history.loss[-1], error, seconds, of="local" if mine else name)
        if mine and self.keeper is not None:
            self.keeper.keep(epoch)


@contextmanager
def watching(
    options: Watch, local: LocalModule, data: Dataset, epochs: int, batch_size: int, meta: dict[str, Any]
) -> Iterator[Watched]:
    """Watch the training of `local` while open. Raises InputError where a folder can't be written or is in use."""
    if not options.on:
        yield Watched(local)
        return
    total = epochs * -(-len(data.train_x) // batch_size)
    every = options.every or max(OFTENEST, min(SELDOMEST, total // OBSERVATIONS))
    angle_every = every * max(1, min(10, total // every // ANGLES))
    live = LiveView(console, local.graph) if options.live else None
    meta = {"command": shlex.join(["graphlocal", *sys.argv[1:]]), "data": data.name, "batch_size": batch_size, **meta}
    monitor = Monitor(
        local, cross_entropy, every=every, angle_every=angle_every,
        held=(data.train_x[:HELD], data.train_y[:HELD]), run=options.run,
        meta=meta | {"epochs": epochs, "every": every, "angle_every": angle_every},
        tensorboard=options.tensorboard, views=[live] if live else [],
    )  # fmt: skip
    with monitor:
        keeper = None
        if options.run is not None:
            keeper = Keeper(options.run, local, data.test_x, data.test_y, data.classes, batch_size)
        yield Watched(local, monitor, live, keeper)
        console.print(f"observing every {every} steps took {monitor.overhead:.1f} s of the training time")
        for what, folder in (("run", options.run), ("TensorBoard's files", options.tensorboard)):
            if folder is not None:
                console.print(f"{what} written to {folder}", markup=False)
