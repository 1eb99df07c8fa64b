"""Perceptrons, and the small models in which one thing is unusual: sharing, freezing, buffers, detaching."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.registry import BATCH, CLASSES, fit, model, normal, tokens


def layers(*sizes: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with the activation between them, none after the last."""
    result = nn.Sequential()
    for before, after in pairwise(sizes):
        result.extend([nn.Linear(before, after), activation()])
    return result[:-1]


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x)


@model("mlp", tags="mlp tanh")
def mlp() -> nn.Module:
    return layers(6, 8, 7, CLASSES)


@model("deep_mlp", tags="mlp sigmoid")
def deep_mlp() -> nn.Module:
    return layers(6, *[7] * 7, CLASSES, activation=nn.Sigmoid)


@model("sign_mlp", tags="mlp sign zero-gradient")
def sign_mlp() -> nn.Module:
    return layers(6, 8, 7, CLASSES, activation=Sign)


@model("dropout_mlp", tags="mlp random dropout")
def dropout_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.3), layers(9, 8, CLASSES))


@model("weight_norm", tags="mlp parametrized")
def weight_norm() -> nn.Module:
    result = layers(6, 8, CLASSES)
    nn.utils.parametrizations.weight_norm(result[0])
    return result


@model("frozen_middle", tags="mlp frozen")
def frozen_middle() -> nn.Module:
    result = layers(6, 8, 7, CLASSES)
    result[2].requires_grad_(False)
    return result


@model("autoencoder", loss=fit, tags="mlp")
def autoencoder() -> nn.Module:
    return layers(6, 5, 2, 5, 6)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width + 1), nn.Linear(width + 1, width)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.outer(torch.tanh(self.inner(z))) + z)


@model("residual_mlp", tags="mlp tanh residual")
class ResidualMLP(nn.Module):
    """The model of `reference.residual_rec_lra`, with the same parameter names."""

    def __init__(self, blocks: int = 3, width: int = 7) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, CLASSES)
        self.blocks = nn.Sequential(*[ResidualBlock(width) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.tanh(self.stem(x))))


class Layered(nn.Module):
    """Three linear layers of width 6 for the small models below to use as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)


@model("called_twice", tags="mlp shared")
class CalledTwice(Layered):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.second(z)))


@model("tied_weight", loss=fit, tags="mlp shared")
class TiedWeight(nn.Module):
    """One weight in two places: the decoder is the encoder's transpose, with its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(6, 4), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


@model("siamese", lambda: (normal(BATCH, 6), normal(BATCH, 6, seed=1)), tags="shared several-inputs")
class Siamese(Layered):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = (torch.tanh(self.second(torch.tanh(self.first(x)))) for x in (a, b))
        return self.head((a - b).abs())


@model(
    "several_inputs_outputs",
    lambda: (normal(BATCH, 6), normal(BATCH, 5, seed=1)),
    fit,
    "several-inputs several-outputs",
)
class SeveralInputsOutputs(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 6)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.first(x) + self.other(y))
        return self.head(z), self.second(z * torch.tanh(y.sum(1, keepdim=True)))


@model("nested_output", loss=fit, tags="several-outputs")
class NestedOutput(Layered):
    def forward(self, x: Tensor) -> dict:
        z = torch.tanh(self.first(x))
        return {"scores": {"classes": self.head(z), "rest": [self.second(z)]}, "hidden": z}


@model("keyword_none", lambda: {"x": normal(BATCH, 6), "mask": tokens(BATCH, 6) > 2}, tags="keywords")
class KeywordNone(Layered):
    def forward(self, x: Tensor, scale: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        z = torch.tanh(self.first(x))
        z = z if scale is None else z * scale
        z = z if mask is None else z.masked_fill(~mask, 0.0)
        return self.head(torch.tanh(self.second(z)))


@model("slice_assignment", tags="in-place")
class SliceAssignment(Layered):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x)).clone()
        z[:, 0] = 0
        z[:, 4:] += self.second(x)[:, :2]
        return self.head(z)


@model("partly_detached", tags="detach")
class PartlyDetached(Layered):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 + self.second(x).abs().mean(1, keepdim=True)
        z = torch.tanh(self.first(x))
        gate = torch.sigmoid(self.second(z.detach()))
        return self.head(z * gate / scale)


@model("unused_parameter", tags="unused")
class UnusedParameter(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


@model("scalar_gain", tags="scalar")
class ScalarGain(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        z = self.gain * torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(z))) * self.gain.exp()


@model("step_counter", tags="buffer")
class StepCounter(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return self.head(torch.tanh(self.first(x)) + torch.tanh(self.second(x)) / self.steps)


@model("moving_average", tags="buffer")
class MovingAverage(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        self.mean.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)
        return self.head(torch.tanh(self.second(z - self.mean)))


@model("mixture_of_experts", tags="gating")
class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([layers(6, 5, 6) for _ in range(4)])
        self.gate, self.head = nn.Linear(6, 4), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head(torch.einsum("be,bef->bf", self.gate(x).softmax(1), z))
