"""Models that the compiler must handle, as one registry that every test can draw from.

`MODELS` must compile. `HARD` depends on its data or on Python state: each is compiled through an
opaque leaf or refused clearly, as its `expect` says. `BAD` is never compiled.

Every model is small, works in float32 and float64, and is deterministic given its seed. Inputs are
a batch of `BATCH` (torchvision's three-channel models: `IMAGES`), a size that hardly any
other dimension of theirs has; tag `time-first` puts the batch second, tag `graph` has nodes for rows.
Tags: activation and layer kinds, and `random` (draws random numbers), `buffer` (forward writes
buffers), `shared`, `in-place`, `frozen`, `unused`, `zero-gradient`, `keywords`, `several-inputs`,
`several-outputs`, `own-loss` (computed inside), `torchvision`, `large` (over a million parameters).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 3
IMAGES = 5
CLASSES = 4
VOCABULARY = 11


@dataclass(frozen=True)
class ZooModel:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple | dict]
    loss: Callable[[Any], Tensor]
    tags: frozenset[str]
    expect: str = "compiled"  # or "opaque", "refused", "either"

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """A fresh model in training mode; the caller's random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(dtype).train()

    def example(self, dtype: torch.dtype = torch.float32) -> tuple | dict:
        """Fresh example inputs, the floating-point ones in `dtype`."""
        inputs = self.inputs()
        if isinstance(inputs, dict):
            return {key: cast(value, dtype) for key, value in inputs.items()}
        return tuple(cast(value, dtype) for value in inputs)


MODELS: dict[str, ZooModel] = {}
HARD: dict[str, ZooModel] = {}
BAD: dict[str, ZooModel] = {}


def models(*, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list:
    """Parameters for pytest: those with any tag or name in `include`, less any in `exclude`."""
    unknown = {*include, *exclude} - set(MODELS).union(*(zoo.tags for zoo in MODELS.values()))
    assert not unknown, f"no model has the name or tag {sorted(unknown)}"

    def matches(zoo: ZooModel, words: tuple[str, ...]) -> bool:
        return bool({zoo.name, *zoo.tags} & set(words))

    chosen = [zoo for zoo in MODELS.values() if not include or matches(zoo, include)]
    return [pytest.param(zoo, id=zoo.name) for zoo in chosen if not matches(zoo, exclude)]


def call(module: Callable[..., Any], inputs: tuple | dict) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)


# Losses and inputs: no state, the same values on every call.


def classify(output: Tensor) -> Tensor:
    """Cross-entropy over dimension 1 of two (or more) dimensions, fixed labels, batch mean."""
    labels = torch.arange(output[:, 0].numel(), device=output.device) % output.shape[1]
    return F.cross_entropy(output, labels.view_as(output[:, 0]))


def fit(output: Any) -> Tensor:
    """Mean squared distance of every tensor in the output to fixed values, summed."""
    losses = []
    for leaf in leaves(output):
        target = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        losses.append(F.mse_loss(leaf, target.view_as(leaf)))
    return torch.stack(losses).sum()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 0, high: int = VOCABULARY) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def vectors() -> tuple[Tensor]:
    return (normal(BATCH, 6),)


def pictures() -> tuple[Tensor]:
    return (normal(BATCH, 2, 8, 8),)


def photos() -> tuple[Tensor]:
    return (normal(IMAGES, 3, 32, 32),)


def sequences() -> tuple[Tensor]:
    return (normal(BATCH, 5, 8),)


def sentences() -> tuple[Tensor]:
    return (tokens(BATCH, 5),)


def model(
    name: str,
    inputs: Callable[[], tuple | dict] = vectors,
    loss: Callable[[Any], Tensor] = classify,
    tags: str = "",
    into: dict[str, ZooModel] = MODELS,
    expect: str = "compiled",
) -> Callable[[Any], Any]:
    """Register a module class, or a function that builds a module, under `name`."""

    def register(build: Any) -> Any:
        assert name not in into, name
        into[name] = ZooModel(name, build, inputs, loss, frozenset(tags.split()), expect)
        return build

    return register


