"""`group_norm` at the beginning of a subgraph, where torch would end the process.

torch 2.13's CPU kernel for channels_last crashes in the backward pass when the gradient of the input is not asked for,
as it is where a subgraph's first operation is a group_norm. Here it is always computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def group_norm(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               eps: float = 1e-5, cudnn: bool = True) -> Tensor:  # fmt: skip
    """`aten.group_norm`; the values are the same."""
    if x.requires_grad or x.device.type != "cpu" or weight is None or not weight.requires_grad:
        result: Tensor = torch.ops.aten.group_norm.default(x, groups, weight, bias, eps, cudnn)
        return result
    return _GroupNorm.apply(x, groups, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        layout = torch.channels_last if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else (
            torch.contiguous_format)  # fmt: skip
        x = x.contiguous(memory_format=layout)
        ctx.sizes = x.shape[0], x.shape[1], x[0, 0].numel(), groups
        result: Tensor
        result, mean, scale = torch.ops.aten.native_group_norm.default(x, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.layout = layout
        return result

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, weight = ctx.saved_tensors
        error = errors[0].contiguous(memory_format=ctx.layout)
        _, for_weight, for_bias = torch.ops.aten.native_group_norm_backward(
            error, x, mean, scale, weight, *ctx.sizes, [True, True, True]
        )
        return None, None, for_weight, for_bias if ctx.needs_input_grad[3] else None, None
