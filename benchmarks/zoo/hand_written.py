"""The models of the test suite: small ones, and those written to be hard."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.zoo.case import Case


def cases() -> list[Case]:
    import zoo  # tests/zoo

    return [
        Case("hand-written", model.name, _under_seed(model), model.example, model.loss, model.expect)
        for model in (*zoo.MODELS.values(), *zoo.HARD.values())
    ]


def _under_seed(model: object) -> Callable:
    return lambda: model.make()
