"""Runs an exported training step in ONNX Runtime's ordinary inference session."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree

from graphlocal.errors import InputError

Array = np.ndarray[Any, Any]


class OnnxTrainer:
    """A training step of `local.export(path, kind="training-step", ...)`, with its states.

        trainer = OnnxTrainer("step.onnx")
        for x, y in loader:
            loss = trainer.step(x, y)
        model.load_state_dict(trainer.model_state())

    Every state has two buffers; a step reads from one set and writes into the other, and the next step the other way
    round, so nothing is copied between steps. With a CUDA build of ONNX Runtime the states stay on the GPU.

    path: the model; its safetensors file lies beside it unless `states` are given. threads: of ONNX Runtime, default
    its own choice. providers: default CUDA where there is one, then the CPU.

    Raises InputError where ONNX Runtime is not installed, or the files are no training step.
    """

    def __init__(
        self, path: str | Path | bytes, states: Mapping[str, Tensor] | None = None, *, threads: int | None = None,
        providers: list[str] | None = None,
    ) -> None:  # fmt: skip
        self._runtime = _require_runtime()
        self.session = _session(self._runtime, path, threads, providers)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if metadata.get("kind") != "training-step":
            raise InputError(f"{_shown(path)} is no training step", remedy="export it with kind='training-step'")
        self.lr = float(metadata["lr"])
        self._outputs: dict[str, str | None] = json.loads(metadata["states"])
        self._inputs = [*json.loads(metadata["inputs"]), *json.loads(metadata["labels"])]
        self._count = len(json.loads(metadata["inputs"]))
        self._types = {item.name: _NUMPY[item.type] for item in self.session.get_inputs()}
        self.device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"
        if states is None:
            states = _read_states(path)
        missing = self._outputs.keys() - states.keys()
        if missing:
            raise InputError(f"the states of {_shown(path)} lack {', '.join(sorted(missing))}")
        self._bind({name: states[name] for name in self._outputs})

    def _bind(self, states: Mapping[str, Tensor]) -> None:
        """Two sets of buffers, and the two bindings that go from one set to the other."""
        value = self._runtime.OrtValue.ortvalue_from_numpy
        arrays = {name: _array(tensor, self._types[name]).copy() for name, tensor in states.items()}
        self._kept: list[Any] = [arrays]  # the memory of the buffers on the CPU is numpy's
        first = {name: value(array, self.device) for name, array in arrays.items()}
        spare = {name: np.empty_like(arrays[name]) for name, out in self._outputs.items() if out}
        self._kept.append(spare)
        second = {**first, **{name: value(array, self.device) for name, array in spare.items()}}
        loss_type = _NUMPY[next(item.type for item in self.session.get_outputs() if item.name == "loss")]
        self._loss: Array = np.zeros((), loss_type)
        loss = value(self._loss)
        self._sets, self._bindings, self._at = (first, second), [], 0
        for read, write in ((first, second), (second, first)):
            binding = self.session.io_binding()
            for name, output in self._outputs.items():
                binding.bind_ortvalue_input(name, read[name])
                if output:
                    binding.bind_ortvalue_output(output, write[name])
            binding.bind_ortvalue_output("loss", loss)
            self._bindings.append(binding)

    def step(self, x: Any, y: Any, lr: float | None = None) -> float:
        """Train on one batch; x, y: a tensor or array, or a tuple of them. Returns the loss.

        Raises InputError for another number of tensors, or another shape, than the step was exported with.
        """
        inputs, labels = (pytree.tree_leaves(value) for value in (x, y))
        if len(inputs) != self._count or len(inputs) + len(labels) != len(self._inputs):
            raise InputError(
                f"the step takes {self._count} inputs and {len(self._inputs) - self._count} labels, "
                f"not {len(inputs)} and {len(labels)}"
            )
        binding = self._bindings[self._at]
        rate: Array = np.asarray(self.lr if lr is None else lr, self._types["lr"])
        given = [_array(v, self._types[name]) for name, v in zip(self._inputs, (*inputs, *labels), strict=True)]
        for name, array in zip((*self._inputs, "lr"), (*given, rate), strict=True):
            binding.bind_cpu_input(name, array)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            shapes = ", ".join(str(list(array.shape)) for array in given)
            raise InputError(
                f"ONNX Runtime does not run the step on tensors of shape {shapes}", why=str(error)[:500]
            ) from error
        self._at = 1 - self._at
        return float(self._loss)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all states by name."""
        return {name: torch.from_numpy(v.numpy().copy()) for name, v in self._sets[self._at].items()}

    def model_state(self) -> dict[str, Tensor]:
        """The model's own parameters and buffers, by its own names."""
        own = "original."
        return {name.removeprefix(own): v for name, v in self.state_dict().items() if name.startswith(own)}

    def load_state_dict(self, states: Mapping[str, Tensor]) -> None:
        """Go on from other values; those not given stay. Raises InputError for a name or shape that is not known."""
        now = self.state_dict()
        for name, value in states.items():
            if name not in now or now[name].shape != value.shape:
                raise InputError(f"{name} of shape {list(value.shape)} is no state of this step")
        self._bind({**now, **states})


_NUMPY = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8, "tensor(int16)": np.int16,
}  # fmt: skip


def _array(value: Any, dtype: Any) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.ascontiguousarray(value, dtype).reshape(np.shape(value))


def _require_runtime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError(
            "training in ONNX Runtime needs onnxruntime, which is not installed",
            why=str(error),
            remedy="pip install 'graphlocal[onnx]', or 'graphlocal[onnx-gpu]' for CUDA",
        ) from error


def _session(runtime: Any, path: str | Path | bytes, threads: int | None, providers: list[str] | None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    chosen = providers or [name for name in wanted if name in runtime.get_available_providers()]
    try:
        return runtime.InferenceSession(path if isinstance(path, bytes) else str(path), options, providers=chosen)
    except Exception as error:
        raise InputError(f"ONNX Runtime does not load {_shown(path)}", why=str(error)[:500]) from error


def _read_states(path: str | Path | bytes) -> dict[str, Tensor]:
    if isinstance(path, bytes):
        raise InputError("a training step from memory has no file beside it", remedy="pass states=")
    beside = Path(path).with_suffix(".safetensors")
    try:
        return load_file(beside)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{beside} does not hold the states of {path}", why=str(error)) from error


def _shown(path: str | Path | bytes) -> str:
    return "the model" if isinstance(path, bytes) else str(path)
