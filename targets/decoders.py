"""Decoders from the representation of a reader to what it read: the messages through them, and how they learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.feedback import Layout
from graphlocal.targets.reread import Body


def bias_name(factor: str) -> str:
    """The name of a decoder's bias, from that of the first factor of its E."""
    return f"{factor}_bias"


@dataclass(frozen=True)
class Decoder:
    """g(z) = phi(E z + c), laid out like the target."""

    layout: Layout
    phi: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor, target: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        *factors, bias = parameters
        layout = self.layout
        positions = [n for axis, n in enumerate(z.shape) if axis != layout.source_axis]
        kept = [z.shape[axis] for axis, _ in layout.shared]
        summed = torch.Size(positions).numel() / max(torch.Size(kept).numel(), 1)
        shape = [1] * target.dim()
        if layout.target_axis < target.dim():
            shape[layout.target_axis] = -1
        return self.phi(layout.apply(factors, z / max(summed, 1), target) + bias.to(target.dtype).reshape(shape))


class Decoded(nn.Module):
    """The displacement of a representation, from a reader's error: (g(z) - g(z - eta e)) / eta, e per sample."""

    def __init__(self, decoder: Decoder, eta: float) -> None:
        super().__init__()
        self.decoder, self.eta = decoder, eta

    def forward(
        self, error: Tensor | None, z: Tensor, target: Tensor, batch: int, *parameters: Tensor
    ) -> Tensor | None:
        if error is None:
            return None
        with torch.no_grad():
            moved = z - self.eta * batch * error
            difference = self.decoder(z, target, parameters) - self.decoder(moved, target, parameters)
            return difference / (self.eta * batch)


class DecoderUpdate(nn.Module):
    """The updates of E's factors and of c, from a reconstruction of the representation with noise on it.

    forward(snapshot, arguments, z, value, batch, *parameters): z is reconstructed; value is what the reader takes.
    position: of `value` among the reader's arguments; result: of its representation among its results.
    """

    def __init__(self, decoder: Decoder, body: Body, position: int, result: int, noise: float) -> None:
        super().__init__()
        self.decoder, self.body, self.position, self.result, self.noise = decoder, body, position, result, noise

    def forward(self, snapshot: Any, arguments: Sequence[Any], z: Tensor, value: Tensor, batch: int,
                *parameters: Tensor) -> tuple[Tensor | None, ...]:  # fmt: skip
        if not parameters[0].requires_grad:
            return (None,) * len(parameters)
        with torch.no_grad():
            noise = self.noise * torch.randn_like(z) if self.noise else torch.zeros_like(z)
            given = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
            given[self.position] = value.detach() + noise
            source = self.body(snapshot, given)[self.result].detach()
        with torch.enable_grad():
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            wanted = z.detach() + noise
            loss = (self.decoder(source, wanted, leaves) - wanted).square().sum() / batch
            return torch.autograd.grad(loss, leaves)
