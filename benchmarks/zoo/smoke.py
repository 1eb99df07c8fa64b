"""The twenty models of `make zoo-smoke`: small ones of many kinds, and of every way to be traced."""

from __future__ import annotations

SMOKE = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/segmentation.lraspp_mobilenet_v3_large",
    "timm/convnext_zepto_rms",
    "timm/ghostnet_050",
    "timm/convit_tiny",  # opaque leaves
    "transformers/bert",
    "transformers/gpt2",
    "transformers/llama",
    "transformers/t5",
    "transformers/swin",
    "transformers/whisper",
    "transformers/clip",
    "transformers/mamba",
    "transformers/mixtral",
    "hand-written/unet",
    "hand-written/gru_unrolled",
    "hand-written/message_passing",
    "hand-written/top_one_experts",  # an opaque leaf
    "hand-written/branch_at_root",  # a recording
)
