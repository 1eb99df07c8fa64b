"""Operators of training steps that ONNX lacks, written as operators that it has.

torch's own table of core ATen decompositions goes first; what is here replaces it or adds to it. All are exact (not
approximations), and tested against torch in float64.

- A convolution's weight gradient is itself a convolution: of the input, its batch and channel axes exchanged, with
  the error, its axes exchanged too, stride and dilation exchanged, groups folded into channels, and the result cropped
  to the kernel. Its input gradient is a transposed convolution.
- Average pooling and resizing are linear and separate over the axes: the backward of each axis is a product with a
  small matrix.
- Max pooling adds each error to the place that its index names.
- BatchNorm in training is written with the statistics of the batch; the running ones are results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table to record a training step with."""
    return {**core_aten_decompositions(), **_OWN}


# Convolutions.


def convolution_backward(
    error: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of a convolution's input, weight and bias; None where the mask has False."""
    axes = x.dim() - 2
    stride, padding, dilation = (_each(value, axes) for value in (stride, padding, dilation))
    kernel = weight.shape[2:]
    of_x = of_weight = of_bias = None
    if mask[0] and transposed:
        of_x = aten.convolution(error, weight, None, stride, padding, dilation, False, [0] * axes, groups)
        of_x = _cropped(of_x, x.shape[2:])
    elif mask[0]:
        missing = [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                x.shape[2:], error.shape[2:], stride, padding, dilation, kernel, strict=True
            )
        ]
        of_x = aten.convolution(error, weight, None, stride, padding, dilation, True, missing, groups)
    if mask[1]:
        source, result = (error, x) if transposed else (x, error)
        of_weight = _weight_gradient(source, result, kernel, stride, padding, dilation, groups)
    if mask[2]:
        of_bias = error.sum([0, *range(2, error.dim())])
    return of_x, of_weight, of_bias


