"""LRA (2018), null initialisation: all weights and biases start at zero, with every activation function."""

from __future__ import annotations

from functools import partial

from experiment import Experiment, Run, Size, Table, main
from nets import DEEP_HIDDEN, FAST, FASTER, LARGE, SMALL, Setting, Unit, network, test_error
from tables import NOT_AT_HAND
from torch import Tensor, nn

from graphlocal.nn import LWTA, Bernoulli, Signum
from graphlocal.rules import LRAFeedback, Rule


class ReLU6(nn.Module):
    """min(max(x, 0), 6) with the derivative 1 at 0, where torch's own has 0 and would never leave a null start."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


class Softplus6(nn.Module):
    """min(softplus(x), 6)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x).clamp(max=6)


BOUNDED = LRAFeedback(rescale=None), FAST
"""Under the paper's rule units without an upper bound, or with a high one, diverge without the bound c1."""
UNITS: dict[str, tuple[Unit, tuple[Rule, Setting], Setting]] = {
    "tanh": (nn.Tanh, SMALL, FAST),
    "sigmoid": (nn.Sigmoid, LARGE, FASTER),
    "ReLU-6": (ReLU6, BOUNDED, FAST),
    "softplus": (nn.Softplus, BOUNDED, FAST),
    "softplus, at most 6": (Softplus6, BOUNDED, FAST),
    "signum of tanh": (lambda: nn.Sequential(nn.Tanh(), Signum()), SMALL, FAST),
    "Bernoulli": (Bernoulli, LARGE, FASTER),
    "LWTA, blocks of 4": (lambda: LWTA(4), BOUNDED, FAST),
}
"""The paper's rule with its settings, and the learning rate of ours with its defaults."""


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(("activation", "rule", "learning rate"), NOTES.format(size=run.described(data)))
    for name, (unit, paper, setting) in run.some(list(UNITS.items())):
        run.say(name)
        make = partial(network, data, DEEP_HIDDEN, unit, nn.init.zeros_)
        true = test_error(run, make, None, setting, data)
        for rule, chosen in (paper, (LRAFeedback(), setting)):
            local = test_error(run, make, rule, chosen, data)
            table.rows.append((name, str(rule), f"{chosen.lr:g}", NOT_AT_HAND, local, true))
    return table


NOTES = (
    "Test error in per cent. 784-8×128-10, all weights and biases 0 at the start, SGD, batches of 50; {size}. "
    "rescale=None is the paper's normalization, each sample by itself; without it errors keep their size."
)
EXPERIMENT = Experiment(
    "lra_null", "LRA: null initialisation", quick=Size(epochs=1, test=5_000), full=Size(epochs=20), measure=measure
)

if __name__ == "__main__":
    main(EXPERIMENT)
