"""The whole training step as one ONNX model: forward, error neurons, targets, local updates and the optimizer.

    (*states, x, y, lr) -> (loss, *new states)

Only plain ONNX operators: an ordinary inference session trains with it, no autograd and no training build. A state is
named as in `local.state_dict()` (`original.fc.weight`, `error_weights.fc`, and `optimizer.exp_avg.fc.weight`); its new
value is the output of that name with `.next` behind. The values to start from lie in a safetensors file beside the
model. `trainer.OnnxTrainer` runs it.

Of a float16 model, parameters and activations are float16; the optimizer computes and remembers in float32
(`optimizer_math` says why), and so do normalizations and sums over places.

The way there: `whole_step` (one pure graph of ATen operators, fused attention and fused recurrent cells written out,
the rest of what ONNX lacks by `decompositions`) -> torch's exporter -> names, metadata, ONNX's checker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from safetensors.torch import save_file
from torch import Tensor, fx
from torch.optim import Optimizer

from graphlocal.errors import InputError
from graphlocal.targets.lowered import NotLowered, lower
from graphlocal.targets.onnx.comparison import check as check_file
from graphlocal.targets.onnx.decompositions import decompositions
from graphlocal.targets.onnx.files import put_files, workplace
from graphlocal.targets.onnx.optimize import optimize
from graphlocal.targets.quiet import quiet
from graphlocal.targets.whole_step import LossFunction, WholeStep, unfused, whole_step
from graphlocal.version import __version__

aten = torch.ops.aten

NEXT = ".next"
"""Behind a state's name: the output with its new value."""

BATCH = "B"
"""The name of an open batch size."""


@dataclass(frozen=True)
class ExportedStep:
    """What was written. files: their names. nodes: number of ONNX operators.

    any_batch: whether the model takes batches of every size; else only those of the example's.
    """

    path: Path
    files: tuple[str, ...]
    nodes: int
    states: int
    any_batch: bool

    def __str__(self) -> str:
        size = "any batch size" if self.any_batch else "the example's batch size only"
        return f"{self.path}: a training step of {self.nodes} operators and {self.states} states, {size}"


def export_training_step(
    compiled: Any, unflatten: Callable[[list[Any]], Any], path: Path, *, loss_fn: LossFunction,
    optimizer: Optimizer, y: Any, opset: int | None = None, check: bool = True,
) -> ExportedStep:  # fmt: skip
    """Write the training step for inputs like the compilation's examples, and `path` with .safetensors beside it.

    loss_fn, optimizer: as for `graphlocal.train_step`; SGD, Adam or AdamW. y: example labels, as many as the example
    inputs. unflatten: from the model's flat outputs to its own. opset: version of ONNX's operators, default torch's
    choice. check: check the file by ONNX's checker.

    Raises InputError for another optimizer and where a file can't be written, and NotLowered for a step with Python
    code in it or with operators that ONNX lacks (all of them are named).
    """
    if path.is_dir() or path.suffix == ".safetensors":
        raise InputError(f"{path} is no place for a model", remedy="give the export a file name, such as step.onnx")
    leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in compiled.traced.arguments.leaves]
    step = recorded(compiled, leaves, unflatten, loss_fn, optimizer, y)
    batch = [x.detach().clone() for x in (*leaves, *torch.utils._pytree.tree_leaves(y)) if isinstance(x, Tensor)]
    rate = float(optimizer.param_groups[0]["lr"])
    model = converted(step, batch, rate, opset, lambda: _places(compiled, leaves))
    any_batch = _name(model, step)
    model.metadata_props.update(_metadata(compiled, step, any_batch, rate, optimizer))
    weights = path.with_suffix(".safetensors")
    with workplace(path) as place:
        onnx_ir.save(model, place / path.name)
        save_file({name: value.contiguous() for name, value in _separate(step.states).items()}, place / weights.name)
        if check:
            check_file(place / path.name)
        put_files(place, [path.name, weights.name], path.parent)
    return ExportedStep(path, (path.name, weights.name), len(model.graph), len(step.states), any_batch)


def recorded(
    compiled: Any, leaves: list[Any], unflatten: Callable[[list[Any]], Any], loss_fn: LossFunction,
    optimizer: Optimizer, y: Any,
) -> WholeStep:  # fmt: skip
    """The step as operators that have an ONNX form, as far as they are known."""
    with unfused():
        return whole_step(
            compiled, leaves, unflatten, loss_fn, optimizer, y, any_batch=True, decompositions=decompositions()
        )


def converted(
    step: WholeStep, batch: Sequence[Tensor], lr: float, opset: int | None, places: Callable[[], dict[str, str]]
) -> Any:
    """The step as a model of onnx-ir, with the exporter's names. places: where each kind of operator stands."""
    _promote(step.module)
    states = [value.detach().clone() for value in step.states.values()]
    axes = [{0: torch.export.Dim.AUTO} if x.dim() else None for x in batch]
    dynamic = (*[None] * len(states), *axes, None)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                step.module, (*states, *batch, torch.tensor(lr)), dynamic_shapes=dynamic, strict=False
            )
            found = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, opset_version=opset)
            assert found is not None
            model = found.model
            optimize(model)
    except Exception as error:
        raise _refusal(step, places, error) from error
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()  # stack traces, with the paths of this machine
        for value in node.outputs:
            value.metadata_props.clear()
    return model


