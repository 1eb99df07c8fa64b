"""`captured_step`: a training step captured in one CUDA graph. Written without a GPU at hand: **not yet run on one**.

The whole step of `train_step` is recorded: forward pass, loss, error pass on all its streams, optimizer. A replay
issues every kernel at once, so that the host's time per piece no longer counts. A capture runs nothing, and a replay
runs no Python: what is no tensor on the GPU keeps the value that it had at the capture, and tensors are read and
written where they lay then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils import _pytree as pytree

from graphlocal.addresses import Addresses
from graphlocal.autocast import autocast_now
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.partial_optimizer import hooked
from graphlocal.step import TrainStep

WARM_UP = 3
"""Ordinary steps before the capture: they make the optimizer's state, and let libraries choose their kernels."""


def captured_step(step: TrainStep) -> CapturedStep:
    """The step of `train_step` as a CUDA graph: `step(x, y) -> loss` for batches of one shape.

    The first `WARM_UP` calls run the step as it is, the next one captures it, and from then on it is replayed.
    A learning rate that is to change later must be a tensor on the GPU, which schedulers write into:
    `Adam(parameters, lr=torch.tensor(1e-3, device="cuda"), capturable=True)`. Afterwards weights, buffers and states
    may change in place, as by `local.load_state_dict(...)`; one that was moved or replaced is found and refused. What
    the loss function reads besides its arguments is not looked at.

    Raises InputError without a GPU, for a model that checks its updates (`local.check_finite`, which waits for the
    device), for a rule whose steps differ from each other, and for an optimizer that can't be captured: it must be SGD,
    or have an option `capturable`, and no hooks.
    """
    return CapturedStep(step)


class CapturedStep:
    """Made by `captured_step`; call it once a batch."""

    def __init__(self, step: TrainStep) -> None:
        if not isinstance(step, TrainStep):
            raise InputError(
                f"captured_step needs a training step, and got a {type(step).__name__}",
                remedy="pass graphlocal.train_step(local, loss_fn, optimizer)",
            )
        self.step, self.device = step, next(step.local.parameters()).device
        _require_cuda(self.device)
        _require_equal_steps(step)
        _capturable(step.optimizer, self.device)
        self.side = torch.cuda.Stream(self.device)
        self.calls = 0
        self.inputs: _Inputs | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Any, y: Any) -> Tensor:
        """Train on one batch; x and y: tensors, or tuples, lists or dicts of them, as the first call's were.

        Returns the loss (detached). Raises InputError for a batch of another shape, dtype, device or structure than the
        first one, and where something that a replay does not look at has changed since the capture; LocalTrainingError
        if the step can't be captured; and in the first calls what `step(x, y)` raises.
        """
        if not self.step.local.training:
            raise InputError("the model is in evaluation mode", remedy="call local.train() before training")
        if self.inputs is None:
            self.inputs = _Inputs(x, y, self.device)
        self.inputs.take(x, y)
        if self.calls < WARM_UP:
            loss = self._warm_up(*self.inputs.static)
            self.calls += 1
            return loss
        if self.graph is None:
            self._capture(*self.inputs.static)
        self._require_unchanged()
        assert self.graph is not None
        self.graph.replay()
        return self.loss.clone()

    def _warm_up(self, x: Any, y: Any) -> Tensor:
        """A step on a stream of its own, as captures demand of what comes before them."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            loss = self.step(x, y)
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        return loss

    def _capture(self, x: Any, y: Any) -> None:
        """Record one step; nothing runs, so that the model stays as it is."""
        _require_equal_steps(self.step)
        self.optimizer = _capturable(self.step.optimizer, self.device)
        graph, baked = torch.cuda.CUDAGraph(), dict(self._baked())
        memory = Addresses(self.step.local, self.optimizer)
        failure: RuntimeError | None = None
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self.side):
                try:
                    self.loss = self.step(x, y)
                except RuntimeError as error:
                    failure = error  # the end of a capture that failed raises another one
                    raise
        except RuntimeError as error:
            cause = failure or error
            raise LocalTrainingError(
                "the step can't be captured in a CUDA graph",
                why=(str(cause).splitlines() or [type(cause).__name__])[0],
                remedy="call the step itself, or take out what waits for the device, such as .item() in the loss",
            ) from error
        if moved := memory.moved():
            raise LocalTrainingError(
                "the step can't be captured in a CUDA graph",
                why=f"it puts {moved} into other memory, and each replay would start from what lay there before",
                remedy="call the step itself, or write in place, such as buffer.copy_(...)",
            )
        self.graph, self.baked, self.memory = graph, baked, memory
        self.compiled = self.step.local.compiled  # its tables and stacks, which the graph has the addresses of

    def _baked(self) -> Iterator[tuple[str, Any]]:
        """What the graph has written into it, or doesn't look at, by a name for messages."""
        yield "the step's optimizer", _Itself(self.step.optimizer)
        yield "the step's loss function", _Itself(self.step.loss_fn)
        for i, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                told = tuple(map(id, value)) if key == "params" else _told(value, self.device)
                yield f"{key!r} of the optimizer's parameter group {i}", told
        yield "the optimizer's table of states", id(self.optimizer.state)
        yield "the state of autocast", autocast_now()
        yield "which of the model's layers there are, train and are frozen", self.step.local._watch.looks()
        yield "the module of the error weights", _Itself(self.step.local.error_weights)

    def _require_unchanged(self) -> None:
        _require_equal_steps(self.step)
        now = dict(self._baked())
        for name, then in self.baked.items():
            if name not in now or not _same(then, now[name]):
                short = isinstance(then, (bool, int, float)) and name in now and not name.startswith("the ")
                raise _changed(name, f": {then} to {now[name]}" if short else "")
        if moved := self.memory.moved():
            raise _changed(f"the memory of {moved}")
        if hooked(self.optimizer):
            raise _hooked_error()


