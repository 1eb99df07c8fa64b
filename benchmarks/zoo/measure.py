"""What is measured of one model. `python -m benchmarks.zoo.measure ID FILE` writes it to FILE as JSON."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import training  # the comparison that the tests make

import graphlocal
from benchmarks import report
from benchmarks.zoo.case import Case
from benchmarks.zoo.catalogue import find
from graphlocal import trace

SEED = 0


@dataclass
class Record:
    """What was seen. status: `passed`, `refused` (as the case expects) or `failed`, with the `stage` and `error`.

    rung: how it was traced. seconds_*: of `torch.export.export` alone, of the compilation, of the self-check in it
    (real steps of the model), and of a second compilation of the same structure. peak_mb: how much the process grew
    over the first.
    untouched: trainable parameters with a gradient that one rec-LRA step gives no finite nonzero update.
    second_batch: whether another batch size gave the eager model's outputs; None if the eager model takes none.
    """

    id: str
    status: str = "failed"
    stage: str = "build"
    error: str = ""
    parameters: int = 0
    dtype: str = ""
    rung: str = ""
    opaque: list[str] = field(default_factory=list)
    operations: int = 0
    subgraphs: list[str] = field(default_factory=list)
    second_batch: bool | None = None
    untouched: list[str] = field(default_factory=list)
    seconds_export: float | None = None
    seconds_compile: float | None = None
    seconds_check: float | None = None
    seconds_again: float | None = None
    peak_mb: float | None = None


def measure(case: Case) -> Record:
    """Run all stages; the first error ends them."""
    record = Record(case.id)
    try:
        _run_stages(case, record)
    except graphlocal.GraphLocalError as error:
        record.error = str(error)
        if case.expect in ("refused", "either") and record.stage == "compile":
            record.status = "refused"
    except Exception:
        record.error = _without_folders(traceback.format_exc())
    else:
        record.status = "passed"
    return record


def _without_folders(text: str) -> str:
    """A traceback with paths as they are below the checkout or the installed packages."""
    return re.sub(r'File "[^"]*?/(site-packages/|lib/python[\d.]+/|(?=(graphlocal|passes|targets|benchmarks|tests)/))',
                  'File "', text)  # fmt: skip


def _run_stages(case: Case, record: Record) -> None:
    model, inputs = _model(case), _inputs(case)
    record.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record.stage = "eager step"
    dtype, true = _eager_step(case, torch.float64)
    record.dtype = str(dtype).removeprefix("torch.")
    model, inputs = model.to(dtype), _cast(inputs, dtype)

    record.stage = "compile"
    record.seconds_export = _seconds_of_export(case, dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _timed(record, "seconds_compile"), report.timed_calls((trace, "self_check")) as seconds:
        local = graphlocal.compile(model, example_inputs=inputs, rule="backprop")
    record.seconds_check = seconds["self_check"]
    record.peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    traced = local.compiled.traced
    record.rung, record.opaque = traced.rung, sorted(set(traced.opaque))
    record.operations, record.subgraphs = len(local.graph.operations), list(local.graph.subgraph)
    if case.expect == "opaque" and not record.opaque:
        raise AssertionError("expected to pass by way of opaque leaves")

    record.stage = "forward"
    found = training.step(local, inputs, case.loss, SEED)
    training.assert_same_forward(found, true)
    record.stage = "oracle"
    _assert_same_gradients(found, true, local)
    record.stage = "second batch size"
    record.second_batch = _second_batch(case, dtype)

    record.stage = "rec-lra"
    model = _model(case).to(dtype)
    with _timed(record, "seconds_again"):
        local = graphlocal.compile(model, example_inputs=inputs, rule="rec-lra")
    found = training.step(local, inputs, case.loss, SEED)
    record.untouched = _untouched(found, true)
    if record.untouched:
        raise AssertionError(f"no finite nonzero update for {', '.join(record.untouched[:5])}")


def _assert_same_gradients(found: training.Step, true: training.Step, local: graphlocal.LocalModule) -> None:
    """As the tests do; a float64 model that computes in float32 inside is compared as float32."""
    types = {op.type.dtype for op in local.graph.operations if op.type is not None}
    single = types & {"float32", "float16", "bfloat16"}
    gradients = [
        {name: g.float() if single and g is not None else g for name, g in step.gradients.items()}
        for step in (found, true)
    ]
    training.assert_same_gradients(*gradients)


def _untouched(found: training.Step, true: training.Step) -> list[str]:
    """Parameters that autograd gives a gradient above rounding, and the local step no finite nonzero update."""
    gradients = {name: g for name, g in true.gradients.items() if g is not None}
    floor = 1e-12 * max(float(g.abs().max()) for g in gradients.values())
    bad = []
    for name, gradient in gradients.items():
        update = found.gradients[name]
        touched = update is not None and bool(update.isfinite().all()) and bool(update.any())
        if not touched and float(gradient.abs().max()) > floor:
            bad.append(name)
    return bad


def _second_batch(case: Case, dtype: torch.dtype) -> bool | None:
    """One more row: None if the eager model does not take it, True if the compiled one gives what the eager one does.

    Raises AssertionError if it does not.
    """
    example = _cast(_inputs(case), dtype)
    batch = next(x.shape[0] for x in pytree.tree_leaves(example) if isinstance(x, Tensor) and x.dim() > 0)

    def longer(value: Any) -> Any:
        alike = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
        if not alike:
            return value
        row = 0.3 * value[:1] + 0.7 * value[1:2] if value.is_floating_point() else value[:1]
        return torch.cat([value, row])

    inputs = pytree.tree_map(longer, example)
    try:
        true = training.step(_model(case).to(dtype), inputs, case.loss, SEED)
    except Exception:
        return None
    local = graphlocal.compile(_model(case).to(dtype), example_inputs=example, rule="backprop")
    found = training.step(local, inputs, case.loss, SEED)
    training.assert_same_forward(found, true)
    _assert_same_gradients(found, true, local)
    return True


def _eager_step(case: Case, dtype: torch.dtype) -> tuple[torch.dtype, training.Step]:
    """One step of the eager model, in float64 if it takes that and stays finite."""
    try:
        step = training.step(_model(case).to(dtype), _cast(_inputs(case), dtype), case.loss, SEED)
        if not all(g.isfinite().all() for g in step.gradients.values() if g is not None):
            raise ArithmeticError("the eager model's gradients are not finite")
    except Exception:
        if dtype == torch.float32:
            raise
        return _eager_step(case, torch.float32)
    return dtype, step


def _seconds_of_export(case: Case, dtype: torch.dtype) -> float | None:
    """Time of `torch.export.export` alone, non-strict and with an open batch; None if it refuses the model."""
    model, inputs = _model(case).to(dtype), _cast(_inputs(case), dtype)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    dims = pytree.tree_map(lambda x: {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None, inputs)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=dims)
    except Exception:
        return None
    return time.perf_counter() - start


@contextmanager
def _timed(record: Record, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    setattr(record, name, time.perf_counter() - start)


def _model(case: Case) -> nn.Module:
    """The model with parameters that start at zero, such as a zero head, moved: else most gradients are zero."""
    torch.manual_seed(SEED)
    model = case.make().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def _inputs(case: Case) -> Any:
    torch.manual_seed(SEED + 1)
    return case.inputs()


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    floating = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
    return pytree.tree_map(lambda x: x.to(dtype) if floating(x) else x, inputs)


def main() -> None:
    name, file = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),), strict=False)  # its first call imports much
    record = measure(find(name))
    Path(file).write_text(json.dumps(asdict(record)))


if __name__ == "__main__":
    main()
