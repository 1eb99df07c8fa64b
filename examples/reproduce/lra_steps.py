"""LRA (2018), the effect of K, the number of steps of a target in `lra-diff`, with the filters that come out."""

from __future__ import annotations

import statistics
from collections import defaultdict

import torch
from experiment import Experiment, Run, Size, Table, figure, main
from matplotlib.figure import Figure
from nets import DEEP, fit, gaussian, network, plain
from tables import NOT_AT_HAND, mean_std
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

import graphlocal
from graphlocal.data import Dataset
from graphlocal.rules import LRADiff, Neuron

HIDDEN = (128,) * 5
STEPS = (1, 2, 3, 4, 5, 10, 20, 50)
FILTERS = 12


class Noting(LRADiff):
    """LRA-diff that takes note of the steps of each target."""

    def __init__(self) -> None:
        super().__init__(steps=2, c1=None)
        object.__setattr__(self, "noted", defaultdict(list))

    def move(self, neuron: Neuron, displacement: Tensor) -> Tensor:
        moved = super().move(neuron, displacement)
        self.noted[neuron.name].append((moved - neuron.h).detach())
        return moved


def agreement(model: nn.Module, data: Dataset) -> float:
    """The mean cosine of the first two steps of a target, over 500 training samples and the hidden layers."""
    rule, x, y = Noting(), data.train_x[:500], data.train_y[:500]
    local = graphlocal.compile(plain(model), example_inputs=x, rule=rule, target="eager").train()
    rule.noted.clear()
    cross_entropy(local(x), y).backward()
    return statistics.mean(
        float(cosine_similarity(first, second, dim=1).mean()) for first, second in rule.noted.values()
    )


def filters(model: nn.Module) -> Tensor:
    """The first layer's weights as images of 2 dimensions, those of the largest norm first."""
    weight = next(p for p in model.parameters() if p.dim() == 2).detach().cpu()
    side = int(weight.shape[1] ** 0.5)
    return weight[weight.norm(dim=1).argsort(descending=True)[:FILTERS]].view(-1, side, side)


def gallery(rows: dict[str, Tensor]) -> Figure:
    """A row of filters for each name, each filter from blue over white to red, by its own largest weight."""
    picture = figure(8, 0.75 * len(rows) + 0.2)
    axes = picture.subplots(len(rows), FILTERS, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for place, image in zip(line, images, strict=True):
            limit = float(image.abs().max()) or 1.0
            place.imshow(image.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            place.set(xticks=[], yticks=[])
    return picture


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(
        ("K", "quantity"),
        f"784-5×128-10 tanh, weights N(0, 0.025²), `lra-diff` (β = 1, c2 = 1), SGD 0.01, "
        f"batches of 50; {run.described(data)}. The more often a target is moved, the further it may lie from where "
        "the small weights of the layers above leave it, and the larger is the error that the layers below get. The "
        "cosine is that of a target's first two steps in the trained net, the mean of the hidden layers and of 500 "
        "samples: below 0 the second goes back. The "
        f"picture has the {FILTERS} filters of the first layer with the largest norm, each scaled by its own largest "
        "weight.",
    )
    backprop: list[float] = []
    found: dict[int, list[float]] = defaultdict(list)
    cosines: dict[int, list[float]] = defaultdict(list)
    shown: dict[str, Tensor] = {}
    for seed in run.seeds:
        torch.manual_seed(seed)
        start = network(data, HIDDEN, nn.Tanh, gaussian(0.025))
        true = fit(start, None, DEEP, data, run.size.epochs, seed)
        backprop.append(true.error)
        shown = shown or {"start": filters(start), "backprop": filters(true.model)}
        for steps in run.some(STEPS, STEPS[:6]):
            fitted = fit(start, LRADiff(steps=steps, c1=None), DEEP, data, run.size.epochs, seed)
            found[steps].append(fitted.error)
            cosines[steps].append(agreement(fitted.model, data))
            shown.setdefault(f"K = {steps}", filters(fitted.model))
            run.say(
                f"  seed {seed} K = {steps}: {fitted.error:.2f} % (backprop {statistics.mean(backprop):.2f}), "
                f"cosine {cosines[steps][-1]:.2f}"
            )
    for steps, values in found.items():
        table.rows.append((str(steps), "test error %", NOT_AT_HAND, mean_std(values), mean_std(backprop)))
        table.rows.append((str(steps), "cosine of two steps", NOT_AT_HAND, mean_std(cosines[steps], 2), ""))
    table.caption = "Filters of the first layer at the start and after training (first seed)"
    table.picture = gallery(shown)
    return table


EXPERIMENT = Experiment(
    "lra_steps",
    "LRA: the effect of K",
    quick=Size(epochs=2, train=10_000, test=5_000),
    full=Size(epochs=10),
    measure=measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
