"""LRA (2018), fine-tuning: nets that are trained by LRA first, and then by backpropagation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from experiment import Experiment, Run, Size, Table, main
from nets import DEEP, DEEP_HIDDEN, Fitted, fit, gaussian, network, plain
from tables import NOT_AT_HAND, mean_std
from torch import nn

from graphlocal.data import Dataset
from graphlocal.rules import LRAFeedback

STARTS = {"N(0, 0.025²)": gaussian(0.025), "N(0, 0.05²)": gaussian(0.05)}
RULE = LRAFeedback(c1=None)
LR = 0.03
"""Of the second half, which has to be taken alike by LRA and by backpropagation: at 0.1 LRA without c1 diverges."""


def two_halves(start: nn.Module, data: Dataset, epochs: int, seed: int) -> dict[str, Fitted]:
    """LRA for half of the epochs and for all, LRA and then backpropagation, and backpropagation for all."""
    second = replace(DEEP, lr=LR)
    first_half = fit(start, RULE, DEEP, data, epochs // 2, seed)
    met = plain(first_half.model)
    alone = fit(start, None, DEEP, data, epochs // 2, seed)
    return {
        "LRA, half of the epochs": first_half,
        "LRA, then LRA": fit(met, RULE, second, data, epochs - epochs // 2, seed + 1000),
        "LRA, then backpropagation": fit(met, None, second, data, epochs - epochs // 2, seed + 1000),
        "half": alone,
        "all": fit(plain(alone.model), None, second, data, epochs - epochs // 2, seed + 1000),
    }


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(
        ("initial weights", "trained by"),
        f"Test error in per cent. 784-8×128-10 tanh, `lra-fdbk`, batches of 50, SGD 0.01 in the first half of the "
        f"epochs and {LR} in the second; {run.described(data)}. Backprop: backpropagation all the way, for as many "
        "epochs.",
    )
    for name, weights in run.some(list(STARTS.items())):
        found = defaultdict(list)
        for seed in run.seeds:
            torch.manual_seed(seed)
            start = network(data, DEEP_HIDDEN, nn.Tanh, weights)
            for way, fitted in two_halves(start, data, max(2, run.size.epochs), seed).items():
                found[way].append(fitted.error)
            run.say(f"  {name} seed {seed}: " + ", ".join(f"{way} {values[-1]:.2f}" for way, values in found.items()))
        half, whole = mean_std(found.pop("half")), mean_std(found.pop("all"))
        for way, values in found.items():
            table.rows.append((name, way, NOT_AT_HAND, mean_std(values), half if "half" in way else whole))
    return table


EXPERIMENT = Experiment(
    "lra_finetune",
    "LRA: fine-tuning by backpropagation",
    quick=Size(epochs=4, train=20_000, test=5_000),
    full=Size(epochs=20),
    measure=measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
