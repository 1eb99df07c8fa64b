"""Feedback twins: operations whose errors go down through another weight than the one that they apply."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphlocal.rules import Rule


class Twin(nn.Module):
    """The twin of a weight at one step, by the rule."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, weight: Tensor, stored: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self.rule.twin(weight.detach(), None if stored is None else stored.detach())


LINEAR = re.compile(r"aten\.(linear|matmul|mm|bmm|mv|addmm|baddbmm|einsum|conv(_transpose)?\d?d?|convolution)\.")
"""Operators that are linear in their activations, so that their derivative with other weights is the twins'."""


def through_twin(operator: Any, given: tuple[Any, Any], twinned: tuple[Any, Any]) -> Tensor:
    """`operator(*args, **kwargs)` on `given`, with the derivative in its activations that it has on `twinned`.

    given, twinned: (args, kwargs), the second with twins in place of weights. The weights' own derivative is true.
    """
    leaves, spec = pytree.tree_flatten(given)
    others = pytree.tree_leaves(twinned)
    result: Tensor = _ThroughTwin.apply(operator, spec, others, *leaves)  # type: ignore[no-untyped-call]
    return result


_CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)


class _ThroughTwin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, spec: Any, others: list[Any], *leaves: Any) -> Tensor:
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        ctx.operator, ctx.spec = operator, spec
        ctx.is_tensor = [isinstance(x, Tensor) for x in leaves]
        ctx.is_weight = [a is not b for a, b in zip(leaves, others, strict=True)]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x for pair in zip(leaves, others, strict=True) for x in pair if isinstance(x, Tensor)))
        return operator(*args, **kwargs)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Any, ...]:
        saved = iter(_in_dtype(errors[0].dtype, ctx.saved_tensors))
        pairs = [(next(saved), next(saved)) if tensor else (x, x)
                 for tensor, x in zip(ctx.is_tensor, ctx.constants, strict=True)]  # fmt: skip
        wanted = ctx.needs_input_grad[3:]
        weights = [i for i, wish in enumerate(wanted) if wish and ctx.is_weight[i]]
        activations = [i for i, wish in enumerate(wanted) if wish and not ctx.is_weight[i]]
        found: list[Tensor | None] = [None] * len(pairs)
        if ctx.operator is torch.ops.aten.linear.default:
            _linear(pairs, errors[0], weights, activations, found)
        elif ctx.operator in _CONVOLUTIONS:
            _convolution(pairs, errors[0], weights, activations, found)
        else:
            _derive(ctx, [own for own, _ in pairs], errors[0], weights, found)
            _derive(ctx, [twin for _, twin in pairs], errors[0], activations, found)
        return None, None, None, *found


def _in_dtype(dtype: torch.dtype, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors as the operator took them: autocast casts to the dtype that its result has, and the error."""
    return (x.to(dtype) if x.is_floating_point() and x.dtype is not dtype else x for x in tensors)


def _derive(ctx: Any, leaves: list[Any], error: Tensor, sought: list[int], found: list[Tensor | None]) -> None:
    """The derivative of the operator in some of its arguments, by running it once more."""
    if not sought:
        return
    with torch.enable_grad():
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        for i in sought:
            leaves[i].requires_grad_()
        args, kwargs = pytree.tree_unflatten(leaves, ctx.spec)
        gradients = torch.autograd.grad(ctx.operator(*args, **kwargs), [leaves[i] for i in sought], error)
    for i, gradient in zip(sought, gradients, strict=True):
        found[i] = gradient


def _convolution(pairs: list[Any], error: Tensor, weights: list[int], activations: list[int],
                 found: list[Tensor | None]) -> None:  # fmt: skip
    """`conv(x, W, b, stride, padding, dilation, groups)` without running it again."""
    (x, _), (weight, twin) = pairs[0], pairs[1]
    axes = weight.dim() - 2
    # the flattened arguments hold one number for each axis; those that are left out have their defaults
    rest = [number for number, _ in pairs[3:]]
    settings = [rest[k * axes : (k + 1) * axes] or [default] * axes for k, default in enumerate((1, 0, 1))]
    groups = rest[3 * axes] if len(rest) > 3 * axes else 1
    if len(rest) % axes > (len(rest) > 3 * axes) or x.dim() != axes + 2:
        raise AssertionError("a convolution has one stride, padding and dilation for each axis")
    for own, mask in ((twin, [0 in activations, False, 2 in activations]), (weight, [False, bool(weights), False])):
        if any(mask):
            gradients = torch.ops.aten.convolution_backward(
                error, x, own, [own.shape[0]], *settings, False, [0] * axes, groups, mask
            )
            for i, gradient in enumerate(gradients):
                if mask[i]:
                    found[i] = gradient


def _linear(pairs: list[Any], error: Tensor, weights: list[int], activations: list[int],
            found: list[Tensor | None]) -> None:  # fmt: skip
    """`linear(x, W, b)` without running it again."""
    (x, _), (_, twin) = pairs[0], pairs[1]
    flat = error.flatten(0, -2) if error.dim() > 1 else error.unsqueeze(0)
    if weights:
        found[1] = flat.mT @ (x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0))
    for i in activations:
        found[i] = error @ twin if i == 0 else flat.sum(0)
