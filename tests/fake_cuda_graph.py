"""A CUDA graph for machines without a GPU: records operators and where their tensors lie, and runs them again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphlocal.captured_step import CapturedStep


class Address:
    """Where a tensor lies, whatever its object holds later.

    made: whether the capture made its memory, so that the graph owns it. Any other is freed as if there were no graph.
    """

    def __init__(self, x: Tensor, made: bool) -> None:
        self.dtype, self.view = x.dtype, (x.storage_offset(), x.size(), x.stride())
        self.memory: Any = x.untyped_storage() if made else StorageWeakRef(x.untyped_storage())

    def tensor(self) -> Tensor:
        memory = self.memory
        if isinstance(memory, StorageWeakRef):
            assert not memory.expired(), "a replay reads or writes memory that was freed"
            memory = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
        return torch.empty(0, dtype=self.dtype).set_(memory, *self.view)


class Recorder(TorchDispatchMode):
    """Records every operator, with the addresses and the Python numbers that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # each memory, and what was in it
        self.made: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage()
                self.before.setdefault(memory._cdata, (memory, memory.clone()))
        if function is torch.ops.aten.lift_fresh.default:  # a number that Python has just made into a tensor
            self.made |= memories(args)
        given = self.addresses((args, kwargs))
        result = function(*args, **kwargs)
        made = memories(result) - memories((args, kwargs))
        self.made |= made - self.before.keys()
        new = [x if is_tensor(x) and memories(x) <= made else None for x in pytree.tree_leaves(result)]
        self.calls.append((function, given, self.addresses(new)))
        return result

    def addresses(self, values: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda x: Address(x, memories(x) <= self.made), values)


class FakeGraph:
    """A CUDA graph as far as its numbers go: memory is where it was at the capture, and so are Python's numbers."""

    capturing = False
    made: list[FakeGraph]

    def __init__(self) -> None:
        FakeGraph.made.append(self)
        self.recorder = Recorder()
        self.replays = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        FakeGraph.capturing, random = True, torch.get_rng_state()
        try:
            with self.recorder:
                yield
        finally:
            FakeGraph.capturing = False
            torch.set_rng_state(random)
            for memory, value in self.recorder.before.values():  # nothing has run
                memory.copy_(value)
            self.recorder.before.clear()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, given, results in self.recorder.calls:
                args, kwargs = pytree.tree_map_only(Address, Address.tensor, given)
                for old, new in zip(results, pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                    if old is not None:
                        old.tensor().copy_(new)


def memories(values: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in pytree.tree_leaves(values) if is_tensor(x)}


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch) -> None:
    def random_state() -> list[Tensor]:
        assert not FakeGraph.capturing, "the random state of a GPU is read during a capture"
        return []

    FakeGraph.made, FakeGraph.capturing = [], False
    caller = FakeStream()
    monkeypatch.setattr(sys.modules[CapturedStep.__module__], "_require_cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture())
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: FakeGraph.capturing)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", random_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: None)
