"""Run a user's model without leaving a trace on it: attributes, buffers, gradients, modes and random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called")))


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore on leaving, also after an error, all that a forward or backward pass can change.

    That is every submodule's attributes, registries and hooks (a plain attribute holding a mutable object is
    restored by reference), the values of the buffers, `grad` of the parameters, and the random state. Autograd takes no
    notice: what an earlier forward pass keeps stays as good as it was.
    """
    with unnoticed(model.buffers()), restored(model):
        yield


def unnoticed(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Changes of these tensors that autograd need not know of: that are undone, or that no derivative reads."""
    context: AbstractContextManager[None] = _unsafe_preserve_version_counter(
        tuple(x for x in tensors if not x.is_inference())
    )
    return context


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """What `preserved` restores, and autograd notices: for a forward pass inside whose backward pass comes outside."""
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    registries = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (module.__dict__[name] for name in (*_REGISTRIES, *_HOOKS) if name in module.__dict__)
    ]
    with torch.no_grad():
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        with preserved_random_state():
            yield
    finally:
        for module, values in attributes:
            module.__dict__.clear()
            module.__dict__.update(values)
        for registry, entries in registries:
            _refill(registry, entries)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def watched_calls(
    model: nn.Module, enter: Callable[[str, nn.Module], None], leave: Callable[[], object]
) -> Iterator[None]:
    """While open, `enter(path, module)` is called before each module runs (the root has the path "") and `leave()`
    after it; not after one that raised.
    """

    def after(*_: object) -> None:
        leave()

    handles = []
    for path, module in model.named_modules():
        before = partial(enter, path)
        handles.append(module.register_forward_pre_hook(lambda m, _, before=before: before(m), prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undone_on(error: type[Exception], model: nn.Module) -> Iterator[None]:
    """If the block raises `error`, give the buffers and torch's generators the values from before it."""
    kept = unnoticed(model.buffers())
    with torch.no_grad():
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except error:
        with torch.no_grad(), kept:
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        raise


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore Python's, numpy's and torch's random state (every CUDA device included) on leaving."""
    state, numpy_state = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model that is in evaluation mode as a whole into training mode; put back on leaving.

    A model that is in training mode keeps the mode of each of its parts, such as a frozen BatchNorm.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        if not model.training:
            model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _refill(registry: dict[str, Any], entries: dict[str, Any]) -> None:
    registry.clear()
    registry.update(entries)
