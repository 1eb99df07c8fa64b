"""BatchNorm recalibration: running statistics of the weights that a model has now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphlocal.errors import InputError
from graphlocal.runtime import LocalModule
from graphlocal.stored import StoredModel

ENOUGH = 20
"""Batches that are usually enough."""


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every BatchNorm by averages over `batches`; returns how many were used.

    Fast local updates leave the exponential averages behind (they describe weights of many steps ago), so that a
    model evaluates worse than it is. batches: inputs, or (inputs, targets) pairs as a loader gives them; inputs
    may be a tensor, a tuple of positional inputs or a dict of keyword inputs. Weights, modes and momentum are
    left as they were. A model without BatchNorm is left alone.

    Raises InputError if `batches` is empty, and for a model that was loaded without its code.
    """
    compiled = model if isinstance(model, LocalModule) else None
    if compiled is not None:
        model = compiled.original
    if isinstance(model, StoredModel):
        raise InputError(
            "a model that was loaded without its code has no BatchNorm layers to recalibrate",
            remedy="load it with graphlocal.load(path, model=my_model)",
        )
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    used = 0
    try:
        model.train(False)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over all batches
            norm.train()
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
                used += 1
        if not used:
            raise InputError("recalibrate was given no batch", remedy=f"pass about {ENOUGH} batches")
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if compiled is not None:
        compiled._lag.reset()  # what was seen no longer holds
    return used


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        batch = batch[0]
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
