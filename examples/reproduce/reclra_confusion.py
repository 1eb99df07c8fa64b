"""rec-LRA (2023), confusion metrics: precision and recall of every class, and the matrix as a picture."""

from __future__ import annotations

import numpy
import torch
from experiment import Experiment, Run, Size, Table, figure, main
from matplotlib.figure import Figure
from nets import WIDE_HIDDEN, Setting, fit, network
from tables import NOT_AT_HAND, mean_std
from torch import Tensor, nn

from graphlocal.data import Dataset
from graphlocal.rules import RecLRA

RULE = RecLRA(error_weights="kp", derivative=True)
SETTING = Setting(5e-4, torch.optim.Adam, 32)


def confusion(model: nn.Module, data: Dataset) -> Tensor:
    """How many test samples of each class (rows) were taken for each class (columns)."""
    classes = len(data.classes)
    model.eval()
    with torch.no_grad():
        found = model(data.test_x).argmax(1)
    return torch.bincount(data.test_y * classes + found, minlength=classes**2).view(classes, classes).cpu()


def precision(matrix: Tensor) -> Tensor:
    """Per cent of what is taken for a class that is of it; 0 where nothing is."""
    return 100 * matrix.diag() / matrix.sum(0).clamp_min(1)


def recall(matrix: Tensor) -> Tensor:
    """Per cent of a class that is taken for it."""
    return 100 * matrix.diag() / matrix.sum(1).clamp_min(1)


def drawn(matrices: dict[str, Tensor], classes: tuple[str, ...]) -> Figure:
    """The matrices side by side, in per cent of each row."""
    picture = figure(12, 5.6)
    for axes, (name, matrix) in zip(picture.subplots(1, len(matrices), sharey=True), matrices.items(), strict=True):
        share = 100 * matrix / matrix.sum(1, keepdim=True).clamp_min(1)
        axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in numpy.ndenumerate(share.numpy()):
            if value > 0.5:
                color = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        axes.set(title=name, xlabel="taken for")
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    picture.axes[0].set_ylabel("class")
    return picture


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    found: dict[str, list[Tensor]] = {"rec-LRA": [], "backprop": []}
    for seed in run.seeds:
        torch.manual_seed(seed)
        start = network(data, WIDE_HIDDEN, nn.Tanh)
        for name, rule in (("rec-LRA", RULE), ("backprop", None)):
            fitted = fit(start, rule, SETTING, data, run.size.epochs, seed)
            found[name].append(confusion(fitted.model, data))
            run.say(f"  seed {seed} {name}: {fitted.error:.2f} %")
    table = Table(
        ("class", "quantity"),
        f"784-3×256-10 tanh, {RULE}, Adam 5e-4, batches of 32; {run.described(data)}. The picture sums over the "
        "seeds; its numbers are per cent of a class, above 0.5.",
    )
    for quantity, of in (("precision %", precision), ("recall %", recall)):
        values = {name: torch.stack([of(matrix) for matrix in runs]) for name, runs in found.items()}
        for number, label in enumerate((*data.classes, "mean of the classes")):
            cells = [
                mean_std((v.mean(1) if number == len(data.classes) else v[:, number]).tolist()) for v in values.values()
            ]
            table.rows.append((label, quantity, NOT_AT_HAND, *cells))
    sums = {name: torch.stack(runs).sum(0) for name, runs in found.items()}
    table.caption = "Confusion matrices of rec-LRA and of backpropagation"
    table.picture = drawn(sums, data.classes)
    return table


EXPERIMENT = Experiment(
    "reclra_confusion",
    "rec-LRA: confusion metrics",
    quick=Size(epochs=3, train=10_000),
    full=Size(epochs=30),
    measure=measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
