"""Autocast: the state in which a forward pass ran, for what runs again in it later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]
"""The kinds of devices for which autocast is on, each with its dtype."""

_KINDS = ("cpu", "cuda")

is_on = torch._C._is_any_autocast_enabled
off = torch._C._DisableAutocast
"""A context without autocast."""


def autocast_now() -> Autocast:
    """Where autocast is on."""
    return tuple((k, torch.get_autocast_dtype(k)) for k in _KINDS if torch.is_autocast_enabled(k))


@contextmanager
def under(autocast: Autocast) -> Iterator[None]:
    """A context in which autocast is on where it was then, and off elsewhere."""
    now, wanted = dict(autocast_now()), dict(autocast)
    with ExitStack() as stack:
        for kind in _KINDS:
            dtype = wanted.get(kind)
            if dtype is not now.get(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
        yield
