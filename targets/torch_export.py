"""A compiled model as a program of `torch.export`, in a .pt2 file without pickle.

    local.export("model.pt2")                                                            # as it evaluates
    local.export("step.pt2", kind="training-step", loss_fn=..., optimizer=..., y=...)    # trains itself

    model = torch.export.load("model.pt2").module()     # model(x)
    step = torch.export.load("step.pt2").module()       # loss = step(x, y, lr); its buffers are all that it changes

Neither needs graphlocal. The state dict of the model is that of the user's own; the step's buffers have the names of
`local.state_dict()`, and `optimizer.exp_avg.fc.weight`. Each operator of the model, but for those on sizes, names its
subgraph and its operation in `meta["custom"]`, and the extra file `graphlocal.json` holds the partition and the error
graph.

In the archive the graph is JSON and a tensor raw bytes. torch pickles sample inputs, tensors of subclasses, and custom
objects: the first are left out, the others refused, and what was written is looked through. `torch.export.load` does
unpickle what it finds in a file from elsewhere: load only what you, or someone you trust, wrote.
"""

from __future__ import annotations

import inspect
import io
import json
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from graphlocal.arguments import Arguments, Binder
from graphlocal.errors import InputError
from graphlocal.files import write
from graphlocal.ir import LocalGraph
from graphlocal.targets.evaluation import OWNER, TOLERANCE, Evaluation, difference, evaluation
from graphlocal.targets.lowered import attribute
from graphlocal.targets.quiet import quiet
from graphlocal.targets.whole_step import LossFunction, WholeStep, unfused, whole_step
from graphlocal.text import to_document
from graphlocal.trace import TracedModel
from graphlocal.version import __version__

SUFFIX = ".pt2"
DOCUMENT = "graphlocal.json"
"""The extra file with the graph."""


@dataclass(frozen=True)
class ExportedProgram:
    """What was written. operators: how many. difference: of the largest output from the model's, None unchecked."""

    path: Path
    kind: str
    operators: int
    difference: float | None

    def __str__(self) -> str:
        checked = "not checked" if self.difference is None else f"difference from the model {self.difference:.1e}"
        return f"{self.path}: a {self.kind} of {self.operators} operators for torch.export.load, {checked}"


def export_model(
    graph: LocalGraph, traced: TracedModel, model: nn.Module, path: Path, *, check: bool = True
) -> ExportedProgram:
    """Write the model as it evaluates; inputs are given by position, those that have none by name.

    check: load the file, and compare it with the model. Raises InputError if the model holds what only Python can
    run, evaluates in another way than it trains, or holds what torch can't write without pickle.
    """
    found = evaluation(traced, graph, model)
    for node in found.module.graph.nodes:
        operation = node.meta.get(OWNER, node.name)
        node.meta["custom"] = {"subgraph": graph.owner.get(operation, ""), "operation": operation}
    arguments = traced.arguments
    open_ = [_open_axes(item.type.shape) if item.type else None for item in graph.inputs]
    args, kwargs = pytree.tree_unflatten(open_, arguments.spec)
    signature = Binder(model).signature
    dynamic = dict(signature.bind(*args, **kwargs).arguments) if any(open_) else None
    program = _exported(_Evaluating(found, signature, model.state_dict()), arguments.args, arguments.kwargs, dynamic)
    content = archive(program, {"kind": "model", "graph": to_document(graph)})
    distance = _distance(content, found, arguments) if check else None
    write(path, content)
    return ExportedProgram(path, "model", _operators(program), distance)


def export_step(
    compiled: Any, unflatten: Callable[[list[Any]], Any], path: Path, *, loss_fn: LossFunction,
    optimizer: Optimizer, y: Any, check: bool = True,
) -> ExportedProgram:  # fmt: skip
    """Write the training step for batches of every size: `step(*inputs, *labels, lr) -> loss`, lr a scalar tensor.

    loss_fn, optimizer: as for `graphlocal.train_step`; SGD, Adam or AdamW. y: example labels, as many as the example
    inputs. unflatten: from the model's flat outputs to its own. check: load the file, and compare one step.

    Raises InputError for another optimizer, and NotLowered for a step with Python code in it.
    """
    leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in compiled.traced.arguments.leaves]
    with unfused():  # so that it runs on every device
        step = whole_step(compiled, leaves, unflatten, loss_fn, optimizer, y, any_batch=True)
    rate = float(optimizer.param_groups[0]["lr"])
    batch = [x.detach().clone() for x in (*leaves, *pytree.tree_leaves(y)) if isinstance(x, Tensor)]
    given = (*batch, torch.tensor(rate))
    axes = tuple({0: torch.export.Dim.AUTO} if x.dim() else None for x in given)
    program = _exported(_Training(step), given, {}, {"given": axes})
    about = {"kind": "training-step", "inputs": step.inputs, "labels": step.labels, "lr": rate,
             "optimizer": type(optimizer).__name__, "graph": to_document(compiled.graph)}  # fmt: skip
    content = archive(program, about)
    distance = _distance_of_step(content, step, given) if check else None
    write(path, content)
    return ExportedProgram(path, "training step", _operators(program), distance)


# The modules that are exported.


