"""The decompositions of the ONNX training step equal torch's operators, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphlocal.targets.onnx.decompositions import (
    adaptive_avg_pool_backward,
    adaptive_max_pool_backward,
    avg_pool_backward,
    batch_norm_functional,
    convolution_backward,
    embedding_bag,
    embedding_bag_backward,
    embedding_dense_backward,
    index_put,
    layer_norm,
    max_pool_backward,
    scatter_add,
    upsample_linear_backward,
    upsample_nearest_backward,
)

aten = torch.ops.aten


def same(found: Any, expected: Any) -> None:
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


SETTINGS = itertools.product((False, True), (1, 2, 3), (0, 1), (1, 2), (1, 2, 4), (1, 3), (0, 1))


def test_convolution_backward_is_exact() -> None:
    checked = 0
    for transposed, stride, padding, dilation, groups, kernel, more in SETTINGS:
        if more and (not transposed or more >= max(stride, dilation)):
            continue
        x = random(3, 4, 9, 8)
        weight = random(4, 3, kernel, kernel) if transposed else random(8, 4 // groups, kernel, kernel)
        options = ([stride] * 2, [padding] * 2, [dilation] * 2, transposed, [more] * 2, groups)
        y = aten.convolution(x, weight, None, *options)
        given = (random(*y.shape), x, weight, [y.shape[1]], *options, [True] * 3)
        same(convolution_backward(*given), aten.convolution_backward(*given))
        checked += 1
    assert checked == 204


@pytest.mark.parametrize("axes", [1, 3])
def test_convolution_backward_is_exact_on_other_numbers_of_axes(axes: int) -> None:
    x, weight = random(2, 4, *[6] * axes), random(4, 2, *[3] * axes)
    options = ([2] * axes, [1] * axes, [1] * axes, False, [0] * axes, 2)
    y = aten.convolution(x, weight, None, *options)
    given = (random(*y.shape), x, weight, [4], *options, [True] * 3)
    same(convolution_backward(*given), aten.convolution_backward(*given))


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil"), [(2, 2, 0, False), (3, 2, 1, True), (3, 1, 1, False)])
def test_pooling_backward_is_exact(kernel: int, stride: int, padding: int, ceil: bool) -> None:
    x = random(3, 4, 9, 7)
    windows = ([kernel] * 2, [stride] * 2, [padding] * 2)
    y, places = aten.max_pool2d_with_indices(x, *windows, [1, 1], ceil)
    given = (random(*y.shape), x, *windows, [1, 1], ceil, places)
    same(max_pool_backward(*given), aten.max_pool2d_with_indices_backward(*given))
    for count, divisor in ((True, None), (False, None), (True, 5)):
        y = aten.avg_pool2d(x, *windows, ceil, count, divisor)
        given = (random(*y.shape), x, *windows, ceil, count, divisor)
        same(avg_pool_backward(*given), aten.avg_pool2d_backward(*given))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 5), (2, 7)])
def test_adaptive_pooling_backward_is_exact(size: tuple[int, int]) -> None:
    x = random(3, 4, 9, 7)
    error = random(3, 4, *size)
    same(adaptive_avg_pool_backward(error, x), aten._adaptive_avg_pool2d_backward(error, x))
    _, places = aten.adaptive_max_pool2d(x, size)
    same(adaptive_max_pool_backward(error, x, places), aten.adaptive_max_pool2d_backward(error, x, places))


@pytest.mark.parametrize("size", [(18, 14), (10, 9), (5, 3)])
def test_resizing_backward_is_exact(size: tuple[int, int]) -> None:
    error, shape = random(3, 4, *size), (3, 4, 9, 7)
    given = (error, size, shape)
    same(
        upsample_nearest_backward(error, size, shape, None, None),
        aten.upsample_nearest2d_backward(*given, None, None),
    )  # fmt: skip
    for corners in (True, False):
        given = (error, size, shape, corners, None, None)
        same(upsample_linear_backward(*given), aten.upsample_bilinear2d_backward(*given))


@pytest.mark.parametrize(("padding", "by_frequency"), [(-1, False), (2, False), (-1, True)])
def test_embedding_backward_is_exact(padding: int, by_frequency: bool) -> None:
    given = (random(3, 7, 6), torch.randint(5, (3, 7)), 5, padding, by_frequency)
    same(embedding_dense_backward(*given), aten.embedding_dense_backward(*given))


@pytest.mark.parametrize(
    ("mode", "weighted", "padding"), [("sum", False, 4), ("sum", True, None), ("mean", False, None)]
)
def test_embedding_bag_is_exact(mode: str, weighted: bool, padding: int | None) -> None:
    weight, indices, offsets = random(11, 5).requires_grad_(), torch.randint(11, (9,)), torch.tensor([0, 3, 3, 7])
    factors = random(9) if weighted else None
    expected = F.embedding_bag(
        indices, weight, offsets, mode=mode, per_sample_weights=factors, padding_idx=padding
    )  # fmt: skip
    rest = (["sum", "mean"].index(mode), False, factors)
    place = -1 if padding is None else padding
    found = embedding_bag(weight.detach(), indices, offsets, False, *rest, False, place)
    same(found[0], expected.detach())
    error = random(4, 5)
    expected.backward(error)
    same(embedding_bag_backward(error, indices, offsets, *found[1:], 11, False, *rest, place), weight.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_exact(training: bool, affine: bool) -> None:
    weights = (random(4), random(4)) if affine else (None, None)
    given = (random(3, 4, 5, 6), *weights, random(4), random(4).abs(), training, 0.1, 1e-5)
    same(batch_norm_functional(*given), aten._native_batch_norm_legit_functional(*given))


def test_half_precision_is_normalized_and_summed_in_float32() -> None:
    x, weight, bias = random(6, 5).half(), random(5).half(), random(5).half()
    out, mean, inverse = layer_norm(x, [5], weight, bias, 1e-5)
    exact = aten.native_layer_norm(x.float(), [5], weight.float(), bias.float(), 1e-5)
    assert (out.dtype, mean.dtype, inverse.dtype) == (torch.float16, torch.float32, torch.float32)
    same((out, mean, inverse), (exact[0].half(), *exact[1:]))
    index, many = torch.zeros(4000, dtype=torch.int64), torch.full((4000,), 0.5).half()
    assert scatter_add(torch.zeros(2).half(), 0, index, many).tolist() == [2000.0, 0.0]
    assert index_put(torch.zeros(2).half(), [index], many, True).tolist() == [2000.0, 0.0]
    assert scatter_add(torch.zeros(2), 0, index, many.float()) is NotImplemented
    assert index_put(torch.zeros(2).half(), [index], many) is NotImplemented