class _Itself:
    """An object, equal to no other one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value


class _Inputs:
    """The memory that a captured step reads its batch from. static: x and y, with tensors of its own."""

    def __init__(self, x: Any, y: Any, device: torch.device) -> None:
        given, self.spec = pytree.tree_flatten((x, y))
        for leaf in given:
            if isinstance(leaf, Tensor) and leaf.device != device:
                raise InputError(
                    f"a tensor of the batch is on {leaf.device}, and the model on {device}",
                    remedy="move the batch to the model's device first",
                )
            if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
                raise InputError(
                    f"the batch holds a {type(leaf).__name__}",
                    why="a captured step takes tensors, and constants that are always the same",
                    remedy="pass x and y as tensors, or tuples, lists or dicts of tensors",
                )
        self.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in given]
        self.static: tuple[Any, Any] = pytree.tree_unflatten(self.leaves, self.spec)

    def take(self, x: Any, y: Any) -> None:
        """Copy a batch in. Raises InputError, before anything is copied, unless it is like the first one."""
        given, spec = pytree.tree_flatten((x, y))
        if spec != self.spec:
            raise InputError(
                "the batch is not built like the first one that the captured step was given",
                remedy="pass the same kinds of x and y, with the same keys, in every call",
            )
        pairs = list(zip(given, self.leaves, strict=True))
        for leaf, static in pairs:
            if _kind(leaf) != _kind(static):
                raise InputError(
                    f"the step was captured for {_kind(static)}",
                    why=f"this call has {_kind(leaf)}",
                    remedy="drop the last, smaller batch, or call the step itself on it",
                )
        for leaf, static in pairs:
            if isinstance(static, Tensor):
                static.copy_(leaf.detach())


def _kind(leaf: Any) -> str:
    """What must be the same in all calls."""
    if not isinstance(leaf, Tensor):
        return f"the constant {leaf!r}"
    return f"{leaf.dtype} of shape {list(leaf.shape)} on {leaf.device}"


def _told(value: Any, device: torch.device) -> Any:
    """A setting as the host knows it: tensors on the model's device as themselves, which a replay reads anew."""
    if isinstance(value, (tuple, list)):
        return tuple(_told(x, device) for x in value)
    return value.tolist() if isinstance(value, Tensor) and value.device.type != device.type else value


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, Tensor) or isinstance(now, Tensor):
        return then is now
    if isinstance(then, tuple) and isinstance(now, tuple):
        return len(then) == len(now) and all(map(_same, then, now))
    return bool(then == now)


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise InputError(f"the model is on {device}, and only CUDA can capture a step", remedy="call step(x, y)")


def _require_equal_steps(step: TrainStep) -> None:
    """Raise InputError for steps that look at their numbers, or that do other things from one to the next."""
    rule = step.local.options.rule
    if step.local.check_finite:
        raise InputError(
            "the step waits for the device to see whether an update is a number",
            remedy="set local.check_finite = False",
        )
    if rule.engine != "schedule" or rule.calibration is not None or rule.relaxes:
        raise InputError(
            f"steps of the rule {rule.name!r} can't be captured",
            why="what they do differs from step to step, and a replay always does the same",
            remedy="call step(x, y), or take a rule without calibration steps and relaxations, such as 'rec-lra'",
        )


def _capturable(optimizer: Optimizer | None, device: torch.device) -> Optimizer:
    """The optimizer. Raises InputError unless it is known that all of its step is on the GPU."""
    name = type(optimizer).__name__
    if optimizer is None:
        raise InputError("the step has no optimizer to capture", remedy="pass one to graphlocal.train_step")
    groups = optimizer.param_groups
    if type(optimizer) is SGD:
        on_device = any(isinstance(g["lr"], Tensor) and g["lr"].device.type == device.type for g in groups)
        if on_device and not all(g["fused"] for g in groups):
            raise InputError("this SGD reads its learning rate from the device", remedy="make it with fused=True")
    elif not all("capturable" in group for group in groups):
        raise InputError(
            f"{name} is not known to be capturable",
            why="it has no such option, and may keep its step count on the host, where a replay would not count on",
            remedy="use SGD, or an optimizer with capturable=True, such as Adam or AdamW",
        )
    elif not all(group["capturable"] for group in groups):
        raise InputError(f"this {name} keeps its step count on the host", remedy="make it with capturable=True")
    if hooked(optimizer):
        raise _hooked_error()
    return optimizer


def _changed(name: str, how: str = "") -> InputError:
    return InputError(
        f"{name} has changed since the step was captured{how}",
        why="a replay runs what was captured, with the numbers and on the memory of then",
        remedy="call graphlocal.captured_step(step) once more; for schedulers, make the optimizer with "
        "lr=torch.tensor(1e-3, device='cuda')",
    )


def _hooked_error() -> InputError:
    return InputError(
        "the optimizer has step hooks", why="a replay runs no Python, and so no hooks", remedy="remove them"
    )
