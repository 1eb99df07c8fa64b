"""The models that speed and memory are measured on, with their inputs and labels."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from graphlocal.demo import SmallResNet
from graphlocal.rules import RecLRA
from graphlocal.torchvision_operators import declare_operators

VOCABULARY = 50257
BIOTORCH = "biotorch, feedback alignment"


def loss_fn(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of classes, or of tokens."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Case:
    """A model, its inputs' shape without the batch, and the batch.

    tokens: the inputs are integers below this number, and the labels too; 0 for float inputs and `classes` labels.
    blocks: names of the classes of its blocks, which gradient checkpointing works on; a Sequential needs none.
    """

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    classes: int = 10
    tokens: int = 0
    blocks: tuple[str, ...] = ()

    def example(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        if self.tokens:
            x = torch.randint(self.tokens, (self.batch, *self.shape), device=device)
            return x, x.roll(-1, 1)
        x = torch.randn(self.batch, *self.shape, device=device, dtype=dtype)
        return x, torch.randint(self.classes, (self.batch,), device=device)


def mlp(width: int, depth: int, inputs: int) -> nn.Module:
    """`depth` hidden layers of tanh units."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Encoder(nn.Module):
    """A transformer encoder over 64 tokens, with a class head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 3, 768, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class DecoderBlock(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Decoder(nn.Module):
    """A language model of GPT-2's shape (small: 12 blocks of width 768, 12 heads), embeddings tied to the head."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, context: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList([DecoderBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def resnet(name: str) -> nn.Module:
    """A residual net of torchvision."""
    return _torchvision().resnet.__dict__[name](num_classes=10)


def vit_small() -> nn.Module:
    """ViT-S/16."""
    made: nn.Module = _torchvision().VisionTransformer(224, 16, 12, 6, 384, 1536, num_classes=10)
    nn.init.normal_(made.heads.head.weight, std=0.02)  # type: ignore[union-attr]
    return made


def _torchvision() -> object:
    """torchvision's models."""
    declare_operators()
    import torchvision

    return torchvision.models


SMALL = (
    Case("one layer 64-10", lambda: mlp(64, 0, 64), (64,), 32),
    Case("MLP 64-64-10", lambda: mlp(64, 1, 64), (64,), 32),
    Case("MLP 64-128-128-10", lambda: mlp(128, 2, 64), (64,), 32),
    Case("MLP 64×128 (deep, thin)", lambda: mlp(128, 64, 64), (64,), 32),
    Case("MLP 8×1024", lambda: mlp(1024, 8, 784), (784,), 128),
    Case("small ResNet on 8×8", SmallResNet, (1, 8, 8), 32, blocks=("ResidualBlock",)),
    Case("small ResNet on 8×8", SmallResNet, (1, 8, 8), 256, blocks=("ResidualBlock",)),
    Case("transformer encoder 6×192, 64 tokens", Encoder, (64, 192), 16, blocks=("TransformerEncoderLayer",)),
)
LARGE = (
    Case("ResNet-18, 64×64", lambda: resnet("resnet18"), (3, 64, 64), 16, blocks=("BasicBlock",)),
    Case("ResNet-50, 64×64", lambda: resnet("resnet50"), (3, 64, 64), 8, blocks=("Bottleneck",)),
    Case("ViT-S, 224×224", vit_small, (3, 224, 224), 2, blocks=("EncoderBlock",)),
    Case("decoder of GPT-2 small, 256 tokens", Decoder, (256,), 2, tokens=VOCABULARY, blocks=("DecoderBlock",)),
)
"""Batches for a CPU; on a GPU, `on_gpu` makes them larger."""
SPARSE = RecLRA(feedback_fan_in=1)
"""rec-LRA with a sparse E: each feature reads one of the source's."""


def on_gpu(case: Case) -> Case:
    """A case with a batch that fills a GPU."""
    from dataclasses import replace

    larger = {"ResNet-18, 64×64": 256, "ResNet-50, 64×64": 256, "ViT-S, 224×224": 64}
    if case.tokens:
        return replace(case, title="decoder of GPT-2 small, 512 tokens", shape=(512,), batch=8)
    return replace(case, batch=larger.get(case.title, case.batch))


class _InSegments(nn.Module):
    """A Sequential in about as many checkpointed segments as each has layers."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        count = max(1, round(math.sqrt(len(self.layers) / 2)))
        found: Tensor = checkpoint_sequential(self.layers, count, x, use_reentrant=False)
        return found


def checkpointed(case: Case, model: nn.Module) -> nn.Module:
    """The model with gradient checkpointing on its blocks."""
    if isinstance(model, nn.Sequential):
        return _InSegments(model)
    for block in model.modules():
        if type(block).__name__ in case.blocks:
            setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))  # noqa: B010
    return model


def compiled(model: nn.Module, **options: bool) -> nn.Module:
    """The model by torch.compile for the shapes it is called with, as target="inductor" compiles; options: inductor's.

    Left alone, dynamo takes all modules of a process for one function, and compiles those after the first for dynamic
    shapes where their inputs differ. It also gives up after eight: `torch.compiler.reset()` between models.
    """
    made: nn.Module = torch.compile(model, dynamic=False, options=options or None)  # type: ignore[assignment, arg-type]
    return made


def by_biotorch(
    title: str, model: nn.Module, train: Callable[[nn.Module], Callable[[], object]]
) -> dict[str, nn.Module]:
    """biotorch's feedback alignment of a model by the way's name, or nothing where it can't be imported or fails.

    train: makes a training step of a model; one is run here, since some layers fail only then.
    """
    if importlib.util.find_spec("biotorch") is None:
        return {}
    from biotorch.module.biomodule import BioModule

    example = next(model.parameters())
    with contextlib.redirect_stdout(sys.stderr):
        made: nn.Module = BioModule(model, mode="fa").to(example.device, example.dtype)
    try:
        train(made)()
    except RuntimeError as error:  # of its linear layers, which take matrices only
        print(f"{title}: biotorch fails: {error}", file=sys.stderr)
        return {}
    return {BIOTORCH: made}
