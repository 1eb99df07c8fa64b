"""Learning rules by name, and the base class to write one's own."""

from __future__ import annotations

from graphlocal.errors import InputError, nearest
from graphlocal.rules.aligning import AligningRule
from graphlocal.rules.alignment import DirectFeedbackAlignment, FeedbackAlignment, KolenPollack, SignSymmetric
from graphlocal.rules.backprop import Backprop
from graphlocal.rules.base import Calibration, Head, Neuron, Rule, features, loss_connections, vjp_connections
from graphlocal.rules.calibrated import Calibrated
from graphlocal.rules.dtp import DifferenceTargetPropagation
from graphlocal.rules.equilibrium import EquilibriumPropagation, RelaxingRule
from graphlocal.rules.local_loss import LocalLoss
from graphlocal.rules.lp import LP
from graphlocal.rules.lra import LRADiff, LRAFeedback
from graphlocal.rules.nlp import NLP
from graphlocal.rules.rec_lra import RecLRA
from graphlocal.rules.wiring import feedback_along_data, feedback_connection, skip_errors_from_output

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Backprop,
        Calibrated,
        RecLRA,
        LRAFeedback,
        LRADiff,
        FeedbackAlignment,
        DirectFeedbackAlignment,
        KolenPollack,
        SignSymmetric,
        LocalLoss,
        DifferenceTargetPropagation,
        EquilibriumPropagation,
        LP,
        NLP,
    )
}


def find(rule: str | Rule) -> Rule:
    """A rule by name with its default options, or the instance itself.

    Raises InputError for an unknown name (with the nearest match) or something that is no rule.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise InputError(f"rule={rule.__name__} is a class", remedy=f"pass an instance: {rule.__name__}()")
    if not isinstance(rule, str) or rule not in RULES:
        raise InputError(
            f"unknown rule {rule!r}: {nearest(rule, RULES)}",
            remedy=f"rules: {', '.join(RULES)}, or an instance of a subclass of graphlocal.rules.Rule",
        )
    return RULES[rule]()


__all__ = [
    "LP",
    "NLP",
    "RULES",
    "AligningRule",
    "Backprop",
    "Calibrated",
    "Calibration",
    "DifferenceTargetPropagation",
    "DirectFeedbackAlignment",
    "EquilibriumPropagation",
    "FeedbackAlignment",
    "Head",
    "KolenPollack",
    "LRADiff",
    "LRAFeedback",
    "LocalLoss",
    "Neuron",
    "RecLRA",
    "RelaxingRule",
    "Rule",
    "SignSymmetric",
    "features",
    "feedback_along_data",
    "feedback_connection",
    "find",
    "loss_connections",
    "skip_errors_from_output",
    "vjp_connections",
]  # fmt: skip
