"""Convolutional nets, the torchvision ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.registry import BATCH, CLASSES, classify, model, normal, photos, pictures


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
