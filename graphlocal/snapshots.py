"""A small sample of what the subgraphs make of test samples, kept in a run for pictures of it.

    run/representations/labels.json     the samples' classes and the names of these
    run/representations/0003.safetensors    after epoch 3 (0: before training): one tensor a subgraph, float16

A representation with more than `COMPONENTS` features is kept as its first principal components over the sample,
which is all that t-SNE is given in any case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from graphlocal.arguments import call_of
from graphlocal.compiler import Compiled
from graphlocal.errors import GuardFailure, InputError, LocalTrainingError
from graphlocal.files import write
from graphlocal.ir import LocalGraph
from graphlocal.observation import same_order
from graphlocal.preserve import preserved, training_mode
from graphlocal.runtime import LocalModule

FOLDER = "representations"
COMPONENTS = 50
SAMPLES = 500
SUBGRAPHS = 4


def shown_subgraphs(graph: LocalGraph, most: int = SUBGRAPHS) -> list[str]:
    """The subgraphs with a float representation: the first, the last, and others evenly between them."""
    fit = [
        s.name for s in graph.subgraphs if any(graph.is_float(z.value) for z in s.outputs) and s.name in graph.neuron
    ]
    if len(fit) <= most:
        return fit
    return [fit[round(i * (len(fit) - 1) / (most - 1))] for i in range(most)]


def representations(local: LocalModule, x: Tensor, names: list[str], size: int) -> dict[str, Tensor]:
    """What the subgraphs `names` make of the samples x, each samples x features; the first representation of each.

    The forward pass is that of training, in batches of `size` (a rest is left out): BatchNorm normalizes by the
    batch, dropout drops. Nothing is left changed.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    mode = local.training
    try:
        with training_mode(local.original), same_order(local):
            local.training = True
            for batch in x[: len(x) // size * size].split(size):
                for name, value in _of_batch(local, batch, names).items():
                    found[name].append(value.detach().reshape(len(batch), -1).float().cpu())
    finally:
        local.training = mode
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _of_batch(local: LocalModule, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    leaves, spec = local._binder.flatten(*call_of(x, "x"))
    for compiled in local._fitting(leaves, spec):
        with suppress(GuardFailure), preserved(local), torch.no_grad():
            found = _forward(compiled, leaves, names)
            return {name: z for name, z in found.items() if z.dim() and len(z) == len(x)}
    raise LocalTrainingError("no compilation of the model takes the path of this batch")


def _forward(compiled: Compiled, leaves: list[Any], names: list[str]) -> dict[str, Tensor]:
    """The first float representation of each of these subgraphs, in the forward pass of a training step."""
    graph, forward = compiled.graph, compiled.passes[0]
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        place = next(i for i, z in enumerate(graph.subgraph[name].outputs) if graph.is_float(z.value))
        return lambda module, given, results: found.update({name: results[place]})

    modules = {name: forward.get_submodule(f"F{graph.number[name]}") for name in names}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        forward(*leaves)
    finally:
        for handle in handles:
            handle.remove()
    return found


def principal_components(values: Tensor, most: int = COMPONENTS) -> Tensor:
    """Samples x features to samples x at most `most`: coordinates along the directions of largest variance.

    Their mean is 0, so that half precision is enough where samples differ little.
    """
    values = torch.nan_to_num(values.double())
    centred = values - values.mean(0)
    if values.shape[1] <= most:
        return centred
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates: Tensor = left[:, :most] * sizes[:most]
    return coordinates


class Keeper:
    """Keeps representations of the same samples after each epoch, in a run's folder.

    x, y: test samples and classes (at most `SAMPLES` are taken). classes: their names. size: of a batch.
    """

    def __init__(self, folder: Path, local: LocalModule, x: Tensor, y: Tensor, classes: tuple[str, ...], size: int
                 ) -> None:  # fmt: skip
        size = min(size, len(x), SAMPLES)
        self.folder, self.local, self.size = folder / FOLDER, local, size
        count = min(SAMPLES, len(x)) // size * size
        self.x, self.names = x[:count], shown_subgraphs(local.graph)
        about = {"labels": y[:count].tolist(), "classes": list(classes), "subgraphs": self.names}
        write(self.folder / "labels.json", json.dumps(about).encode())

    def keep(self, epoch: int) -> None:
        """Write the file of an epoch. Scaled to be at most 1, since float16 ends at 65504."""
        found = representations(self.local, self.x, self.names, self.size)
        tensors = {}
        for name, value in found.items():
            components = principal_components(value)
            largest = float(components.abs().max())
            scale = largest if largest and math.isfinite(largest) else 1.0
            tensors[name] = (components / scale).half().contiguous()
        write(self.folder / f"{epoch:04}.safetensors", save(tensors))


def kept(folder: Path) -> tuple[dict[str, Any], dict[int, Path]] | None:
    """What a run kept: labels, classes and subgraphs, and the file of each epoch. None if it kept nothing."""
    about = folder / FOLDER / "labels.json"
    if not about.is_file():
        return None
    try:
        known = json.loads(about.read_bytes())
    except ValueError as error:
        raise InputError(f"{about} is not JSON", why=str(error)) from error
    files = sorted((folder / FOLDER).glob("[0-9]*.safetensors"))
    return known, {int(path.stem): path for path in files}


def read(path: Path) -> dict[str, Tensor]:
    """One epoch's representations, by subgraph. Raises InputError for a damaged file."""
    try:
        return {name: value.double() for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read", why=str(error), remedy="remove that file") from error
