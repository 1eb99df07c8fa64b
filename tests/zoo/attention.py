"""Nets with attention or embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.perceptrons import layers
from zoo.registry import BATCH, CLASSES, VOCABULARY, fit, model, pictures, sentences, sequences, tokens


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
