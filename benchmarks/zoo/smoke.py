"""The twenty models of `make zoo-smoke`: one of each kind, small."""

from __future__ import annotations

SMOKE = ("torchvision/resnet18",)