_MIXING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.where.self}


def _promote(module: fx.GraphModule) -> None:
    """Cast the arguments of arithmetic to the dtype of its result: ONNX has no promotion of a scalar's float32."""
    for node in list(module.graph.nodes):
        if node.target not in _MIXING or not node.meta["val"].is_floating_point():
            continue
        dtype = node.meta["val"].dtype
        for argument in node.all_input_nodes:
            value = argument.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
                with module.graph.inserting_before(node):
                    cast = module.graph.call_function(aten._to_copy.default, (argument,), {"dtype": dtype})
                node.replace_input_with(argument, cast)
    module.recompile()


# Operators that ONNX lacks.


def _refusal(step: WholeStep, places: Callable[[], dict[str, str]], error: Exception) -> NotLowered:
    """The error that names every operator without an ONNX form."""
    where = places()
    missing = [f"{name}{where.get(name, '')}" for name in _unknown(step)]
    if missing:
        return NotLowered(
            f"the training step has operators without an ONNX form: {', '.join(missing)}",
            why="neither torch's exporter nor graphlocal.targets.onnx.decompositions writes them as ONNX operators",
            remedy="write that part of the model with other operators, or train it in torch",
        )
    text = str(error.__cause__ or error).strip().splitlines()
    return NotLowered(
        "the training step can't be written as ONNX", why=f"{type(error).__name__}: {text[0] if text else ''}"
    )


def _unknown(step: WholeStep) -> list[str]:
    """The operators that torch's exporter neither translates nor writes as others."""
    from torch.onnx._internal.exporter import _decomp, _registration

    registry = _registration.ONNXRegistry.from_torchlib()
    written = set(_decomp.get_onnx_implemented_overloads(registry))
    table = _decomp.create_onnx_friendly_decomposition_table(written)
    targets = dict.fromkeys(node.target for node in step.module.graph.nodes if node.op == "call_function")
    return [
        str(target)
        for target in targets
        if isinstance(target, torch._ops.OpOverload)
        and not (registry.is_registered(target) or target in table or target.name().startswith("aten::sym_"))
    ]


def _places(compiled: Any, leaves: list[Any]) -> dict[str, str]:
    """For each operator of the lowered graph, the subgraphs that it stands in: " (in layer1, layer2)"."""
    with unfused():
        lowered = lower(compiled.training, leaves, compiled.differentiable)
    subgraphs = {str(number): name for name, number in compiled.graph.number.items()}
    found: dict[str, dict[str, None]] = {}
    for node in lowered.module.graph.nodes:
        number = re.sub(r"\D", "", str(node.meta.get("action", "")))
        if node.op == "call_function" and number in subgraphs:
            found.setdefault(str(node.target), {})[subgraphs[number]] = None
    return {operator: f" (in {', '.join(names)})" for operator, names in found.items()}


# Names.


def _name(model: Any, step: WholeStep) -> bool:
    """Give inputs, outputs and the batch size their names; return whether the batch size is open."""
    names = [*step.states, *_numbered("x", step.inputs), *_numbered("y", step.labels), "lr"]
    results = ["loss", *(f"{name}{NEXT}" for name in step.changed)]
    taken = {*names, *results}
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_"
    for value, name in zip((*inputs, *outputs), (*names, *results), strict=True):
        value.name = name
    model.graph.name = "training_step"
    return _name_sizes(model, inputs[len(step.states) : -1])


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}{i}" for i in range(count)]


def _name_sizes(model: Any, batch: list[Any]) -> bool:
    """Call the first open size B, in the types of all values."""
    open_ = [str(size.value) for value in batch for size in value.shape if isinstance(size, onnx_ir.SymbolicDim)]
    if not open_:
        return False
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None:
                value.shape[axis] = onnx_ir.SymbolicDim(re.sub(rf"\b{re.escape(open_[0])}\b", BATCH, str(size.value)))
    return True


def _metadata(compiled: Any, step: WholeStep, any_batch: bool, rate: float, optimizer: Optimizer) -> dict[str, str]:
    return {
        "kind": "training-step",
        "graphlocal": __version__,
        "model": compiled.graph.name,
        "rule": compiled.graph.rule,
        "optimizer": type(optimizer).__name__,
        "lr": repr(rate),
        "states": json.dumps({name: f"{name}{NEXT}" if name in step.changed else None for name in step.states}),
        "inputs": json.dumps(_numbered("x", step.inputs)),
        "labels": json.dumps(_numbered("y", step.labels)),
        "batch_axis": "0" if any_batch else "",
    }


def _separate(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since safetensors refuses tensors that share memory."""
    return {name: value.detach().cpu().clone() for name, value in states.items()}
