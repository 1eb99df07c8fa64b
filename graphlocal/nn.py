"""Layers that local learning makes trainable: discrete and stochastic units, competition, fixed perturbations.

All run in any float type, keep no state between calls, and trace with an open batch size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphlocal.errors import InputError


class Signum(nn.Module):
    """The sign of x, elementwise: -1, 0 or 1, with derivative 0 everywhere.

    x: any shape. Source: Ororbia, Mali, Kifer, Giles, "Conducting credit assignment by aligning local
    representations" (LRA), 2018.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)


class Bernoulli(nn.Module):
    """A stochastic binary unit: 1 with probability sigmoid(x), else 0, elementwise and independently.

    In training mode it draws from torch's generator and has derivative 0 everywhere; in evaluation mode it
    returns the mean, sigmoid(x), draws nothing, and has the sigmoid's derivative.

    x: logits of any shape. Source: the stochastic units of LRA, 2018.
    """

    def forward(self, x: Tensor) -> Tensor:
        probability = torch.sigmoid(x)
        return torch.bernoulli(probability) if self.training else probability


class _Blocks(nn.Module):
    """What LWTA and SoftLWTA share: consecutive features compete in blocks."""

    def __init__(self, block: int, dim: int = 1) -> None:
        super().__init__()
        if block < 1:
            raise InputError(f"block is {block}", remedy="pass the number of features that compete, 1 or more")
        self.block, self.dim = block, dim

    def forward(self, x: Tensor) -> Tensor:
        """Cut axis `dim` into (blocks, block), let each block compete, and join them again."""
        if not -x.dim() <= self.dim < x.dim():
            raise InputError(
                f"{type(self).__name__} competes over axis {self.dim}, but its input has shape {tuple(x.shape)}",
                remedy="pass dim=-1 where features are last",
            )
        features = x.shape[self.dim]
        if features % self.block:
            raise InputError(
                f"{features} features (axis {self.dim}) do not divide into blocks of {self.block}",
                where=f"{type(self).__name__}({self.extra_repr()})",
                remedy="choose a block size that divides the number of features",
            )
        axis = self.dim + 1 if self.dim >= 0 else self.dim
        blocks = x.unflatten(self.dim, (features // self.block, self.block))
        return self.compete(blocks, axis).flatten(axis - 1, axis)

    def compete(self, blocks: Tensor, axis: int) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"block={self.block}, dim={self.dim}"


class LWTA(_Blocks):
    """Hard local winner-takes-all: of every `block` consecutive features the largest passes, the others are 0.

    The first of equal ones wins. Only winners get a gradient.

    x: features on axis `dim`, otherwise any shape; the result has the same shape.
    Raises InputError if the features don't divide into blocks.
    Source: Srivastava et al., "Compete to compute", 2013; as a unit for local learning LRA, 2018.
    """

    def compete(self, blocks: Tensor, axis: int) -> Tensor:
        winner = blocks.argmax(axis, keepdim=True)
        return torch.zeros_like(blocks).scatter(axis, winner, blocks.gather(axis, winner))


class SoftLWTA(_Blocks):
    """Smooth local competition: x * softmax(x), the softmax over every `block` consecutive features.

    x: features on axis `dim`, otherwise any shape; the result has the same shape.
    Raises InputError if the features don't divide into blocks.
    """

    def compete(self, blocks: Tensor, axis: int) -> Tensor:
        return blocks * blocks.softmax(axis)


class PerturbativeConv2d(nn.Module):
    """A perturbative layer: z^c = Σ_m w_{c,m} relu(x^m + n^m) + b^c, which can stand in for a convolution.

    The noise maps n ~ N(0, noise²) are drawn once and never learn (buffer `noise_maps`); the mixing weights w and
    the bias do. No pixel sees another: what is near it has to come in by pooling elsewhere in the model.

    input: (N, in_channels, H, W) or (in_channels, H, W), with `size` (H, W) known in advance. The result has
    out_channels of ceil(H / stride) by ceil(W / stride): every stride-th row and column, `[..., ::s, ::s]`, of the
    mixed maps, as if the stride came last. maps: noise maps for each input channel; then m runs over
    in_channels * maps, channel by channel. weight: (out_channels, in_channels * maps, 1, 1).
    Raises InputError for an option out of range, and for an input of other sizes.
    Source: Juefei-Xu, Boddeti, Savvides, "Perturbative neural networks", 2018; with local learning rec-LRA.
    """

    noise_maps: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int],
        *,
        maps: int = 1,
        noise: float = 0.1,
        stride: int | tuple[int, int] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size, self.stride = _pair(size), _pair(stride)
        self.maps, self.noise = maps, noise
        self._check_options()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels * maps, 1, 1))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer("noise_maps", torch.empty(in_channels, maps, *self.size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Conv2d` does for a 1x1 convolution, and then the noise maps."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * self.maps)
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.normal_(self.noise_maps, std=self.noise)

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Conv2d's, for callers that pass it by keyword
        expected = (self.in_channels, *self.size)
        if input.dim() not in (3, 4) or tuple(input.shape[-3:]) != expected:
            raise InputError(
                f"the input has shape {tuple(input.shape)}, not (N, {', '.join(map(str, expected))})",
                where=f"PerturbativeConv2d({self.extra_repr()})",
                why="the noise maps were drawn for one image size",
                remedy="resize the images, or make the layer anew for this size",
            )
        perturbed = torch.relu(input.unsqueeze(-3) + self.noise_maps).flatten(-4, -3)
        # A 1x1 convolution with a stride is the subsampled one, without the work for what is dropped.
        return F.conv2d(perturbed, self.weight, self.bias, self.stride)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, size={self.size}, maps={self.maps}, noise={self.noise}"]
        parts += [f"stride={self.stride}"] if self.stride != (1, 1) else []
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join(parts)

    def _check_options(self) -> None:
        counts = {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "maps": self.maps,
            "size": min(self.size), "stride": min(self.stride),
        }  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"{name} is {getattr(self, name)}", remedy="pass 1 or more")
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise InputError(f"noise is {self.noise}", remedy="pass the noise maps' standard deviation, 0 or more")


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """An int stands for both directions."""
    if isinstance(value, int):
        return value, value
    high, wide = value
    return high, wide
