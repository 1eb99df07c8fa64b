"""transformers' models as tiny random configurations: encoders, decoders, encoder-decoders, vision, audio and more.

What skips layers or masks inputs by Python's or NumPy's random numbers (layerdrop, SpecAugment) is off: that is another
question than whether the architecture compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case

WORDS, BATCH, LENGTH, IMAGE = 99, 2, 8, 32
Inputs = Callable[[], dict[str, Tensor]]

TEXT = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}  # fmt: skip
DECODER = TEXT | {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = DECODER | {"num_key_value_heads": 2}
GPT = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
PAIR = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
        "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "use_cache": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "image_size": IMAGE, "patch_size": 8}  # fmt: skip
AUDIO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
         "apply_spec_augment": False, "vocab_size": WORDS}  # fmt: skip
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": 4, "kv_lora_rank": 8,
                    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                    "first_k_dense_replace": 1, "topk_group": 1}  # fmt: skip
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "use_cache": False,
      "decoder_start_token_id": 0}  # fmt: skip
CLIP_TEXT = DECODER | {"eos_token_id": 98}
SERIES = {key: PAIR[key] for key in PAIR if key.startswith(("encoder_", "decoder_")) and not key.endswith("_id")} | {
    "d_model": 32, "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 7], "num_time_features": 1,
    "use_cache": False}  # fmt: skip
DETECTOR = {key: SERIES[key] for key in SERIES if key.startswith(("encoder_", "decoder_", "d_model"))}
PICTURE = 98
"""The word that stands for one patch of the picture."""


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, WORDS, (BATCH, LENGTH))}


def masked() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, -2:] = 0
    return tokens() | {"attention_mask": mask}


def answer() -> dict[str, Tensor]:
    return {"decoder_input_ids": torch.randint(3, WORDS, (BATCH, 6))}


def pair() -> dict[str, Tensor]:
    return tokens() | answer()


def images(size: int = IMAGE) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def captioned(size: int = IMAGE) -> dict[str, Tensor]:
    return masked() | images(size)


def waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 800)}


def videos() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 2, 3, IMAGE, IMAGE)}


def illustrated(patches: int) -> dict[str, Tensor]:
    words = torch.randint(3, PICTURE, (BATCH, LENGTH))
    return {"input_ids": torch.cat([torch.full((BATCH, patches), PICTURE), words], 1)} | images()


def series() -> dict[str, Tensor]:
    past, future = 15, 4  # the context and the longest lag; the prediction
    return {"past_values": torch.randn(BATCH, past), "past_time_features": torch.randn(BATCH, past, 1),
            "past_observed_mask": torch.ones(BATCH, past), "future_values": torch.randn(BATCH, future),
            "future_time_features": torch.randn(BATCH, future, 1)}  # fmt: skip


def trajectories() -> dict[str, Tensor]:
    widths = {"states": 3, "actions": 2, "rewards": 1, "returns_to_go": 1}
    return {name: torch.randn(BATCH, 5, width) for name, width in widths.items()} | {
        "timesteps": torch.arange(5).repeat(BATCH, 1), "attention_mask": torch.ones(BATCH, 5)}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """config, model: transformers' class names. options: of the config."""

    config: str
    model: str
    options: dict[str, Any]
    inputs: Inputs = masked

    def make(self) -> nn.Module:
        import transformers

        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options))


def _named(stem: str, options: dict[str, Any], inputs: Inputs = masked, head: str = "Model") -> Architecture:
    return Architecture(f"{stem}Config", f"{stem}{head}", options, inputs)


