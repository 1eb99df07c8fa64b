"""Every error that graphlocal raises: what happened, where in the user's model, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphLocalError(Exception):
    """Base class of all graphlocal errors.

    `where` names a place in the user's model (module path, file:line), `why` the cause, `remedy` the way out.
    """

    def __init__(
        self, message: str, *, where: str | None = None, why: str | None = None, remedy: str | None = None
    ) -> None:
        self.message, self.where, self.why, self.remedy = message, where, why, remedy
        labelled = (("where", where), ("why", why), ("remedy", remedy))
        super().__init__("\n".join([message, *(f"  {label}: {text}" for label, text in labelled if text)]))


class InputError(GraphLocalError, ValueError):
    """An argument of a graphlocal call, or an input of a compiled model, is not what it must be."""


class FileFormatError(InputError):
    """A file given to `graphlocal.load` is damaged, hostile, or of a version that is not known here."""


class TraceError(GraphLocalError):
    """The model could not be turned into a graph that computes the same."""


class PartitionError(GraphLocalError):
    """The wanted partition is not one: a glob without a match, a cut that is not convex."""


class VerifyError(GraphLocalError):
    """The intermediate representation breaks a named rule of the verifier."""

    def __init__(self, rule: str, message: str, *, where: str | None = None, why: str | None = None,
                 remedy: str | None = None) -> None:  # fmt: skip
        self.rule = rule
        super().__init__(f"[{rule}] {message}", where=where, why=why, remedy=remedy)


class CycleError(VerifyError):
    """The error paths form a cycle; `cycle` lists its subgraphs, the first one again at the end."""

    def __init__(self, rule: str, message: str, cycle: tuple[str, ...], *, why: str | None = None,
                 remedy: str | None = None) -> None:  # fmt: skip
        self.cycle = cycle
        super().__init__(rule, message, why=why, remedy=remedy)


class LocalTrainingError(GraphLocalError, RuntimeError):
    """A training step could not be carried out, such as a NaN in a local error."""


class GuardFailure(GraphLocalError):
    """The data took another path through the model than the one that was recorded."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?", or the list of what is known when nothing is near, as for a name that is no text."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) else []
    if close:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"known: {listed}" if known else "none is known"