def _weight_gradient(
    x: Tensor, error: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """x: (batch, channels, *space). error: (batch, results, *space). Returns (results, channels / groups, *kernel)."""
    batch, channels, *space = x.shape
    axes = len(space)
    if groups > 1:
        folded = x.reshape(batch, groups, channels // groups, *space).permute(2, 1, 0, *range(3, 3 + axes))
        folded = folded.reshape(channels // groups, groups * batch, *space)
    else:
        folded = x.transpose(0, 1)
    found = aten.convolution(
        folded, error.transpose(0, 1), None, dilation, padding, stride, False, [0] * axes, groups
    )  # fmt: skip
    return _cropped(found, kernel).transpose(0, 1)


def _cropped(x: Tensor, space: Sequence[int]) -> Tensor:
    for axis, size in enumerate(space, 2):
        if x.shape[axis] != size:
            x = x.narrow(axis, 0, size)
    return x


def _each(value: Sequence[int], axes: int) -> list[int]:
    return list(value) * axes if len(value) == 1 else list(value)


# Normalization.


def _exact(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.float()


def batch_norm_functional(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The output, the mean and the inverse deviation that were used, and the new running statistics."""
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    exact = x.float() if x.dtype in _HALVES else x
    if training:
        mean = exact.mean(axes)
        centred = exact - mean.view(shape)
        variance = (centred * centred).mean(axes)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, variance = running_mean.to(exact.dtype), running_var.to(exact.dtype)
        centred = exact - mean.view(shape)
    inverse = torch.rsqrt(variance + eps)
    scale = inverse if weight is None else inverse * weight.to(exact.dtype)
    out = centred * scale.view(shape)
    if bias is not None:
        out = out + bias.to(exact.dtype).view(shape)
    if training and running_mean is not None:
        running_mean = momentum * mean.to(running_mean.dtype) + (1 - momentum) * running_mean
    if training and running_var is not None:
        count = x.numel() / x.shape[1]
        unbiased = (variance * (count / (count - 1))).to(running_var.dtype)
        running_var = momentum * unbiased + (1 - momentum) * running_var
    saved = (mean, inverse) if training else (mean.new_zeros(0), mean.new_zeros(0))
    return (out.to(x.dtype), *saved, running_mean, running_var)


def batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor | None, ...]:
    """The output, the mean and the inverse deviation of the batch."""
    return batch_norm_functional(x, weight, bias, None, None, True, momentum, eps)[:3]


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """Of half precision: in float32 throughout, as ONNX's LayerNormalization gives mean and inverse deviation."""
    if x.dtype not in _HALVES:
        return NotImplemented
    out, mean, inverse = aten.native_layer_norm(x.float(), shape, _exact(weight), _exact(bias), eps)
    return out.to(x.dtype), mean, inverse


# Pooling.


def max_pool_backward(
    error: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: Tensor
) -> Tensor:
    """Each error is added to the place that its index names, in the flat plane."""
    return _scattered(error, x, indices)


def adaptive_max_pool_backward(error: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """As `max_pool_backward`."""
    return _scattered(error, x, indices)


def _scattered(error: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    flat = torch.zeros_like(x).flatten(-2)
    return flat.scatter_add(-1, indices.flatten(-2), error.flatten(-2)).view(x.shape)


def avg_pool_backward(
    error: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    """Along each axis a product with the matrix of the windows, (results, places)."""
    axes = len(kernel)
    kernel, padding, stride = list(kernel), _each(padding, axes), _each(stride, axes) if stride else list(kernel)
    for axis, k, s, p in zip(range(-axes, 0), kernel, stride, padding, strict=True):
        size, results = x.shape[axis], error.shape[axis]
        start = torch.arange(results, device=x.device) * s - p
        end = (start + k).clamp(max=size + p)
        first, last = start.clamp(min=0), end.clamp(max=size)
        matrix = _windows(first, last, size).to(x.dtype)
        if not divisor_override:
            matrix = matrix / (end - start if count_include_pad else last - first).to(x.dtype).unsqueeze(1)
        error = _along(error, matrix, axis)
    return error / divisor_override if divisor_override else error


def adaptive_avg_pool_backward(error: Tensor, x: Tensor) -> Tensor:
    """As `avg_pool_backward`; window i goes from floor(i n / m) to ceil((i + 1) n / m)."""
    axes = x.dim() - 2 if x.dim() > 3 else 2
    for axis in range(-axes, 0):
        size, results = x.shape[axis], error.shape[axis]
        place = torch.arange(results, device=x.device)
        first = (place * size).div(results, rounding_mode="floor")
        last = ((place + 1) * size + results - 1).div(results, rounding_mode="floor")
        matrix = _windows(first, last, size).to(x.dtype) / (last - first).to(x.dtype).unsqueeze(1)
        error = _along(error, matrix, axis)
    return error


def _windows(first: Tensor, last: Tensor, size: int) -> Tensor:
    """1 where a place lies in a window: (windows, places)."""
    place = torch.arange(size, device=first.device)
    return (place >= first.unsqueeze(1)) & (place < last.unsqueeze(1))


def _along(error: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The product of a matrix (results, places) with one axis of the error."""
    return (error.transpose(axis, -1) @ matrix).transpose(axis, -1)


# Resizing.


def upsample_nearest_backward(
    error: Tensor, output_size: Sequence[int], input_size: Sequence[int], *scales: float | None
) -> Tensor:
    """Along each axis a product with a matrix that has one 1 in each row."""
    axes = len(output_size)
    for axis, scale in zip(range(-axes, 0), scales or [None] * axes, strict=True):
        size, results = input_size[axis], error.shape[axis]
        ratio = 1 / scale if scale else size / results
        first = (torch.arange(results, device=error.device).to(torch.float32) * ratio).to(torch.int64)
        first = first.clamp(max=size - 1)
        error = _along(error, _windows(first, first + 1, size).to(error.dtype), axis)
    return error


def upsample_linear_backward(
    error: Tensor, output_size: Sequence[int], input_size: Sequence[int], align_corners: bool, *scales: float | None
) -> Tensor:
    """Along each axis a product with the matrix of the interpolation weights."""
    axes = len(output_size)
    for axis, scale in zip(range(-axes, 0), scales or [None] * axes, strict=True):
        size, results = input_size[axis], error.shape[axis]
        place = torch.arange(results, device=error.device).to(error.dtype)
        if align_corners:
            source = place * ((size - 1) / max(1, results - 1))
        else:
            source = ((place + 0.5) * (1 / scale if scale else size / results) - 0.5).clamp(min=0)
        source = source.clamp(max=size - 1)
        distance = (torch.arange(size, device=error.device).to(error.dtype) - source.unsqueeze(1)).abs()
        error = _along(error, (1 - distance).clamp(min=0), axis)
    return error


# Embeddings, sums over places and dropout.


def embedding_dense_backward(
    error: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """Each error is added to the row of its index; the row of `padding_idx` stays 0."""
    flat, width = indices.reshape(-1), error.shape[-1]
    errors = error.reshape(-1, width)
    if padding_idx >= 0:
        errors = errors * (flat != padding_idx).to(errors.dtype).unsqueeze(1)
    if scale_grad_by_freq:
        counts = errors.new_zeros(rows).scatter_add(0, flat, torch.ones_like(flat, dtype=errors.dtype))
        errors = errors / counts[flat].unsqueeze(1)
    return errors.new_zeros(rows, width).scatter_add(0, flat.unsqueeze(1).expand(-1, width), errors)


def embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:  # fmt: skip
    """Sums (mode 0) or means (mode 1) of rows; the other three results only feed the backward, which reads none."""
    if mode > 1:
        return NotImplemented
    bags, given, size = _bags(indices, offsets, include_last_offset, padding_idx, weight.dtype)
    rows = weight.index_select(0, indices) * given.unsqueeze(1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    out = weight.new_zeros(size.shape[0], weight.shape[1])
    out = out.scatter_add(0, bags.unsqueeze(1).expand(-1, weight.shape[1]), rows)
    if mode == 1:
        out = out / size.clamp(min=1).unsqueeze(1)
    return out, bags, size.to(indices.dtype), offsets


def embedding_bag_backward(
    error: Tensor, indices: Tensor, offsets: Tensor, bag_of: Tensor, size_of: Tensor, largest: Tensor, rows: int,
    scale_grad_by_freq: bool, mode: int, sparse: bool, per_sample_weights: Tensor | None, padding_idx: int = -1,
) -> Any:  # fmt: skip
    """Each bag's error goes to its rows; `offsets` without a last offset."""
    if mode > 1 or scale_grad_by_freq:
        return NotImplemented
    bags, given, size = _bags(indices, offsets[: error.shape[0]], False, padding_idx, error.dtype)
    if mode == 1:
        error = error / size.clamp(min=1).unsqueeze(1)
    errors = error.index_select(0, bags) * given.unsqueeze(1)
    if per_sample_weights is not None:
        errors = errors * per_sample_weights.unsqueeze(1)
    width = error.shape[1]
    return errors.new_zeros(rows, width).scatter_add(0, indices.unsqueeze(1).expand(-1, width), errors)


def _bags(
    indices: Tensor, offsets: Tensor, include_last_offset: bool, padding_idx: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The bag of each index, 1 where it counts, and how many count in each bag."""
    if include_last_offset:
        offsets = offsets[:-1]
    place = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    bags = (place.unsqueeze(1) >= offsets).to(torch.int64).sum(1) - 1
    given = (indices != padding_idx).to(dtype)
    size = given.new_zeros(offsets.shape[0]).scatter_add(0, bags, given)
    return bags, given, size


def scatter_add(x: Tensor, axis: int, index: Tensor, source: Tensor) -> Any:
    """Of half precision: summed in float32, since ONNX Runtime's CPU kernels have no other."""
    if x.dtype not in _HALVES:
        return NotImplemented
    return x.float().scatter_add(axis, index, source.float()).to(x.dtype)


def index_put(x: Tensor, indices: Sequence[Tensor | None], source: Tensor, accumulate: bool = False) -> Any:
    """As `scatter_add`."""
    if x.dtype not in _HALVES or not accumulate:
        return NotImplemented
    return aten.index_put(x.float(), indices, source.float(), True).to(x.dtype)


def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """The kept entries, scaled, and where they are; the random numbers are ONNX Runtime's."""
    if train is False or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    kept = torch.rand_like(x, dtype=torch.float32) >= p
    return x * kept.to(x.dtype) * (1 / (1 - p)), kept


_OWN: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten._native_batch_norm_legit_functional.default: batch_norm_functional,
    aten._native_batch_norm_legit.no_stats: batch_norm_no_stats,
    aten.native_layer_norm.default: layer_norm,
    aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    aten.adaptive_max_pool2d_backward.default: adaptive_max_pool_backward,
    aten.avg_pool2d_backward.default: avg_pool_backward,
    aten.avg_pool3d_backward.default: avg_pool_backward,
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool_backward,
    aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool_backward,
    aten.upsample_nearest1d_backward.default: upsample_nearest_backward,
    aten.upsample_nearest2d_backward.default: upsample_nearest_backward,
    aten.upsample_nearest3d_backward.default: upsample_nearest_backward,
    aten.upsample_linear1d_backward.default: upsample_linear_backward,
    aten.upsample_bilinear2d_backward.default: upsample_linear_backward,
    aten.upsample_trilinear3d_backward.default: upsample_linear_backward,
    aten.embedding_dense_backward.default: embedding_dense_backward,
    aten.native_dropout.default: native_dropout,
    aten.scatter_add.default: scatter_add,
    aten.index_put.default: index_put,
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_backward.default: embedding_bag_backward,
}
