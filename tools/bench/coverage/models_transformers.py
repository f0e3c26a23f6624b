"""Models of transformers: text, sound, pictures, video and more, each from a tiny configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from torchlathe.tools.bench.coverage.configured import BART, NARROW, tiny
from torchlathe.tools.bench.coverage.entry import VOCABULARY, Entry, Inputs, images_of, text
from torchlathe.tools.bench.coverage.models_text import TEXT

__all__ = ["TRANSFORMERS"]


def _speech(samples: int) -> Callable[[int], Inputs]:
    return lambda batch: ((), {"input_values": 0.1 * torch.randn(batch, samples)})


def _whisper(batch: int) -> Inputs:
    features = torch.randn(batch, 16, 40)
    return (), {"input_features": features, "decoder_input_ids": torch.randint(3, 90, (batch, 7))}


def _image_text(edge: int, length: int, mask: bool = True) -> Callable[[int], Inputs]:
    def make(batch: int) -> Inputs:
        kwargs = text(length, mask=mask)(batch)[1]
        return (), {**kwargs, "pixel_values": torch.randn(batch, 3, edge, edge)}

    return make


def _series(batch: int) -> Inputs:
    return (), {"past_values": torch.randn(batch, 32, 3)}


_WAV: Final[dict[str, Any]] = {
    **NARROW,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
    "vocab_size": 32,
}
_VIT: Final[dict[str, Any]] = {**NARROW, "image_size": 32, "patch_size": 8, "num_labels": 5}
_STAGES: Final[dict[str, Any]] = {"hidden_sizes": [12, 16, 24, 32], "depths": [1, 1, 2, 1]}
_SWIN: Final[dict[str, Any]] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
_VIDEO: Final[dict[str, Any]] = {**NARROW, "image_size": 16, "patch_size": 8, "num_frames": 4}
_DETR: Final[dict[str, Any]] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone_config": (
        "ResNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [16, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage4"],
        },
    ),
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
    "num_labels": 5,
}
_CLIP_TEXT: Final[dict[str, Any]] = {
    **NARROW,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_CLIP_VISION: Final[dict[str, Any]] = {**NARROW, "image_size": 32, "patch_size": 8}

_AUDIO: Final = (
    tiny("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2", _speech(800), **_WAV),
    tiny("wavlm", "WavLMForCTC", "WavLM", _speech(800), **_WAV),
    tiny("sew", "SEWForCTC", "SEW", _speech(800), **_WAV, squeeze_factor=2),
    tiny("whisper", "WhisperForConditionalGeneration", "Whisper", _whisper, **{**BART,
        "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 24}),
    tiny("ast", "ASTForAudioClassification", "AST",
        lambda batch: ((), {"input_values": torch.randn(batch, 48, 16)}), **NARROW, patch_size=8,
        max_length=48, num_mel_bins=16, frequency_stride=4, time_stride=4, num_labels=5),
    tiny("encodec", "EncodecModel", "Encodec",
        lambda batch: ((), {"input_values": torch.randn(batch, 1, 320)}), num_filters=4,
        hidden_size=16, upsampling_ratios=[4, 2], codebook_size=32, codebook_dim=16,
        num_lstm_layers=1, sampling_rate=800, target_bandwidths=[0.5]),
    tiny("dac", "DacModel", "Dac",
        lambda batch: ((), {"input_values": torch.randn(batch, 1, 320)}), encoder_hidden_size=8,
        downsampling_ratios=[2, 4], decoder_hidden_size=32, upsampling_ratios=[4, 2],
        n_codebooks=2, codebook_size=32, codebook_dim=4),
    tiny("speecht5_hifigan", "SpeechT5HifiGan", "SpeechT5HifiGan",
        lambda batch: ((torch.randn(batch, 9, 20),), {}), model_in_dim=20,
        upsample_initial_channel=32, upsample_rates=[4, 2], upsample_kernel_sizes=[8, 4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]]),
)  # fmt: skip

_px = images_of("pixel_values", 3, 32, 32)
_VISION: Final = (
    tiny("vit", "ViTForImageClassification", "ViT", _px, **_VIT),
    tiny("deit", "DeiTForImageClassification", "DeiT", _px, **_VIT),
    tiny("beit", "BeitForImageClassification", "Beit", _px, **_VIT,
        use_relative_position_bias=True, out_indices=[0, 1]),
    tiny("dinov2", "Dinov2ForImageClassification", "Dinov2", _px, **{k: v for k, v in _VIT.items()
        if k != "intermediate_size"}),
    tiny("vit_mae", "ViTMAEModel", "ViTMAE",
        lambda batch: ((), {"pixel_values": torch.randn(batch, 3, 32, 32),
                            "noise": torch.arange(16.0).expand(batch, 16).clone()}),
        **{k: v for k, v in _VIT.items() if k != "num_labels"}),
    tiny("swin", "SwinForImageClassification", "Swin", _px, **_SWIN),
    tiny("swinv2", "Swinv2ForImageClassification", "Swinv2", _px, **_SWIN),
    tiny("convnext", "ConvNextForImageClassification", "ConvNext", _px, **_STAGES, num_labels=5),
    tiny("convnextv2", "ConvNextV2ForImageClassification", "ConvNextV2", _px, **_STAGES,
        num_labels=5),
    tiny("resnet", "ResNetForImageClassification", "ResNet", _px, embedding_size=12, **_STAGES,
        num_labels=5),
    tiny("regnet", "RegNetForImageClassification", "RegNet", _px, embedding_size=12,
        hidden_sizes=[16, 24, 32, 32], depths=[1, 1, 2, 1], groups_width=4, num_labels=5),
    tiny("mobilenet_v1", "MobileNetV1ForImageClassification", "MobileNetV1", _px,
        depth_multiplier=0.25, num_labels=5),
    tiny("mobilenet_v2", "MobileNetV2ForImageClassification", "MobileNetV2", _px,
        depth_multiplier=0.35, num_labels=5),
    tiny("efficientnet", "EfficientNetForImageClassification", "EfficientNet", _px,
        width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640, num_labels=5),
    tiny("mobilevit", "MobileViTForImageClassification", "MobileViT", images_of(
        "pixel_values", 3, 64, 64), image_size=64, hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 80], num_labels=5),
    tiny("mobilevitv2", "MobileViTV2ForImageClassification", "MobileViTV2", images_of(
        "pixel_values", 3, 64, 64), image_size=64, width_multiplier=0.25, num_labels=5),
    tiny("poolformer", "PoolFormerForImageClassification", "PoolFormer", images_of(
        "pixel_values", 3, 64, 64), hidden_sizes=[12, 16, 24, 32], depths=[1, 1, 2, 1],
        num_labels=5),
    tiny("levit", "LevitForImageClassification", "Levit", images_of("pixel_values", 3, 64, 64),
        image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[8, 8, 8], num_labels=5),
    tiny("cvt", "CvtForImageClassification", "Cvt", images_of("pixel_values", 3, 64, 64),
        embed_dim=[16, 32, 48], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=5),
    tiny("pvt_v2", "PvtV2ForImageClassification", "PvtV2", images_of("pixel_values", 3, 64, 64),
        image_size=64, hidden_sizes=[16, 32, 40, 48], depths=[1, 1, 1, 1], num_labels=5,
        num_attention_heads=[1, 2, 4, 4]),
    tiny("focalnet", "FocalNetForImageClassification", "FocalNet", _px, image_size=32,
        patch_size=2, embed_dim=16, depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3],
        num_labels=5),
    tiny("swiftformer", "SwiftFormerForImageClassification", "SwiftFormer", images_of(
        "pixel_values", 3, 64, 64), image_size=64, depths=[1, 1, 1, 1],
        embed_dims=[16, 24, 32, 48], num_labels=5),
    tiny("bit", "BitForImageClassification", "Bit", _px, embedding_size=16,
        hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_labels=5, num_groups=4,
        layer_type="preactivation"),
    tiny("hiera", "HieraForImageClassification", "Hiera", images_of("pixel_values", 3, 64, 64),
        image_size=[64, 64], embed_dim=16, depths=[1, 1, 2], num_heads=[1, 2, 4], num_labels=5,
        query_stride=[2, 2], masked_unit_size=[8, 8], num_query_pool=2),
    tiny("segformer", "SegformerForSemanticSegmentation", "Segformer", images_of(
        "pixel_values", 3, 64, 64), hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32, num_labels=5),
    tiny("glpn", "GLPNForDepthEstimation", "GLPN", images_of("pixel_values", 3, 64, 64),
        hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32),
    tiny("dpt", "DPTForSemanticSegmentation", "DPT", _px, **{**_VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 12, 16, 24],
        fusion_hidden_size=16, is_hybrid=False,
        use_auxiliary_head=False),
    tiny("upernet", "UperNetForSemanticSegmentation", "UperNet", images_of(
        "pixel_values", 3, 64, 64), backbone_config=("ConvNextConfig", {**_STAGES,
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}), hidden_size=16,
        auxiliary_in_channels=24, auxiliary_channels=16, num_labels=5,
        use_pretrained_backbone=False),
    tiny("detr", "DetrForObjectDetection", "Detr", images_of("pixel_values", 3, 64, 64), **_DETR),
    tiny("conditional_detr", "ConditionalDetrForObjectDetection", "ConditionalDetr",
        images_of("pixel_values", 3, 64, 64), **_DETR),
    tiny("deformable_detr", "DeformableDetrForObjectDetection", "DeformableDetr",
        images_of("pixel_values", 3, 64, 64), **{**_DETR, "backbone_config": ("ResNetConfig", {
        **_DETR["backbone_config"][1], "out_features": ["stage2", "stage3", "stage4"]}),
        "decoder_layers": 2}, num_feature_levels=4),
    tiny("rt_detr", "RTDetrForObjectDetection", "RTDetr", images_of("pixel_values", 3, 64, 64),
        backbone_config=("RTDetrResNetConfig", {"embedding_size": 8,
        "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 2, 1],
        "out_features": ["stage2", "stage3", "stage4"]}), encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32], feat_strides=[8, 16, 32], encoder_layers=1,
        encoder_ffn_dim=48, encoder_attention_heads=4, d_model=32, num_queries=6,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=4, num_denoising=0, num_labels=5, use_pretrained_backbone=False),
    tiny("yolos", "YolosForObjectDetection", "Yolos", _px, **{**_VIT, "image_size": [32, 32]},
        num_detection_tokens=6),
    tiny("mask2former", "Mask2FormerForUniversalSegmentation", "Mask2Former",
        images_of("pixel_values", 3, 64, 64), backbone_config=("SwinConfig", {"image_size": 64,
        "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4],
        "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48,
        dim_feedforward=48, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
        num_queries=6, num_labels=5, use_pretrained_backbone=False),
    tiny("sam_vision", "SamVisionModel", "SamVision", images_of("pixel_values", 3, 64, 64),
        hidden_size=48, output_channels=16, num_hidden_layers=2, num_attention_heads=4,
        image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1], mlp_dim=72),
    tiny("swin2sr", "Swin2SRForImageSuperResolution", "Swin2SR",
        images_of("pixel_values", 3, 16, 16), image_size=16, patch_size=1, embed_dim=24,
        depths=[2, 2], num_heads=[2, 2], window_size=4, upscale=2, upsampler="pixelshuffle"),
    tiny("videomae", "VideoMAEForVideoClassification", "VideoMAE",
        images_of("pixel_values", 4, 3, 16, 16), **_VIDEO, tubelet_size=2, num_labels=5),
    tiny("timesformer", "TimesformerForVideoClassification", "Timesformer",
        images_of("pixel_values", 4, 3, 16, 16), **_VIDEO, num_labels=5),
    tiny("vivit", "VivitForVideoClassification", "Vivit",
        images_of("pixel_values", 4, 3, 16, 16), **{k: v for k, v in _VIDEO.items()
        if k != "patch_size"}, tubelet_size=[2, 8, 8], num_labels=5),
    tiny("vjepa2", "VJEPA2ForVideoClassification", "VJEPA2",
        lambda batch: ((), {"pixel_values_videos": torch.randn(batch, 4, 3, 32, 32)}),
        patch_size=8, crop_size=32, frames_per_clip=4, tubelet_size=2, hidden_size=48,
        num_attention_heads=4, num_hidden_layers=2, mlp_ratio=2, pred_hidden_size=48,
        pred_num_attention_heads=4, pred_num_hidden_layers=1, num_pooler_layers=1, num_labels=5),
)  # fmt: skip

_MULTIMODAL: Final = (
    tiny("clip", "CLIPModel", "CLIP", _image_text(32, 10), text_config=_CLIP_TEXT,
        vision_config=_CLIP_VISION, projection_dim=24),
    tiny("siglip", "SiglipModel", "Siglip", _image_text(32, 10), text_config=_CLIP_TEXT,
        vision_config=_CLIP_VISION),
    tiny("blip", "BlipForImageTextRetrieval", "Blip", _image_text(32, 10),
        text_config={**_CLIP_TEXT, "encoder_hidden_size": 48},
        vision_config=_CLIP_VISION, projection_dim=24, image_text_hidden_size=24),
    tiny("vilt", "ViltForQuestionAnswering", "Vilt", _image_text(32, 10), **{**_VIT,
        "num_labels": 3}, vocab_size=VOCABULARY, max_position_embeddings=20, max_image_length=-1,
        note="its image embedding picks patches by the data"),
    tiny("perceiver", "PerceiverForSequenceClassification", "Perceiver", lambda batch: (
        (), {"inputs": torch.randint(3, 90, (batch, 12))}), vocab_size=VOCABULARY,
        d_model=24, d_latents=32, num_latents=8, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4, max_position_embeddings=16,
        num_labels=3, qk_channels=16, v_channels=32),
    tiny("patchtst", "PatchTSTForPrediction", "PatchTST", _series, num_input_channels=3,
        context_length=32, patch_length=4, patch_stride=4, prediction_length=6, d_model=24,
        num_attention_heads=4, num_hidden_layers=2, ffn_dim=40, loss="mse"),
    tiny("patchtsmixer", "PatchTSMixerForPrediction", "PatchTSMixer", _series,
        num_input_channels=3, context_length=32, patch_length=4, patch_stride=4,
        prediction_length=6, d_model=24, num_layers=2, loss="mse"),
    tiny("decision_transformer", "DecisionTransformerModel", "DecisionTransformer", lambda batch: (
        (), {"states": torch.randn(batch, 5, 6), "actions": torch.randn(batch, 5, 3),
             "rewards": torch.randn(batch, 5, 1), "returns_to_go": torch.randn(batch, 5, 1),
             "timesteps": torch.arange(5).expand(batch, 5).clone()}),
        state_dim=6, act_dim=3, hidden_size=48, max_ep_len=20, n_layer=2, n_head=4,
        n_positions=40, vocab_size=1),
)  # fmt: skip

TRANSFORMERS: Final[tuple[Entry, ...]] = (*TEXT, *_AUDIO, *_VISION, *_MULTIMODAL)