LM = "ForCausalLM"
ENCODERS = {
    "bert": _named("Bert", TEXT),
    "bert-classifier": _named("Bert", TEXT | {"num_labels": 3}, head="ForSequenceClassification"),
    "roberta": _named("Roberta", TEXT | {"pad_token_id": 1}, tokens),
    "distilbert": _named("DistilBert", {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "albert": _named("Albert", TEXT | {"embedding_size": 16}),
    "electra": _named("Electra", TEXT | {"embedding_size": 16}),
    "deberta-v2": _named(
        "DebertaV2", TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    ),
    "mpnet": _named("MPNet", TEXT | {"pad_token_id": 1}, tokens),
    "modernbert": _named("ModernBert", TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
    "convbert": _named("ConvBert", TEXT | {"embedding_size": 32, "head_ratio": 2}),
    "fnet": _named("FNet", TEXT | {"tpu_short_seq_length": 8}, tokens),
    "squeezebert": _named("SqueezeBert", TEXT | {"embedding_size": 32}),
    "megatron-bert": _named("MegatronBert", TEXT),
    "xlnet": _named(
        "XLNet", {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "use_mems_train": False}
    ),
    "longformer": _named("Longformer", TEXT | {"attention_window": 4, "pad_token_id": 1}, tokens),
    "funnel": _named("Funnel", {"vocab_size": WORDS, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32,
                                "n_head": 4, "d_head": 8, "d_inner": 64}),
    "big-bird": _named("BigBird", TEXT | {"attention_type": "original_full"}),
    "roformer": _named("RoFormer", TEXT | {"embedding_size": 32}),
    "mobilebert": _named("MobileBert", TEXT | {"embedding_size": 32, "intra_bottleneck_size": 16,
                                               "true_hidden_size": 16}),
    "rembert": _named("RemBert", TEXT | {"input_embedding_size": 16, "output_embedding_size": 16}),
    "esm": _named("Esm", TEXT | {"position_embedding_type": "rotary", "mask_token_id": 98, "pad_token_id": 1}, tokens),
    "canine": _named("Canine", TEXT | {"num_hash_buckets": 32, "local_transformer_stride": 8}),
    "perceiver": _named("Perceiver", {"d_latents": 32, "num_latents": 4, "d_model": 32, "num_blocks": 1,
                                      "num_self_attends_per_block": 1, "num_self_attention_heads": 4,
                                      "num_cross_attention_heads": 4},
                        lambda: {"inputs": torch.randn(BATCH, LENGTH, 32)}),
}  # fmt: skip
DECODERS = {
    "gpt2": _named("GPT2", GPT, head="LMHeadModel"),
    "gpt-neox": _named("GPTNeoX", DECODER, head=LM),
    "gptj": _named("GPTJ", GPT | {"rotary_dim": 4}, head=LM),
    "gpt-neo": _named(
        "GPTNeo",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
            "use_cache": False,
        },
        head=LM,
    ),
    "opt": _named("OPT", DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.0}, head=LM),
    "llama": _named("Llama", GROUPED, head=LM),
    "mistral": _named("Mistral", GROUPED | {"sliding_window": 4}, head=LM),
    "qwen2": _named("Qwen2", GROUPED, head=LM),
    "qwen3": _named("Qwen3", GROUPED | {"head_dim": 8}, head=LM),
    "gemma2": _named("Gemma2", GROUPED | {"head_dim": 8, "sliding_window": 4}, head=LM),
    "gemma3": Architecture("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "phi": _named("Phi", DECODER, head=LM),
    "phi3": _named("Phi3", GROUPED, head=LM),
    "falcon": _named("Falcon", DECODER, head=LM),
    "bloom": _named(
        "Bloom", {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}, head=LM
    ),
    "mpt": _named(
        "Mpt",
        {"vocab_size": WORDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32, "use_cache": False},
        head=LM,
    ),
    "olmo2": _named("Olmo2", GROUPED, head=LM),
    "stablelm": _named("StableLm", GROUPED, head=LM),
    "starcoder2": _named("Starcoder2", GROUPED, head=LM),
    "cohere": _named("Cohere", GROUPED, head=LM),
    "glm": _named("Glm", GROUPED | {"head_dim": 8}, head=LM),
    "granite": _named("Granite", GROUPED, head=LM),
    "gpt-bigcode": _named("GPTBigCode", GPT, head=LM),
    "codegen": _named("CodeGen", GPT | {"rotary_dim": 4}, head=LM),
    "biogpt": _named("BioGpt", DECODER | {"layerdrop": 0.0}, head=LM),
    "gemma": _named("Gemma", GROUPED | {"head_dim": 8}, head=LM),
    "cohere2": _named("Cohere2", GROUPED | {"sliding_window": 4}, head=LM),
    "nemotron": _named("Nemotron", GROUPED, head=LM),
    "persimmon": _named("Persimmon", DECODER, head=LM),
    "lfm2": _named("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, head=LM),
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": _named("T5", {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                        "use_cache": False, "decoder_start_token_id": 0}, pair, "ForConditionalGeneration"),
    "bart": _named("Bart", PAIR, pair),
    "mbart": _named("MBart", PAIR, pair),
    "pegasus": _named("Pegasus", PAIR, pair),
    "marian": _named("Marian", PAIR, pair),
    "m2m-100": _named("M2M100", PAIR, pair),
    "blenderbot": _named("Blenderbot", PAIR, pair),
    "longt5": _named("LongT5", T5 | {"local_radius": 3}, pair),
    "umt5": _named("UMT5", T5, pair),
    "led": _named("LED", PAIR | {"attention_window": 4, "max_encoder_position_embeddings": 32,
                                 "max_decoder_position_embeddings": 32}, pair),
    "pegasus-x": _named("PegasusX", PAIR | {"num_global_tokens": 2, "block_size": 4}, pair),
    "prophetnet": _named("ProphetNet", {
        "vocab_size": WORDS, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_encoder_layers": 2,
        "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
        "max_position_embeddings": 32, "relative_max_distance": 8, "num_buckets": 4, "use_cache": False}, pair),
}  # fmt: skip
VISION_MODELS = {
    "vit": _named("ViT", VISION, images),
    "deit": _named("DeiT", VISION, images),
    "beit": _named("Beit", VISION | {"out_indices": [0, 1], "drop_path_rate": 0.0}, images),
    "dinov2": _named("Dinov2", VISION, images),
    "swin": _named("Swin", {"image_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 2],
                            "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}, images),
    "swinv2": _named("Swinv2", {"image_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 2],
                                "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}, images),
    "convnext": _named("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, images),
    "convnextv2": _named("ConvNextV2", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, images),
    "segformer": _named("Segformer", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "drop_path_rate": 0.0,
                                      "num_attention_heads": [1, 2, 2, 4], "num_labels": 5,
                                      "decoder_hidden_size": 16}, partial(images, 64), "ForSemanticSegmentation"),
    "mobilevit": _named("MobileViT", {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
                                      "num_attention_heads": 2, "image_size": 64}, partial(images, 64)),
    "resnet": _named("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
                     partial(images, 64)),
    "regnet": _named("RegNet", {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1],
                                "groups_width": 4}, partial(images, 64)),
    "poolformer": _named("PoolFormer", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
                                        "drop_path_rate": 0.0}, partial(images, 64)),
    "pvt": _named("Pvt", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64,
                          "num_attention_heads": [1, 2, 2, 4], "drop_path_rate": 0.0}, partial(images, 64)),
    "vit-msn": _named("ViTMSN", VISION, images),
    "efficientnet": _named("EfficientNet", {"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 64,
                                            "hidden_dim": 320, "drop_connect_rate": 0.0}, partial(images, 64)),
    "levit": _named("Levit", {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 4],
                              "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, partial(images, 64)),
    "cvt": _named("Cvt", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}, partial(images, 64)),
    "dinov3": _named("DINOv3ViT", VISION | {"num_register_tokens": 2}, images),
    "dpt": _named("DPT", VISION | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
                                   "fusion_hidden_size": 16, "neck_hidden_sizes": [8, 8, 16, 16], "num_labels": 5},
                  images, "ForSemanticSegmentation"),
    "detr": _named("Detr", DETECTOR | {"num_queries": 4, "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
        "out_features": ["stage4"]}}, partial(images, 64), "ForObjectDetection"),
    "yolos": _named("Yolos", VISION | {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 4}, images,
                    "ForObjectDetection"),
    "focalnet": _named("FocalNet", {"image_size": IMAGE, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                                    "focal_levels": [2, 2], "focal_windows": [3, 3]}, images),
    "hiera": _named("Hiera", {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1],
                              "num_heads": [1, 2, 4, 8]}, partial(images, 64)),
    "mobilenet-v2": _named("MobileNetV2", {"depth_multiplier": 0.25, "image_size": 64}, partial(images, 64)),
    "swiftformer": _named("SwiftFormer", {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]},
                          partial(images, 64)),
    "swin2sr": _named("Swin2SR", {"image_size": 16, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                                  "window_size": 4}, partial(images, 16), "ForImageSuperResolution"),
    "vit-mae": _named("ViTMAE", VISION | {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
                                          "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
                      images, "ForPreTraining"),
    "timesformer": _named("Timesformer", VISION | {"num_frames": 2}, videos),
    "videomae": _named("VideoMAE", VISION | {"num_frames": 2, "tubelet_size": 2}, videos),
}  # fmt: skip
AUDIO_MODELS = {
    "wav2vec2": _named("Wav2Vec2", AUDIO, waves),
    "hubert": _named("Hubert", AUDIO, waves),
    "wavlm": _named("WavLM", AUDIO | {"num_buckets": 8}, waves),
    "whisper": _named("Whisper", PAIR | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16},
                      lambda: {"input_features": torch.randn(BATCH, 16, 32)} | answer()),
    "audio-spectrogram-transformer": _named("AST", TEXT | {"patch_size": 8, "max_length": 40, "num_mel_bins": 32},
                                            lambda: {"input_values": torch.randn(BATCH, 40, 32)}),
    "sew": _named("SEW", AUDIO, waves),
    "data2vec-audio": _named("Data2VecAudio", AUDIO | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3,
                                                       "mask_time_prob": 0.0}, waves),
    "wav2vec2-conformer": _named("Wav2Vec2Conformer", AUDIO, waves),
    "speech-to-text": _named("Speech2Text", PAIR | {
        "conv_kernel_sizes": (3, 3), "conv_channels": 32, "input_feat_per_channel": 16, "max_source_positions": 32,
        "max_target_positions": 16}, lambda: {"input_features": torch.randn(BATCH, 32, 16)} | answer()),
    "encodec": _named("Encodec", {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "num_lstm_layers": 1,
                                  "upsampling_ratios": [4, 2], "target_bandwidths": [24.0]},
                      lambda: {"input_values": torch.randn(BATCH, 1, 160)}),
}  # fmt: skip
OTHERS = {
    "clip": _named("CLIP", {"text_config": DECODER | {"eos_token_id": 98}, "vision_config": VISION,
                            "projection_dim": 16}, captioned),
    "siglip": _named("Siglip", {"text_config": TEXT, "vision_config": VISION}, lambda: tokens() | images()),
    "vilt": _named("Vilt", TEXT | {"image_size": IMAGE, "patch_size": 8, "max_image_length": -1}, captioned),
    "blip": _named("Blip", {"text_config": TEXT | {"encoder_hidden_size": 32}, "vision_config": VISION,
                            "projection_dim": 16}, captioned),
    "mamba": _named("Mamba", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
                              "use_cache": False}, tokens, LM),
    "mamba2": _named("Mamba2", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
                                "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4, "use_cache": False},
                     tokens, LM),
    "rwkv": _named("Rwkv", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
                            "intermediate_size": 64, "context_length": 32, "use_cache": False}, tokens, LM),
    "mixtral": _named("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, head=LM),
    "qwen2-moe": _named("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 32}, head=LM),
    "olmoe": _named("Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}, head=LM),
    "switch-transformers": _named("SwitchTransformers", {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_heads": 4, "num_experts": 2,
        "expert_capacity": 16, "use_cache": False, "decoder_start_token_id": 0}, pair),
    "patchtst": _named("PatchTST", {"num_input_channels": 3, "context_length": 16, "patch_length": 4,
                                    "patch_stride": 4, "d_model": 16, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "ffn_dim": 32, "prediction_length": 4},
                       lambda: {"past_values": torch.randn(BATCH, 16, 3)}, "ForPrediction"),
    "layoutlm": _named("LayoutLM", TEXT,
                       lambda: tokens() | {"bbox": torch.randint(0, 100, (BATCH, LENGTH, 4)).sort()[0]}),
    "chinese-clip": _named("ChineseCLIP", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
                           captioned),
    "altclip": _named("AltCLIP", {"text_config": TEXT | {"project_dim": 16, "pad_token_id": 1},
                                  "vision_config": VISION, "projection_dim": 16}, captioned),
    "owlvit": _named("OwlViT", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}, captioned),
    "clipseg": _named("CLIPSeg", {
        "text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 32, "extract_layers": [0, 1],
        "reduce_dim": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}, captioned,
        "ForImageSegmentation"),
    "llava": _named("Llava", {
        "text_config": GROUPED | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": PICTURE, "vision_feature_layer": -1}, partial(illustrated, 16),
        "ForConditionalGeneration"),
    "paligemma": _named("PaliGemma", {
        "text_config": GROUPED | {"model_type": "gemma", "head_dim": 8}, "image_token_index": PICTURE,
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "projection_dim": 32}, partial(illustrated, 16), "ForConditionalGeneration"),
    "blip-2": _named("Blip2", {
        "vision_config": VISION, "qformer_config": TEXT | {"encoder_hidden_size": 32}, "num_query_tokens": 4,
        "text_config": DECODER | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.0},
        "image_token_index": PICTURE}, partial(illustrated, 4), "ForConditionalGeneration"),
    "git": _named("Git", DECODER | {"vision_config": VISION}, captioned, LM),
    "visual-bert": _named("VisualBert", TEXT | {"visual_embedding_dim": 16},
                          lambda: tokens() | {"visual_embeds": torch.randn(BATCH, 4, 16)}),
    "lxmert": _named("Lxmert", {"vocab_size": WORDS, "hidden_size": 32, "num_attention_heads": 4, "l_layers": 1,
                                "intermediate_size": 64, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16},
                     lambda: tokens() | {"visual_feats": torch.randn(BATCH, 4, 16),
                                         "visual_pos": torch.rand(BATCH, 4, 4)}),
    "falcon-mamba": _named("FalconMamba", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2,
                                           "state_size": 4, "use_cache": False}, tokens, LM),
    "recurrent-gemma": _named("RecurrentGemma", GROUPED | {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8,
                                                           "attention_window_size": 4}, head=LM),
    "jamba": _named("Jamba", GROUPED | {
        "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
        "attn_layer_offset": 1}, head=LM),
    "qwen3-next": _named("Qwen3Next", EXPERTS | {
        "head_dim": 8, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        head=LM),
    "qwen3-moe": _named("Qwen3Moe", EXPERTS | {"head_dim": 8}, head=LM),
    "deepseek-v2": _named("DeepseekV2", LATENT | {"n_group": 1}, head=LM),
    "deepseek-v3": _named("DeepseekV3", LATENT | {"n_group": 2}, head=LM),
    "gpt-oss": _named("GptOss", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                           "sliding_window": 4}, head=LM),
    "phimoe": _named("Phimoe", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}, head=LM),
    "nllb-moe": _named("NllbMoe", PAIR | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
                                          "expert_capacity": 16}, pair),
    "autoformer": _named("Autoformer", SERIES | {"label_length": 2, "moving_average": 5}, series),
    "informer": _named("Informer", SERIES, series),
    "time-series-transformer": _named("TimeSeriesTransformer", SERIES, series),
    "patchtsmixer": _named("PatchTSMixer", {"context_length": 16, "patch_length": 4, "patch_stride": 4,
                                            "num_input_channels": 3, "d_model": 8, "num_layers": 2,
                                            "prediction_length": 4},
                           lambda: {"past_values": torch.randn(BATCH, 16, 3)}, "ForPrediction"),
    "decision-transformer": _named("DecisionTransformer", {
        "state_dim": 3, "act_dim": 2, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 16}, trajectories),
}  # fmt: skip


def cases() -> list[Case]:
    groups = (ENCODERS, DECODERS, ENCODER_DECODERS, VISION_MODELS, AUDIO_MODELS, OTHERS)
    return [Case("transformers", name, one.make, one.inputs) for group in groups for name, one in group.items()]