class _Evaluating(nn.Module):
    """The graph of a model, called as the model is, with its tensors under the model's names."""

    def __init__(self, found: Evaluation, signature: inspect.Signature, saved: Collection[str]) -> None:
        super().__init__()
        self._parameters.update(found.module._parameters)
        self._buffers.update(found.module._buffers)
        self._modules.update(found.module._modules)
        for path, module in self.named_modules():
            for name in module._buffers:  # constants of the forward, and what the model does not save either
                if f"{path}.{name}".removeprefix(".") not in saved:
                    module._non_persistent_buffers_set.add(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            with preserve_node_meta():
                outputs = fx.Interpreter(self, graph=found.module.graph).run(*tensors)
            return found.calls[0].unflatten(outputs)

        forward.__signature__ = signature  # type: ignore[attr-defined]  # inspect looks for it
        self.forward = forward


class _Training(nn.Module):
    """A training step with its states as buffers."""

    def __init__(self, step: WholeStep) -> None:
        super().__init__()
        self.step = (step.module,)
        self.names, self.changed = tuple(step.states), step.changed
        for name, value in step.states.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(last, value.detach().clone())

    def forward(self, *given: Tensor) -> Tensor:
        states = [attribute(self, name) for name in self.names]
        loss, *new = self.step[0](*states, *given)
        for name, value in zip(self.changed, new, strict=True):
            attribute(self, name).copy_(value)
        result: Tensor = loss
        return result


def _exported(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], dynamic: Any) -> Any:
    inputs = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (tuple(args), kwargs))
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, *inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # whatever the exporter and its checks raise
        raise _refusal(error) from error


def _refusal(error: Exception) -> InputError:
    text = str(error).strip().splitlines()
    return InputError(
        "torch.export can't write the model", why=f"{type(error).__name__}: {text[0] if text else ''}",
        remedy="local.save(path) holds all that graphlocal can compile",
    )  # fmt: skip


def _open_axes(shape: Sequence[int | str]) -> dict[int, Any] | None:
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(shape) if isinstance(size, str)} or None


def _operators(program: Any) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


# The archive.


def archive(program: Any, about: dict[str, Any]) -> bytes:
    """The bytes of a .pt2 file, without example inputs and without the paths of source files.

    Raises InputError for what torch would pickle.
    """
    program._example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("from_node", None)
    document = json.dumps({"graphlocal": __version__, **about})
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.export.save(program, buffer, extra_files={DOCUMENT: document})
    except Exception as error:  # an output or an argument that has no form in JSON
        raise _refusal(error) from error
    pickled = pickled_members(buffer.getvalue())
    if pickled:
        raise InputError(
            f"torch would pickle {', '.join(pickled)}", why="a file of graphlocal holds no pickle",
            remedy="keep random generators out of the loss, and tensors of subclasses out of the model",
        )  # fmt: skip
    return buffer.getvalue()


def pickled_members(content: bytes) -> list[str]:
    """What a .pt2 file holds as pickle: names of tensors and of members, by what the archive says of itself."""
    found = []
    with zipfile.ZipFile(io.BytesIO(content)) as members:
        for member in members.infolist():
            _, _, name = member.filename.partition("/")
            if name.endswith("_config.json"):
                config = json.loads(members.read(member))["config"]
                found += [tensor for tensor, entry in config.items() if entry["use_pickle"]]
            elif name.startswith("data/sample_inputs/") and member.file_size:
                found.append("the example inputs")
            elif name.startswith("data/constants/") and not name.startswith("data/constants/tensor_"):
                found.append(name)
    return found


# What was written, against the model.


def _loaded(content: bytes) -> nn.Module:
    with quiet():
        module: nn.Module = torch.export.load(io.BytesIO(content)).module()
    return module


def _distance(content: bytes, found: Evaluation, arguments: Arguments) -> float:
    """The largest difference of an output. Raises InputError if it is large."""
    largest = 0.0
    for call in found.calls:
        module = _loaded(content)  # anew: a call may change buffers
        tensors = iter(call.inputs)
        given = arguments.with_leaves([next(tensors) if isinstance(x, Tensor) else x for x in arguments.leaves])
        with torch.no_grad():
            returned = pytree.tree_leaves(module(*given.map(torch.clone).args, **given.map(torch.clone).kwargs))
        outputs = [x for x in returned if isinstance(x, Tensor)]
        largest = max([largest, *(difference(a, b) for a, b in zip(outputs, call.outputs, strict=True))])
    return _small(largest)


def _distance_of_step(content: bytes, step: WholeStep, given: Sequence[Tensor]) -> float:
    """The largest difference of the loss or a state after one step. Raises InputError if it is large."""
    module = _loaded(content)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
        torch.manual_seed(0)
        loss = module(*(x.clone() for x in given))
        torch.manual_seed(0)
        expected = step.module(*(x.clone() for x in (*step.states.values(), *given)))
    outputs = [loss, *(attribute(module, name) for name in step.changed)]
    return _small(max(difference(a, b) for a, b in zip(outputs, expected, strict=True)))


def _small(distance: float) -> float:
    if distance > TOLERANCE:
        raise InputError(
            f"the exported program computes something else than the model: the difference is {distance:.1e} of the "
            "largest entry",
            why="torch.export translated an operator to one that computes something else",
            remedy="export with check=False to look at the file",
        )
    return distance