# Perceptrons


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


# Convolutions


def pooled(*modules: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        keep = before == after and stride == 1
        self.shortcut = nn.Identity() if keep else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


def stem(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


@model("small_resnet", pictures, tags="conv batchnorm residual in-place buffer")
def small_resnet() -> nn.Module:
    return pooled(*stem(4), BasicBlock(4, 4), BasicBlock(4, 8, stride=2), channels=8)


@model("frozen_stem", pictures, tags="conv batchnorm frozen in-place buffer")
def frozen_stem() -> nn.Module:
    frozen = nn.Sequential(*stem(4)).requires_grad_(False)
    return pooled(frozen, BasicBlock(4, 4), channels=4)


class Inception(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(before, 2, 1)
        self.two = nn.Sequential(nn.Conv2d(before, 2, 1), nn.SiLU(), nn.Conv2d(2, 4, 3, padding=1))
        self.three = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(before, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x), self.three(x)], 1).relu()


@model("inception", pictures, tags="conv batchnorm branches in-place buffer")
def inception() -> nn.Module:
    return pooled(*stem(4), Inception(4), nn.MaxPool2d(2), Inception(8), channels=8)


@model("norms", pictures, tags="conv groupnorm instancenorm layernorm buffer")
def norms() -> nn.Module:
    second = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    middle = [nn.Conv2d(4, 4, 3, stride=2), second, nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten()]
    first = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()]
    return nn.Sequential(*first, *middle, nn.LayerNorm(2), nn.Linear(2, CLASSES))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.shrink(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


@model("convnext", pictures, tags="conv groups layernorm residual")
def convnext() -> nn.Module:
    return pooled(nn.Conv2d(2, 6, 2, stride=2), ConvNeXtBlock(6), ConvNeXtBlock(6), channels=6)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        summary = self.squeeze(x.mean((2, 3), keepdim=True))
        return x * torch.sigmoid(self.excite(F.silu(summary)))


@model("squeeze_excite", pictures, tags="conv gating")
def squeeze_excite() -> nn.Module:
    return pooled(nn.Conv2d(2, 6, 3), SqueezeExcite(6), nn.Hardswish(), channels=6)


@model("audio", lambda: (normal(BATCH, 2, 40),), tags="conv batchnorm groups buffer")
def audio() -> nn.Module:
    first = [nn.Conv1d(2, 4, 5, stride=2), nn.BatchNorm1d(4), nn.LeakyReLU(0.1)]
    second = [nn.Conv1d(4, 8, 3, dilation=2, groups=2), nn.ELU(), nn.AdaptiveAvgPool1d(1)]
    return nn.Sequential(*first, nn.MaxPool1d(2), *second, nn.Flatten(), nn.Linear(8, CLASSES))


@model("unet", pictures, tags="conv skip batchnorm in-place buffer")
class UNet(nn.Module):
    """Logits for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Sequential(*stem(4)), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 8, 3, padding=1)
        self.up2, self.merge2 = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 6, 3, padding=1)
        self.up1, self.merge1 = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2)).relu()
        z = self.middle(F.avg_pool2d(two, 2)).relu()
        z = self.merge2(torch.cat([two, self.up2(z)], 1)).relu()
        return self.merge1(torch.cat([one, self.up1(z)], 1))


# torchvision (imported late: only these need it)


@model("resnet18", photos, tags="torchvision large conv batchnorm residual in-place buffer")
def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


@model("densenet", photos, tags="torchvision conv batchnorm branches in-place buffer")
def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=8, num_classes=10)


def small_googlenet(aux_logits: bool) -> nn.Module:
    from torchvision.models import GoogLeNet

    return GoogLeNet(num_classes=10, aux_logits=aux_logits, init_weights=False)


GOOGLENET = "torchvision large conv batchnorm branches random dropout in-place buffer"


@model("googlenet", photos, tags=GOOGLENET)
def googlenet() -> nn.Module:
    return small_googlenet(aux_logits=False)


def googlenet_loss(output: Any) -> Tensor:
    aux = classify(output.aux_logits1) + classify(output.aux_logits2)
    return classify(output.logits) + 0.3 * aux


@model("googlenet_aux", photos, googlenet_loss, GOOGLENET + " several-outputs")
def googlenet_aux() -> nn.Module:
    return small_googlenet(aux_logits=True)


@model("mobilenet_v2", photos, tags="torchvision conv batchnorm groups random dropout in-place buffer")
def mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=10, width_mult=0.25)


@model(
    "mobilenet_v3",
    photos,
    tags="torchvision large conv batchnorm groups gating random dropout in-place buffer",
)
def mobilenet_v3() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(num_classes=10)


@model("vit_torchvision", photos, tags="torchvision attention layernorm")
def vit_torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    result = VisionTransformer(32, 8, 2, 2, hidden_dim=8, mlp_dim=16, num_classes=10)
    nn.init.normal_(result.heads.head.weight, std=0.5)  # zero at first: no error would pass
    return result


# Attention


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = layers(width, 2 * width, width, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        thirds = self.qkv(self.norm1(x)).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in thirds)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@model("vit", pictures, tags="attention layernorm residual")
class VisionTransformer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(AttentionBlock(width), AttentionBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(z))[:, 0])


class Encoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


@model("transformer_encoder", sequences, tags="attention layernorm residual")
def transformer_encoder() -> nn.Module:
    return Encoder(dropout=0.0)


@model("transformer_dropout", sequences, tags="attention layernorm residual random dropout")
def transformer_dropout() -> nn.Module:
    return Encoder(dropout=0.2)


def next_token(logits: Tensor) -> Tensor:
    """Cross-entropy of each position's logits with the next token of the example input."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), sentences()[0][:, 1:].flatten())


LANGUAGE = "attention layernorm residual embedding shared"


@model("language_model", sentences, next_token, LANGUAGE)
class LanguageModel(nn.Module):
    """Decoder only; the head's weight is the embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(9, width)
        self.blocks = nn.Sequential(*[AttentionBlock(width, causal=True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        z = self.embedding(input_ids) + self.positions(place)
        return self.head(self.norm(self.blocks(z)))


@model(
    "language_model_loss",
    lambda: {"input_ids": tokens(BATCH, 5), "labels": tokens(BATCH, 5)},
    lambda output: output["loss"],
    LANGUAGE + " keywords several-outputs own-loss",
)
class LanguageModelWithLoss(LanguageModel):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(input_ids)
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


@model("attention_weights", sequences, fit, "attention several-outputs")
class AttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(x, x, x, need_weights=True)
        return self.head(mixed.mean(1)), weights


@model("embeddings", lambda: (tokens(BATCH, 5), tokens(BATCH, 7, seed=1)), tags="embedding several-inputs")
class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.bag = nn.EmbeddingBag(VOCABULARY, 6, mode="mean")
        self.head = nn.Linear(12, CLASSES)

    def forward(self, words: Tensor, bag: Tensor) -> Tensor:
        return self.head(torch.cat([torch.tanh(self.words(words)).mean(1), self.bag(bag)], 1))


# Recurrent nets


class Recurrent(nn.Module):
    """Classifies by the mean of all hidden states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cells = kind(8, 6, **options)
        self.head = nn.Linear(12 if self.cells.bidirectional else 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cells(x)
        return self.head(states.mean(1 if self.cells.batch_first else 0))


def time_first() -> tuple[Tensor]:
    return (normal(5, BATCH, 8),)


@model("lstm", sequences, tags="recurrent lstm")
def lstm() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=True)


@model("lstm_time_first", time_first, tags="recurrent lstm time-first")
def lstm_time_first() -> nn.Module:
    return Recurrent(nn.LSTM)


@model("lstm_bidirectional", sequences, tags="recurrent lstm")
def lstm_bidirectional() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2)


