"""Models of torchvision."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

import torch
from torch import nn

from torchlathe.tools.bench.coverage.entry import Entry, Inputs, builder, image

__all__ = ["TORCHVISION"]


def _tv(name: str, edge: int = 64, *, path: str = "", **options: Any) -> Entry:
    options.setdefault("num_classes", 10)
    make = builder(f"torchvision.models.{path or name}", **options)
    return Entry(f"torchvision/{name}", make, image(3, edge, edge))


def _video(name: str, path: str, frames: int = 4, edge: int = 32, **options: Any) -> Entry:
    make = builder(f"torchvision.models.video.{path}", num_classes=10, **options)
    return Entry(f"torchvision/{name}", make, image(3, frames, edge, edge))


class _PairOfFrames(nn.Module):
    """RAFT's last estimate alone; the list of all of them is for training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Any, second: Any) -> Any:
        return self.model(first, second, num_flow_updates=2)[-1]


def _frames(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 128, 128), torch.randn(batch, 3, 128, 128)), {}


def _raft() -> nn.Module:
    return _PairOfFrames(builder("torchvision.models.optical_flow.raft_small", weights=None)())


def _resnet_fpn() -> nn.Module:
    make = "torchvision.models.detection.backbone_utils.resnet_fpn_backbone"
    return builder(make, backbone_name="resnet18", weights=None, trainable_layers=5)()


def _mobilenet_fpn() -> nn.Module:
    make = "torchvision.models.detection.backbone_utils.mobilenet_backbone"
    return builder(
        make, backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6
    )()


def _swin_v2() -> nn.Module:
    swin = import_module("torchvision.models.swin_transformer")
    return builder(
        "torchvision.models.swin_transformer.SwinTransformer",
        patch_size=[4, 4],
        num_classes=10,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
        **_SWIN,
    )()


def _mvit() -> nn.Module:
    mvit = import_module("torchvision.models.video.mvit")
    blocks = [
        mvit.MSBlockConfig(1, 24, 48, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        mvit.MSBlockConfig(2, 48, 48, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return builder(
        "torchvision.models.video.mvit.MViT",
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=10,
    )()


_NO_AUX: Final[dict[str, Any]] = {"aux_logits": False, "init_weights": False}
_SWIN: Final[dict[str, Any]] = {
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [4, 4],
}
_SEGMENTATION: Final[dict[str, Any]] = {"weights": None, "weights_backbone": None}

TORCHVISION: Final[tuple[Entry, ...]] = (
    _tv("alexnet"),
    _tv("vgg16_bn", 32),
    _tv("resnet18"),
    _tv("resnet50"),
    _tv("resnext50_32x4d"),
    _tv("densenet121"),
    _tv("inception_v3", 96, **_NO_AUX),
    _tv("googlenet", **_NO_AUX),
    _tv("squeezenet1_1"),
    _tv("mobilenet_v2"),
    _tv("mobilenet_v3_small"),
    _tv("mnasnet0_5"),
    _tv("shufflenet_v2_x0_5"),
    _tv("efficientnet_b0"),
    _tv("efficientnet_v2_s"),
    _tv("regnet_x_400mf"),
    _tv("regnet_y_400mf"),
    _tv("convnext_tiny"),
    _tv(
        "vit",
        32,
        path="vision_transformer.VisionTransformer",
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
    ),
    _tv("swin", path="swin_transformer.SwinTransformer", patch_size=[4, 4], **_SWIN),
    _tv("swin_t", 64, weights=None),
    Entry("torchvision/swin_v2", _swin_v2, image(3, 64, 64)),
    _tv(
        "maxvit",
        path="maxvit.MaxVit",
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    ),
    _tv("fcn_resnet50", path="segmentation.fcn_resnet50", **_SEGMENTATION),
    _tv(
        "deeplabv3_mobilenet",
        path="segmentation.deeplabv3_mobilenet_v3_large",
        **_SEGMENTATION,
    ),
    _tv("lraspp", path="segmentation.lraspp_mobilenet_v3_large", **_SEGMENTATION),
    Entry("torchvision/resnet_fpn", _resnet_fpn, image(3, 64, 64)),
    Entry("torchvision/mobilenet_fpn", _mobilenet_fpn, image(3, 64, 64)),
    Entry("torchvision/raft_small", _raft, _frames),
    _video("r3d_18", "r3d_18"),
    _video("r2plus1d_18", "r2plus1d_18"),
    _video("s3d", "s3d", 16, 224),
    Entry("torchvision/mvit", _mvit, image(3, 4, 32, 32)),
    _video(
        "swin3d",
        "swin_transformer.SwinTransformer3d",
        patch_size=[2, 4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[2, 4, 4],
    ),
)
