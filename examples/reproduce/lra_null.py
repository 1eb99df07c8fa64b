"""LRA (2018), null initialisation: all weights and biases start at zero, with every activation function."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from experiment import Experiment, Run, Size, Table, main
from nets import DEEP, DEEP_HIDDEN, LARGE, SMALL, Setting, Unit, network, test_error
from tables import NOT_AT_HAND
from torch import Tensor, nn

from graphlocal.nn import LWTA, Bernoulli, Signum
from graphlocal.rules import LRAFeedback


class ReLU6(nn.Module):
    """min(max(x, 0), 6) with the derivative 1 at 0, where torch's own has 0 and would never leave a null start."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


BOUNDED = LRAFeedback(), replace(DEEP, lr=0.03)
"""Units without an upper bound, or with a high one, diverge without the bound c1 on the updates."""
UNITS: dict[str, tuple[Unit, LRAFeedback, Setting]] = {
    "tanh": (nn.Tanh, *SMALL),
    "sigmoid": (nn.Sigmoid, *LARGE),
    "ReLU-6": (ReLU6, *BOUNDED),
    "softplus": (nn.Softplus, *BOUNDED),
    "signum of tanh": (lambda: nn.Sequential(nn.Tanh(), Signum()), *SMALL),
    "Bernoulli": (Bernoulli, *LARGE),
    "LWTA, blocks of 4": (lambda: LWTA(4), *BOUNDED),
}


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(("activation", "rule", "learning rate"), NOTES.format(size=run.described(data)))
    for name, (unit, rule, setting) in run.some(list(UNITS.items())):
        run.say(name)
        make = partial(network, data, DEEP_HIDDEN, unit, nn.init.zeros_)
        local, true = (test_error(run, make, r, setting, data) for r in (rule, None))
        table.rows.append((name, str(rule), f"{setting.lr:g}", NOT_AT_HAND, local, true))
    return table


NOTES = "Test error in per cent. 784-8×128-10, all weights and biases 0 at the start, SGD, batches of 50; {size}."
EXPERIMENT = Experiment(
    "lra_null", "LRA: null initialisation", quick=Size(epochs=1, test=5_000), full=Size(epochs=20), measure=measure
)

if __name__ == "__main__":
    main(EXPERIMENT)
