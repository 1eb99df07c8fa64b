"""What a compilation depends on besides the inputs, looked at before every training step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn

State = tuple[torch.device, torch.dtype, list[bool], list[bool]]
"""Of a model: the device and dtype of its first parameter, the modes of its modules, which parameters learn."""

_PLACE = attrgetter("device", "dtype")
_MODE, _LEARNS = attrgetter("training"), attrgetter("requires_grad")
_VALUES = dict[str, Any].values


class ModelWatch:
    """Looks at a model's modules and parameters for changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.renew()

    def renew(self) -> None:
        """Take note of the modules and parameters that the model has now."""
        self.modules = list(self.model.modules())
        self.weights = list(self.model.parameters())
        self._first = self.weights[:1]
        users = [m for m in self.modules if not _is_torchs(m)]
        all_matter = any(map(_reads_mode, users))  # they may ask for that of another module
        self._with_modes = [m for m in self.modules if all_matter or not _is_torchs(m) or _reads_mode(m)]
        self._dicts: list[dict[str, Any]] = [
            d for m in self.modules for d in (m._modules, m._parameters) if d or not _is_torchs(m) or _holds(m)
        ]
        self.structure = list(self._identities())

    def replaced(self) -> bool:
        """Whether a module or a parameter is another one than it was."""
        return list(self._identities()) != self.structure

    def state(self) -> State:
        """What a compilation is chosen by, as long as nothing is replaced."""
        first = self.weights[0] if self.weights else torch.empty(0)
        return first.device, first.dtype, list(map(_MODE, self.modules)), list(map(_LEARNS, self.weights))

    def looks(self) -> list[Any]:
        """Structure and state in one list, which is quickly made and compared; without modes that change nothing."""
        return [
            *map(_PLACE, self._first), *map(_MODE, self._with_modes), *map(_LEARNS, self.weights), *self._identities()
        ]  # fmt: skip

    def _identities(self) -> Iterator[int]:
        """Of every submodule and parameter, in order."""
        return map(id, chain.from_iterable(map(_VALUES, self._dicts)))


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module is one of torch's, whose forward is known, and has no hooks."""
    return type(module).__module__.startswith("torch.nn.modules.") and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )


def _holds(module: nn.Module) -> bool:
    """Whether a module of torch's is one that others are put into."""
    return type(module).__module__ in ("torch.nn.modules.container", "torch.nn.modules.module")


def _reads_mode(module: nn.Module) -> bool:
    """Whether anything in a module's code looks at a training mode; True if its code is not known."""
    classes = type(module).__mro__
    own = [value for cls in classes[: classes.index(nn.Module)] for value in vars(cls).values()]
    codes = [value.__code__ for value in own if hasattr(value, "__code__")]
    return "forward" in module.__dict__ or any("training" in code.co_names for code in codes)
