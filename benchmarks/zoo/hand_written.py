"""The models of the test suite: small ones, and those written to be hard."""

from __future__ import annotations

from benchmarks.zoo.case import Case


def cases() -> list[Case]:
    import zoo  # tests/zoo

    return [
        Case("hand-written", model.name, model.make, model.example, model.loss, model.expect)
        for model in (*zoo.MODELS.values(), *zoo.HARD.values())
    ]
