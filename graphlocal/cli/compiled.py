"""The compiled model that a command's MODEL and options stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import graphlocal
from graphlocal.cli.options import make_rule
from graphlocal.errors import InputError
from graphlocal.model_spec import example_inputs, load_model, parse_partition


def compiled_model(
    model: str, input: Sequence[str], set: Sequence[str], rule: str, partition: str, depth: int, recompute: str = ""
) -> graphlocal.LocalModule:
    """`module:callable`, compiled with these options; a file that `local.save` wrote, as it was compiled.

    Raises InputError for options beside a file, which holds its own, and as `graphlocal.compile` and `graphlocal.load`
    do.
    """
    if not is_saved(model):
        return graphlocal.compile(
            load_model(model, set), example_inputs=example_inputs(input), rule=make_rule(rule, depth),
            partition=parse_partition(partition), recompute=recompute.split(",") if recompute else False,
        )  # fmt: skip
    given = {"--input": input, "--set": set, "--rule": rule != "rec-lra", "--partition": partition != "auto",
             "--depth": depth != 1, "--recompute": recompute}  # fmt: skip
    options = [name for name, wanted in given.items() if wanted]
    if options:
        raise InputError(
            f"{', '.join(options)} beside {model}", why="a saved model holds its inputs, rule and partition",
            remedy="leave them out, or name the model's own code as module:callable",
        )  # fmt: skip
    return graphlocal.load(model)


def is_saved(model: str) -> bool:
    """Whether MODEL names a file instead of a callable."""
    return model.endswith(".local") or Path(model).is_file()
