"""What a zoo model is, the registry, and the losses and inputs that the models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 3
IMAGES = 5
CLASSES = 4
VOCABULARY = 11


@dataclass(frozen=True)
class ZooModel:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple | dict]
    loss: Callable[[Any], Tensor]
    tags: frozenset[str]
    expect: str = "compiled"  # or "opaque", "refused", "either"

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh model in training mode; the caller's random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(dtype).train()

    def example(self, dtype: torch.dtype = torch.float32) -> tuple | dict:
        """Fresh example inputs, the floating-point ones in `dtype`."""
        inputs = self.inputs()
        if isinstance(inputs, dict):
            return {key: cast(value, dtype) for key, value in inputs.items()}
        return tuple(cast(value, dtype) for value in inputs)


MODELS: dict[str, ZooModel] = {}
HARD: dict[str, ZooModel] = {}
BAD: dict[str, ZooModel] = {}


def models(*, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list:
    """Parameters for pytest: those with any tag or name in `include`, less any in `exclude`."""
    unknown = {*include, *exclude} - set(MODELS).union(*(zoo.tags for zoo in MODELS.values()))
    assert not unknown, f"no model has the name or tag {sorted(unknown)}"

    def matches(zoo: ZooModel, words: tuple[str, ...]) -> bool:
        return bool({zoo.name, *zoo.tags} & set(words))

    chosen = [zoo for zoo in MODELS.values() if not include or matches(zoo, include)]
    return [pytest.param(zoo, id=zoo.name) for zoo in chosen if not matches(zoo, exclude)]


def call(module: Callable[..., Any], inputs: tuple | dict) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


# Losses and inputs: no state, the same values on every call.


def classify(output: Tensor) -> Tensor:
    """Cross-entropy over dimension 1 of two (or more) dimensions, fixed labels, batch mean."""
    labels = torch.arange(output[:, 0].numel(), device=output.device) % output.shape[1]
    return F.cross_entropy(output, labels.view_as(output[:, 0]))


def fit(output: Any) -> Tensor:
    """Mean squared distance of every tensor in the output to fixed values, summed."""
    losses = []
    for leaf in leaves(output):
        target = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        losses.append(F.mse_loss(leaf, target.view_as(leaf)))
    return torch.stack(losses).sum()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 0, high: int = VOCABULARY) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def vectors() -> tuple[Tensor]:
    return (normal(BATCH, 6),)


def pictures() -> tuple[Tensor]:
    return (normal(BATCH, 2, 8, 8),)


def photos() -> tuple[Tensor]:
    return (normal(IMAGES, 3, 32, 32),)


def sequences() -> tuple[Tensor]:
    return (normal(BATCH, 5, 8),)


def sentences() -> tuple[Tensor]:
    return (tokens(BATCH, 5),)


def model(
    name: str,
    inputs: Callable[[], tuple | dict] = vectors,
    loss: Callable[[Any], Tensor] = classify,
    tags: str = "",
    into: dict[str, ZooModel] = MODELS,
    expect: str = "compiled",
) -> Callable[[Any], Any]:
    """Register a module class, or a function that builds a module, under `name`."""

    def register(build: Any) -> Any:
        assert name not in into, name
        into[name] = ZooModel(name, build, inputs, loss, frozenset(tags.split()), expect)
        return build

    return register
