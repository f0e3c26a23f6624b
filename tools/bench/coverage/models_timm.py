"""Models of timm: one or two of each architecture file, small or shrunk by their options."""

from __future__ import annotations

from typing import Any, Final

from torchlathe.tools.bench.coverage.entry import Entry, builder, image

__all__ = ["TIMM"]


def _timm(model: str, edge: int = 64, *, name: str = "", **options: Any) -> Entry:
    make = builder("timm.create_model", model, pretrained=False, num_classes=10, **options)
    return Entry(f"timm/{name or model}", make, image(3, edge, edge))


def _vit(model: str, edge: int = 32, *, depth: int = 3, **options: Any) -> Entry:
    """A plain vision transformer, shrunk."""
    options = {"patch_size": 8, "embed_dim": 64, "num_heads": 4, **options}
    return _timm(model, edge, img_size=edge, depth=depth, **options)


TIMM: Final[tuple[Entry, ...]] = (
    _vit("beit_base_patch16_224"),
    _vit("cait_xxs24_224", init_values=0.1),
    _timm("coat_lite_tiny", img_size=64),
    _vit("convit_tiny", embed_dim=64, depth=4),
    Entry("timm/convmixer", builder("timm.models.convmixer.ConvMixer", dim=32, depth=3,
          num_classes=10), image(3, 56, 56)),
    _timm("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
    _timm("convnextv2_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
    _timm("test_convnext3"),
    _timm("crossvit_9_240", 240),
    _timm("cspresnet50"),
    _timm("cspnext_s"),
    _timm("davit_tiny", depths=(1, 1, 1), embed_dims=(16, 32, 48), num_heads=(2, 2, 4)),
    _vit("deit_tiny_patch16_224"),
    _vit("deit3_small_patch16_224"),
    _timm("densenet121"),
    _timm("dla34"),
    _timm("dpn48b"),
    _timm("edgenext_xx_small"),
    _timm("efficientformer_l1", 224),
    _timm("efficientformerv2_s0", 64, img_size=64),
    _timm("mixnet_s"),
    _timm("mobilenetv4_conv_small"),
    _timm("fbnetc_100"),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0"),
    _timm("efficientvim_m1"),
    _vit("eva02_tiny_patch14_224", patch_size=8, embed_dim=48),
    _timm("fasternet_t0"),
    _timm("fastvit_t8"),
    Entry("timm/focalnet", builder("timm.models.focalnet.FocalNet", depths=(1, 1, 2),
          embed_dim=24, num_classes=10), image(3, 64, 64)),
    _timm("gcvit_xxtiny", 224),
    _timm("ghostnet_050"),
    _timm("hgnet_tiny"),
    _timm("hiera_tiny_224", img_size=(64, 64), embed_dim=32, stages=(1, 1, 2, 1)),
    _timm("hrnet_w18_small"),
    _timm("iformer_t"),
    _timm("inception_next_atto"),
    _timm("inception_resnet_v2", 96),
    _timm("lcnetv2_small"),
    _timm("levit_128s", 224),
    _timm("lowformer_b0"),
    _timm("mambaout_femto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
    _timm("test_coatnet", 160),
    _timm("test_maxvit", 160),
    _timm("maxxvit_rmlp_nano_rw_256", 64, img_size=64),
    _timm("poolformer_s12"),
    _timm("convformer_s18"),
    _timm("caformer_s18"),
    _timm("mixer_s32_224", 64, img_size=64),
    _timm("resmlp_12_224", 64, img_size=64),
    _timm("gmlp_ti16_224", 64, img_size=64),
    _timm("mobilenetv3_small_050"),
    _timm("mobilevit_xxs"),
    _timm("mvitv2_tiny", 64, img_size=64),
    _timm("nest_tiny", 64, img_size=64),
    _timm("nextvit_small"),
    _timm("nfnet_l0"),
    _timm("pit_ti_224", 64, img_size=64, depth=(1, 1, 1)),
    _timm("pvt_v2_b0"),
    _timm("rdnet_tiny"),
    _timm("regnetx_002"),
    _timm("regnety_002"),
    _timm("repghostnet_050"),
    _timm("repvgg_a0"),
    _timm("repvit_m0_9"),
    _timm("res2net50_14w_8s"),
    _timm("resnest14d"),
    _timm("resnet10t"),
    _timm("seresnet50"),
    _timm("resnetv2_50", layers=(1, 1, 1, 1)),
    _timm("rexnet_100"),
    _timm("selecsls42"),
    _timm("sequencer2d_s", 64, img_size=64, layers=(1, 1, 2, 1)),
    _timm("shvit_s1"),
    _timm("skresnet18"),
    _timm("starnet_s1"),
    _timm("swiftformer_xs"),
    _timm("swin_s3_tiny_224", 64, img_size=64, embed_dim=24, depths=(1, 2, 1, 1),
          num_heads=(2, 2, 4, 4), window_size=(4, 4, 4, 2)),
    _timm("swinv2_tiny_window8_256", 64, img_size=64, embed_dim=24, depths=(2, 2),
          num_heads=(2, 4), window_size=4),
    _timm("swinv2_cr_tiny_224", 64, img_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4)),
    _timm("tiny_vit_5m_224", 224),
    _timm("tnt_s_patch16_224", 64, img_size=64, depth=2),
    _timm("tresnet_m"),
    _timm("twins_svt_small", 64, img_size=64),
    _timm("visformer_tiny", 64, img_size=64),
    _vit("vit_tiny_patch16_224"),
    _vit("vit_relpos_small_patch16_224"),
    _timm("samvit_base_patch16", 64, img_size=64, embed_dim=64, depth=2, num_heads=4,
          global_attn_indexes=(1,), window_size=2),
    _timm("vitamin_small_224", 64, img_size=64),
    _timm("volo_d1_224", 64, img_size=64),
    _timm("vovnet39a"),
    _timm("legacy_xception", 96),
    _timm("xcit_nano_12_p8_224", 64, img_size=64, depth=3),
    _timm("halonet26t", 256),
    _timm("botnet26t_256", 256),
    _timm("csatv2", 64),
    _timm(
        "naflexvit_base_patch16_gap", 64, embed_dim=64, depth=2, num_heads=4),
    _timm("nasnetalarge", 96),
    _timm("pnasnet5large", 96),
)  # fmt: skip