@model("gru", sequences, tags="recurrent gru")
def gru() -> nn.Module:
    return Recurrent(nn.GRU, batch_first=True)


@model("gru_time_first", time_first, tags="recurrent gru time-first")
def gru_time_first() -> nn.Module:
    return Recurrent(nn.GRU, bidirectional=True, num_layers=2)


@model("gru_unrolled", sequences, tags="recurrent gru shared")
class UnrolledGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)


# Graphs


def edges() -> Tensor:
    return tokens(2, 9, seed=2, high=5)


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(12, 5), nn.Linear(11, 6)
        self.head = nn.Linear(6, CLASSES)


@model("message_passing", lambda: (normal(7, 6), edges()), tags="graph gather shared several-inputs")
class MessagePassing(Messages):
    """Two rounds; nodes are rows, edges the columns of `edge_index`."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, sink = edge_index[0], edge_index[1]
        for _ in range(2):
            messages = self.message(torch.cat([x[source], x[sink]], 1)).relu()
            received = x.new_zeros(x.shape[0], 5).index_add(0, sink, messages)
            x = torch.tanh(self.update(torch.cat([x, received], 1)))
        return self.head(x)


@model("message_passing_batch", lambda: (normal(BATCH, 5, 6), edges()), tags="gather several-inputs")
class BatchedMessagePassing(Messages):
    """The same edges for every sample; one label a sample."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, sink = edge_index[0], edge_index[1]
        ends = [x.index_select(1, source), x.index_select(1, sink)]
        messages = self.message(torch.cat(ends, 2)).relu()
        index = sink[None, :, None].expand_as(messages)
        received = torch.zeros_like(x[..., :5]).scatter_add(1, index, messages)
        return self.head(torch.tanh(self.update(torch.cat([x, received], 2))).mean(1))


