"""LRA (2018), stochastic and discrete units, which have no derivative: local rules beside estimators of gradients."""

from __future__ import annotations

from functools import partial

import torch
from experiment import Experiment, Run, Size, Table, main
from nets import Setting, Unit, network, test_error
from tables import NOT_AT_HAND
from torch import nn

from graphlocal.nn import LWTA, Bernoulli, Signum
from graphlocal.rules import Backprop, LRAFeedback, RecLRA, Rule

SETTING = Setting(5e-4, torch.optim.Adam, 32)
STRAIGHT = Backprop(estimator="straight-through")
UNITS: dict[str, tuple[Unit, tuple[int, ...], Rule | None]] = {
    "Bernoulli, 2×200": (Bernoulli, (200, 200), STRAIGHT),
    "signum of tanh, 3×256": (lambda: nn.Sequential(nn.Tanh(), Signum()), (256,) * 3, STRAIGHT),
    "signum, 3×256": (Signum, (256,) * 3, STRAIGHT),
    "LWTA in blocks of 4, 3×256": (lambda: LWTA(4), (256,) * 3, None),
}
RULES: tuple[Rule, ...] = (LRAFeedback(rescale=None), LRAFeedback(), RecLRA(), RecLRA(error_weights="kp"))
ADJUSTED = Backprop(estimator="slope-adjusted")


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(
        ("units", "rule"),
        f"Test error in per cent; Adam 5e-4, batches of 32; {run.described(data)}. Bernoulli units draw when the net "
        "learns, and give their mean when it is tested. Backprop: with the straight-through estimator, where it needs "
        "one; the slope-adjusted estimator (sigmoid-adjusted for Bernoulli units) stands in a row of its own.",
    )
    for name, (unit, hidden, estimator) in run.some(list(UNITS.items())):
        run.say(name)
        make = partial(network, data, hidden, unit)
        true = test_error(run, make, estimator, SETTING, data)
        rules = (*RULES, *([ADJUSTED] if estimator is not None and name != "signum, 3×256" else []))
        for rule in run.some(rules):
            table.rows.append((name, str(rule), NOT_AT_HAND, test_error(run, make, rule, SETTING, data), true))
    return table


EXPERIMENT = Experiment(
    "lra_discrete",
    "LRA: stochastic and discrete units",
    quick=Size(epochs=2, train=10_000, test=5_000),
    full=Size(epochs=20),
    measure=measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
