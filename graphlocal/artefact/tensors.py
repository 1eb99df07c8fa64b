"""Tensors in a file: what is kept of each beside its values, and safetensors checked before it is read.

Complex numbers are stored as pairs of real ones. A dense tensor that is not contiguous (channels last, a transposed
weight) keeps its strides, since kernels and so rounding depend on them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from graphlocal.artefact.document import Doc, parse
from graphlocal.errors import FileFormatError, InputError

_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_COMPLEX = {"complex64": "float32", "complex128": "float64"}
DTYPES = frozenset({*_SAFETENSORS.values(), *_COMPLEX})
_LARGEST_HEADER = 100 * 2**20
_LARGEST_SIZE = 2**48
_MOST_AXES = 64


@dataclass(frozen=True)
class TensorInfo:
    """dtype (without `torch.`), shape, strides (None if contiguous) and device of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    device: str

    def document(self) -> dict[str, Any]:
        strides = None if self.strides is None else list(self.strides)
        return {"dtype": self.dtype, "shape": list(self.shape), "strides": strides, "device": self.device}


INFO_FIELDS = ("dtype", "shape", "strides", "device")


def describe(tensor: Tensor, name: str) -> TensorInfo:
    """What is kept of a tensor beside its values. Raises InputError for one that no file can hold."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or dtype not in DTYPES:
        kind = "without values (meta)" if tensor.is_meta else f"{dtype}, {tensor.layout}"
        raise InputError(
            f"the tensor {name!r} can't be saved: it is {kind}",
            why="safetensors holds dense tensors of plain numbers",
            remedy="convert it, for example with to_dense(), or leave it out of the model's buffers",
        )
    shape, strides = tuple(tensor.shape), tensor.stride()
    keep = strides != contiguous(shape) and _dense(shape, strides)  # axes of size 1 count: kernels look at them
    return TensorInfo(dtype, shape, strides if keep else None, str(tensor.device))


def read_info(dtype: Doc, shape: Doc, strides: Doc, device: Doc) -> TensorInfo:
    """The fields INFO_FIELDS of a document."""
    sizes = tuple(size.number(0, _LARGEST_SIZE) for size in shape.array(_MOST_AXES))
    if math.prod(max(size, 1) for size in sizes) >= 2**62:
        raise shape.error("a tensor of this shape fits into no memory")
    steps = None
    if strides.value is not None:
        steps = tuple(step.number(0, _LARGEST_SIZE) for step in strides.array(_MOST_AXES))
        if not _dense(sizes, steps):
            raise strides.error("these strides leave gaps or overlap")
    return TensorInfo(dtype.one_of(DTYPES), sizes, steps, device_of(device))


def device_of(doc: Doc) -> str:
    """A device as torch prints it."""
    try:
        return str(torch.device(doc.text()))
    except RuntimeError:
        raise doc.error("no such device") from None


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a new tensor of that shape."""
    steps = list(accumulate(reversed(shape[1:]), lambda step, size: step * max(size, 1), initial=1))
    return tuple(reversed(steps[: len(shape)]))


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one piece of memory without gaps, in some order of the axes."""
    if len(shape) != len(strides) or 0 in shape:
        return False
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors by name, each laid out anew on the CPU."""
    plain = {name: _plain(tensor).to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain)
    return data


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()


def from_safetensors(data: bytes, member: str, expected: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """The tensors of a member, which must be exactly the expected ones; on the CPU, contiguous.

    The header is checked against the expected dtypes and shapes and the bytes that are there, before anything is
    made of it. Raises FileFormatError.
    """
    _check_header(data, member, expected)
    try:
        found: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise FileFormatError(f"{member} is damaged", why=str(error)[:200]) from error
    return {name: torch.view_as_complex(value) if expected[name].dtype in _COMPLEX else value
            for name, value in found.items()}  # fmt: skip


def _check_header(data: bytes, member: str, expected: Mapping[str, TensorInfo]) -> None:
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else _LARGEST_HEADER + 1
    if length > min(len(data) - 8, _LARGEST_HEADER):
        raise FileFormatError(f"{member} is damaged", why=f"its header claims {length} bytes of {len(data)}")
    header = parse(data[8 : 8 + length], member)
    spans = []
    names = set()
    for name, entry in header.items():
        if name not in expected:
            raise FileFormatError(f"{member} holds a tensor {name!r:.80} that module.json does not know")
        names.add(name)
        spans.append(_span(entry, expected[name]))
    missing = sorted(set(expected) - names)
    if missing:
        raise FileFormatError(f"{member} lacks the tensor {missing[0]!r}")
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise FileFormatError(f"{member} is damaged", why="its tensors overlap or leave gaps")
        at = end
    if at != len(data) - 8 - length:
        raise FileFormatError(f"{member} is damaged", why=f"its tensors take {at} of {len(data) - 8 - length} bytes")


def _span(entry: Doc, info: TensorInfo) -> tuple[int, int]:
    """Where the bytes of a tensor are, if its entry is as expected."""
    dtype, shape, offsets = entry.fields("dtype", "shape", "data_offsets")
    stored = _COMPLEX.get(info.dtype, info.dtype)
    sizes = (*info.shape, 2) if info.dtype in _COMPLEX else info.shape
    if _SAFETENSORS[dtype.one_of(_SAFETENSORS)] != stored:
        raise dtype.error(f"expected {stored}")
    if shape.value != list(sizes):
        raise shape.error(f"expected the shape {list(sizes)}")
    begin, end = (offset.number() for offset in _pair(offsets))
    if end - begin != math.prod(sizes) * getattr(torch, stored).itemsize:
        raise offsets.error(f"{end - begin} bytes are not what a tensor of {list(sizes)} takes")
    return begin, end


def _pair(doc: Doc) -> list[Doc]:
    found = doc.array(2)
    if len(found) != 2:
        raise doc.error("expected two numbers")
    return found


def restore(value: Tensor, info: TensorInfo, device: torch.device) -> Tensor:
    """A tensor as it was described, on another device."""
    if info.strides is None:
        return value.to(device, copy=True)
    return torch.empty_strided(info.shape, info.strides, dtype=value.dtype, device=device).copy_(value)