# Hard: what happens depends on the data, on Python state or on reassigned buffers


def hard(name: str, expect: str, tags: str = "") -> Callable[[Any], Any]:
    return model(name, tags=tags, into=HARD, expect=expect)


def around(middle: nn.Module) -> nn.Module:
    """An MLP with the hard module in its middle, so that only `1` need be opaque."""
    return nn.Sequential(nn.Linear(6, 6), middle, nn.Tanh(), nn.Linear(6, CLASSES))


class Branch(Layered):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return torch.tanh(self.first(x))
        return torch.sigmoid(self.second(x))


@hard("branch_in_block", "opaque")
def branch_in_block() -> nn.Module:
    middle = Branch()
    del middle.head
    return around(middle)


@hard("branch_at_root", "either")
class BranchAtRoot(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class TopOneExperts(nn.Module):
    """Each row goes through its best expert only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList([layers(6, 5, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(1).max(1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = choice == index
            if rows.any():
                result[rows] = weight[rows, None] * expert(x[rows])
        return result


@hard("top_one_experts", "opaque")
def top_one_experts() -> nn.Module:
    return around(TopOneExperts())


class ItemScale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs().max().item())


@hard("item", "either")
def item() -> nn.Module:
    return around(ItemScale())


@hard("skip_python", "refused", "random")
class SkipPython(Layered):
    """Layer skipping by Python's own random numbers, which tracing would freeze."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if random.random() < 0.5:
                x = torch.tanh(layer(x))
        return self.head(x)


@hard("skip_torch", "either", "random")
class SkipTorch(Layered):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if torch.rand(()) < 0.5:
                x = torch.tanh(layer(x))
        return self.head(x)


@hard("reassigned_buffer", "either", "buffer")
class ReassignedBuffer(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        return self.head(torch.tanh(self.second(z - self.mean)))


@hard("gradient_inside", "either")
class GradientInside(Layered):
    """The output is a derivative that autograd takes inside the forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = torch.tanh(self.second(torch.tanh(self.first(x)))).square().sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.head(slope)


# Bad: nothing to learn from


def bad(name: str, inputs: Callable[[], tuple]) -> Callable[[Any], Any]:
    return model(name, inputs, fit, into=BAD, expect="refused")


@bad("integer_only", sentences)
class IntegerOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(VOCABULARY).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[x] * 2


@bad("class_output", vectors)
class ClassOutput(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))).argmax(1)


@bad("boolean_output", vectors)
class BooleanOutput(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) > 0
