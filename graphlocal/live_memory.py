"""How many bytes of tensors live at one time, counted on any device.

`LiveMemory` sees only what operators return: workspaces inside of a kernel, and memory that an allocator keeps in
reserve, are not counted. `allocated_bytes` asks the allocators, which know of the former too, and of compiled code,
which doesn't run under a dispatch mode. `tensor_bytes` and `stored_bytes` tell what tensors at hand take.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """While open, counts the bytes of all storages that operators of this thread make.

    now, peak: bytes, over what lived before; a tensor that was there and is freed meanwhile does not count.
    history: `now` after each operator that made or freed something, if `keep` is set.
    """

    def __init__(self, keep: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self.history: list[int] | None = [] if keep else None
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value, new=False)
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value, new=True)
        return result

    def _see(self, tensor: Tensor, new: bool) -> None:
        if tensor.layout is not torch.strided:
            for part in _parts(tensor):
                self._see(part, new)
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self._known[key] = weakref.ref(storage, self._forget(key, size))
        if size:
            self._count(size)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            if self._known.pop(key, None) is not None and size:
                self._count(-size)

        return forget

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        if self.history is not None:
            self.history.append(self.now)


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one consists of."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return ()


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor's elements, of all that an expanded one shows; of a list of tensors, the sum; 0 for others."""
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    return prod(value.shape) * value.element_size() if isinstance(value, Tensor) else 0


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors lie in, shared memory counted once."""
    strided = [part for t in tensors for part in ((t,) if t.layout is torch.strided else _parts(t))]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in strided}.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that live at one time while `function` runs, over what lived before.

    On a CUDA device by its allocator, elsewhere by `LiveMemory`.
    """
    if device.type != "cuda":
        with LiveMemory() as memory:
            function()
        peak: int = memory.peak
        return peak
    return allocated_bytes(function, device)


def allocated_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocator hands out at one time while `function` runs, over what lived before.

    On a CPU by what torch.profiler records of this thread: what `function` frees and did not make doesn't count, as in
    `LiveMemory`, and neither does what libraries and generated code get from the system by themselves.
    """
    if device.type == "cuda":
        return _allocated_on_gpu(function, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return _peak(event for event in events if event.get("name") == "[memory]")


def _peak(events: Iterable[dict[str, Any]]) -> int:
    """The peak by the profiler's events of allocations, and of deallocations with a negative size."""
    sizes: dict[int, int] = {}
    now = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size >= 0:
            sizes[address] = size
            now += size
            peak = max(peak, now)
        else:
            now -= sizes.pop(address, 0)  # 0: an earlier profile has seen it made
    return peak


def _allocated_on_gpu(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
