"""LRA (2018), robustness to the initial weights: deep nets from several starts, by LRA and by backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from experiment import Experiment, Run, Size, Table, main
from nets import DEEP_HIDDEN, FAST, FASTER, LARGE, SMALL, Setting, Unit, gaussian, network, test_error
from tables import NOT_AT_HAND
from torch import Tensor, nn

from graphlocal.rules import LRAFeedback, Rule

STARTS: dict[str, Callable[[Tensor], object]] = {
    "N(0, 0.025²)": gaussian(0.025),
    "N(0, 0.05²)": gaussian(0.05),
    "N(0, 0.1²)": gaussian(0.1),
    "Glorot, uniform": nn.init.xavier_uniform_,
    "He, normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}
QUICK = ("N(0, 0.025²)", "N(0, 0.1²)", "Glorot, uniform", "orthogonal")
UNITS: dict[str, tuple[Unit, tuple[Rule, Setting], Setting]] = {
    "tanh": (nn.Tanh, SMALL, FAST),
    "sigmoid": (nn.Sigmoid, LARGE, FASTER),
}
"""The paper's rule with its settings, and the learning rate of ours with its defaults."""


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(
        ("activation", "initial weights", "rule", "learning rate"),
        f"Test error in per cent. 784-8×128-10, `lra-fdbk`, SGD, batches of 50, biases 0; {run.described(data)}. "
        "rescale=None is the paper's normalization, each sample by itself; without it errors keep their size. "
        "Backprop: at the learning rate of the paper's rule (0.15 is 0.003 on the sum over a batch).",
    )
    for unit_name, (unit, paper, setting) in run.some(list(UNITS.items())):
        for start, weights in run.some(list(STARTS.items()), [(name, STARTS[name]) for name in QUICK]):
            run.say(unit_name, start)
            make = partial(network, data, DEEP_HIDDEN, unit, weights)
            true = test_error(run, make, None, paper[1], data)
            for rule, chosen in (paper, (LRAFeedback(), setting)):
                local = test_error(run, make, rule, chosen, data)
                table.rows.append((unit_name, start, str(rule), f"{chosen.lr:g}", NOT_AT_HAND, local, true))
    return table


EXPERIMENT = Experiment(
    "lra_initialisation",
    "LRA: robustness to the initial weights",
    quick=Size(epochs=1, test=5_000),
    full=Size(epochs=20),
    measure=measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
