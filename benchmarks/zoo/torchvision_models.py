"""torchvision's models, one of every family: classification, segmentation, detection backbones, video, optical flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case

# name -> image size; the smallest at which the family runs in training mode with a batch of 2
CLASSIFICATION = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 64, "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "regnet_x_400mf": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnet50": 64,
    "resnext50_32x4d": 64, "wide_resnet50_2": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_0": 64, "swin_t": 64,
    "swin_v2_t": 64, "vgg11": 32, "vgg11_bn": 64, "vit_b_16": 32,
}  # fmt: skip
SEGMENTATION = {
    "segmentation.deeplabv3_mobilenet_v3_large": 64,
    "segmentation.deeplabv3_resnet50": 64,
    "segmentation.fcn_resnet50": 64,
    "segmentation.lraspp_mobilenet_v3_large": 64,
}
# name -> frames, height and width
VIDEO = {
    "video.mc3_18": (4, 32), "video.r2plus1d_18": (4, 32), "video.r3d_18": (4, 32), "video.s3d": (16, 224),
    "video.mvit_v1_b": (4, 64), "video.mvit_v2_s": (4, 64), "video.swin3d_t": (4, 64),
}  # fmt: skip
OPTIONS = {
    "vit_b_16": {"image_size": 32},
    "inception_v3": {"init_weights": True},
    "googlenet": {"init_weights": True},
}


def cases() -> list[Case]:
    found = [Case("torchvision", name, partial(_named, name), partial(_images, 2, size))
             for name, size in (CLASSIFICATION | SEGMENTATION).items()]  # fmt: skip
    found += [Case("torchvision", name, partial(_mvit if "mvit" in name else _named, name), partial(_clips, 2, *size))
              for name, size in VIDEO.items()]  # fmt: skip
    for name, (make, size) in DETECTION.items():
        found.append(Case("torchvision", f"detection.{name}", make, partial(_images, 2, size)))
    found.append(Case("torchvision", "optical_flow.raft_small", partial(_named, "optical_flow.raft_small"), _frames))
    return found


def _named(name: str) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {"num_classes": 10} if "optical_flow" not in name else {}
    if "segmentation" in name:
        options["weights_backbone"] = None
    make: Any = torchvision.models
    for part in name.split("."):
        make = getattr(make, part)
    return make(weights=None, **options, **OPTIONS.get(name, {}))


def _mvit(name: str) -> nn.Module:
    """For clips of 4 frames of 64x64; torchvision's builders fix 16 frames of 224x224."""
    from torchvision.models.video import mvit

    build = mvit._mvit
    small = lambda *args, **given: build(*args, **given | {"spatial_size": (64, 64), "temporal_size": 4})  # noqa: E731
    with mock.patch.object(mvit, "_mvit", small):
        return _named(name)


def _resnet_fpn() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d)


def _mobilenet_fpn() -> nn.Module:
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    return mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6, norm_layer=nn.BatchNorm2d
    )


def _ssd() -> nn.Module:
    from torchvision.models.detection import ssd300_vgg16

    return ssd300_vgg16(weights=None, weights_backbone=None, num_classes=10).backbone


def _ssdlite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=10).backbone


class RetinaNetHead(nn.Module):
    """RetinaNet without its anchors and losses: backbone, pyramid and head."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection.retinanet import RetinaNetHead as Head

        self.backbone = _resnet_fpn()
        self.head = Head(256, num_anchors=3, num_classes=10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


DETECTION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18_fpn": (_resnet_fpn, 64),
    "mobilenet_v3_large_fpn": (_mobilenet_fpn, 64),
    "ssd300_vgg16_backbone": (_ssd, 300),
    "ssdlite320_backbone": (_ssdlite, 320),
    "retinanet_resnet18": (RetinaNetHead, 64),
}


def _images(batch: int, size: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


def _clips(batch: int, frames: int, size: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, frames, size, size),)


def _frames() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)
