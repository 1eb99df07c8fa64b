"""timm's models, one of every family: of every module of timm that registers models, its smallest.
timm's own test fixtures (`test_*`) do not count.

The image size is the smallest of 32, 64, ... at which the model trains on a batch of 2. Six families whose smallest
model is far larger than the others' are cut to a depth of 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case

# (model, image size, options)
MODELS: tuple[tuple[str, int, dict[str, int]], ...] = (
    ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 3}),
    ("halonet_h1", 256, {}),
    ("mobileone_s1", 32, {}),
    ("cait_xxs24_224", 32, {"img_size": 32}),
    ("coat_tiny", 32, {"img_size": 32}),
    ("convit_tiny", 32, {"img_size": 32}),
    ("convmixer_768_32", 32, {}),
    ("convnext_zepto_rms", 32, {}),
    ("cpubone_nano", 32, {}),
    ("crossvit_tiny_240", 32, {}),
    ("csatv2", 64, {}),
    ("cs3darknet_focus_s", 32, {}),
    ("cspnext_tiny", 32, {}),
    ("davit_tiny", 32, {}),
    ("deepseek_vit_412m", 112, {"depth": 3}),
    ("deit_tiny_patch16_224", 32, {"img_size": 32}),
    ("densenet121", 32, {}),
    ("dla46x_c", 32, {}),
    ("dpn48b", 32, {}),
    ("edgenext_xx_small", 32, {}),
    ("efficientformer_l1", 224, {}),
    ("efficientformerv2_s0", 32, {"img_size": 32}),
    ("mobilenetv2_035", 32, {}),
    ("efficientvim_m1", 32, {}),
    ("efficientvit_b0", 32, {}),
    ("efficientvit_m0", 32, {}),
    ("vit_tiny_patch16_dinov3_qkvb", 32, {}),
    ("fasternet_t0", 32, {}),
    ("fastvit_t8", 32, {}),
    ("focalnet_tiny_srf", 32, {}),
    ("gcvit_xxtiny", 32, {"img_size": 32}),
    ("gemma4_vit_167m_enc", 96, {"depth": 3}),
    ("ghostnet_050", 32, {}),
    ("hardcorenas_b", 32, {}),
    ("hgnetv2_b0", 32, {}),
    ("hiera_tiny_224", 32, {"img_size": 32}),
    ("sam2_hiera_tiny", 32, {}),
    ("hrnet_w18_small", 32, {}),
    ("iformer_t", 32, {}),
    ("inception_next_atto", 32, {}),
    ("inception_resnet_v2", 96, {}),
    ("inception_v3", 96, {}),
    ("inception_v4", 96, {}),
    ("lcnetv2_small", 32, {}),
    ("levit_128s", 32, {"img_size": 32}),
    ("lowformer_b0", 32, {}),
    ("mambaout_femto", 32, {}),
    ("maxvit_pico_rw_256", 32, {"img_size": 32}),
    ("poolformerv2_s12", 32, {}),
    ("gmlp_ti16_224", 32, {"img_size": 32}),
    ("lcnet_035", 32, {}),
    ("mobilenetv5_base", 32, {}),
    ("mobilevit_xxs", 32, {}),
    ("mvitv2_tiny", 32, {}),
    ("naflexvit_base_patch16_parfac_gap", 32, {"depth": 3}),
    ("nasnetalarge", 32, {}),
    ("nest_tiny", 32, {"img_size": 32}),
    ("nextvit_small", 32, {}),
    ("nf_regnet_b0", 32, {}),
    ("pit_ti_224", 32, {"img_size": 32}),
    ("pnasnet5large", 32, {}),
    ("pvt_v2_b0", 32, {}),
    ("qwen3_vit_88m", 32, {"depth": 3}),
    ("rdnet_tiny", 32, {}),
    ("regnetx_002", 32, {}),
    ("repghostnet_050", 32, {}),
    ("repvit_m1", 32, {}),
    ("res2next50", 32, {}),
    ("resnest14d", 32, {}),
    ("resnet10t", 32, {}),
    ("resnetv2_18", 32, {}),
    ("rexnet_100", 32, {}),
    ("selecsls42", 32, {}),
    ("legacy_seresnet18", 32, {}),
    ("sequencer2d_s", 32, {}),
    ("shvit_s1", 32, {}),
    ("skresnet18", 32, {}),
    ("starnet_s050", 32, {}),
    ("swiftformer_xs", 32, {}),
    ("swin_tiny_patch4_window7_224", 32, {"img_size": 32}),
    ("swinv2_tiny_window8_256", 32, {"img_size": 32}),
    ("swinv2_cr_tiny_224", 32, {"img_size": 32}),
    ("tiny_vit_5m_224", 32, {}),
    ("tnt_s_legacy_patch16_224", 32, {"img_size": 32}),
    ("tresnet_m", 32, {}),
    ("twins_svt_small", 32, {}),
    ("vgg11", 32, {}),
    ("visformer_tiny", 32, {"img_size": 32}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32}),
    ("vit_tiny_r_s16_p8_224", 32, {"img_size": 32}),
    ("vit_srelpos_small_patch16_224", 32, {"img_size": 32}),
    ("samvit_base_patch16_224", 32, {"depth": 3}),
    ("vitamin_small_224", 32, {"img_size": 32}),
    ("volo_d1_224", 32, {"img_size": 32}),
    ("ese_vovnet19b_slim_dw", 32, {}),
    ("legacy_xception", 32, {}),
    ("xception41p", 32, {}),
    ("xcit_nano_12_p8_224", 32, {}),
)


def cases() -> list[Case]:
    return [Case("timm", name, partial(_model, name, options), partial(_images, size))
            for name, size, options in MODELS]  # fmt: skip


def _model(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def _images(size: int) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size),)
