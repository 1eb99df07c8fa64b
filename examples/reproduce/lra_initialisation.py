"""LRA (2018), robustness to the initial weights: deep nets from several starts, by LRA and by backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from experiment import Experiment, Run, Size, Table, main
from nets import DEEP_HIDDEN, LARGE, SMALL, Setting, Unit, gaussian, network, test_error
from tables import NOT_AT_HAND
from torch import Tensor, nn

from graphlocal.rules import LRAFeedback

STARTS: dict[str, Callable[[Tensor], object]] = {
    "N(0, 0.025²)": gaussian(0.025),
    "N(0, 0.05²)": gaussian(0.05),
    "N(0, 0.1²)": gaussian(0.1),
    "Glorot, uniform": nn.init.xavier_uniform_,
    "He, normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}
QUICK = ("N(0, 0.025²)", "N(0, 0.1²)", "Glorot, uniform", "orthogonal")
UNITS: dict[str, tuple[Unit, LRAFeedback, Setting]] = {
    "tanh": (nn.Tanh, *SMALL),
    "sigmoid": (nn.Sigmoid, *LARGE),
}


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(
        ("activation", "initial weights"),
        f"Test error in per cent. 784-8×128-10, `lra-fdbk`, batches of 50, biases 0; {run.described(data)}. tanh: "
        "SGD 0.01, c2 = 1, E from N(0, 1 / 128). sigmoid: SGD 0.15 (0.003 on the sum over a batch), c2 = 5, E from "
        "N(0, 1).",
    )
    for unit_name, (unit, rule, setting) in run.some(list(UNITS.items())):
        for start, weights in run.some(list(STARTS.items()), [(name, STARTS[name]) for name in QUICK]):
            run.say(unit_name, start)
            make = partial(network, data, DEEP_HIDDEN, unit, weights)
            local, true = (test_error(run, make, r, setting, data) for r in (rule, None))
            table.rows.append((unit_name, start, NOT_AT_HAND, local, true))
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
