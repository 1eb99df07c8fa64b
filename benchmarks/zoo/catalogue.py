"""All cases of the zoo, by family."""

from __future__ import annotations

from importlib import import_module

from benchmarks.zoo.case import Case

FAMILIES = {
    "torchvision": "torchvision_models",
    "timm": "timm_models",
    "transformers": "hugging_face",
    "hand-written": "hand_written",
}
"""Family -> the module of this folder that lists its cases."""


def cases(family: str) -> list[Case]:
    return import_module(f"benchmarks.zoo.{FAMILIES[family]}").cases()


def find(name: str) -> Case:
    """The case with the id `family/name`."""
    return next(case for case in cases(name.partition("/")[0]) if case.id == name)
