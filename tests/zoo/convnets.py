"""Hand-made convolutional networks, one structure each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.zoo_model import ZooModel, images

__all__ = ["CONVNETS"]


def conv_bn(
    cin: int, cout: int, size: int = 3, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


class Head(nn.Module):
    """Global average pool and a linear classifier."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, middle: int, stride: int = 1) -> None:
        super().__init__()
        self.one = conv_bn(cin, middle, stride=stride)
        self.two = conv_bn(middle, cout)
        self.short = conv_bn(cin, cout, 1, stride=stride) if cin != cout or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.one(x)))
        return F.relu(y + (x if self.short is None else self.short(x)))


class ResidualCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.a = BasicBlock(12, 12, 10)
        self.b = BasicBlock(12, 20, 14, stride=2)
        self.c = BasicBlock(20, 20, 20)
        self.head = Head(20)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.head(self.c(self.b(self.a(x))))


class PreActivation(nn.Module):
    """BatchNorm before the convolution: the stream itself is not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(12) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = x + conv(F.relu(norm(x)))
        return self.head(F.relu(self.norms[2](x)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = [8, 14, 20]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in [*widths, 26])
        self.convs = nn.ModuleList(nn.Conv2d(w, 6, 3, padding=1) for w in widths)
        self.transition = nn.Conv2d(26, 10, 1)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.relu(self.norms[3](torch.cat(features, 1)))
        return self.head(F.avg_pool2d(self.transition(x), 2))


class GroupedConv(nn.Module):
    """ResNeXt's block: the middle convolution has four groups of five channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.reduce = conv_bn(16, 20, 1)
        self.grouped = conv_bn(20, 20, groups=4)
        self.expand = conv_bn(20, 16, 1)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.grouped(F.relu(self.reduce(x))))
        return self.head(F.relu(x + self.expand(y)))


class GroupedTwice(nn.Module):
    """Two grouped convolutions in a row with different group counts, 12 to 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.one = nn.Conv2d(12, 24, 3, groups=2)
        self.two = nn.Conv2d(24, 24, 3, groups=4)
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(F.relu(self.stem(x)))))))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.expand = conv_bn(channels, expanded, 1)
        self.depthwise = conv_bn(expanded, expanded, groups=expanded)
        self.project = conv_bn(expanded, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        return x + self.project(y)


class DepthwiseConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 10, stride=2)
        self.blocks = nn.Sequential(InvertedResidual(10, 24), InvertedResidual(10, 30))
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu6(self.stem(x))))


class DepthMultiplier(nn.Module):
    """A depthwise convolution with two outputs for each input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3)
        self.depthwise = nn.Conv2d(9, 18, 3, groups=9)
        self.head = Head(18)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depthwise(F.relu(self.stem(x)))))


class SqueezeExcite(nn.Module):
    def __init__(self, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.reduce = nn.Conv2d(16, 6, 1)
        self.expand = nn.Conv2d(6, 16, 1)
        self.gate = gate()
        self.out = conv_bn(16, 12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        scale = F.adaptive_avg_pool2d(x, 1)
        scale = self.gate(self.expand(F.relu(self.reduce(scale))))
        return self.head(F.silu(self.out(x * scale)))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 10, 3, padding=1)
        self.up = nn.Conv2d(10, 12 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.tail = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        return self.tail(F.relu(self.shuffle(self.up(x))))


class PixelUnshuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.PixelUnshuffle(2)
        self.mix = nn.Conv2d(24, 10, 1)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mix(self.down(F.relu(self.stem(x))))))


class FlattenLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 14, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(14 * 16, 22), nn.ReLU(), nn.Dropout(0.5), nn.Linear(22, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class GroupNormNet(nn.Module):
    """GroupNorm with four groups over the stream, one group and one channel each in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.one = nn.Conv2d(16, 12, 3, padding=1)
        self.whole = nn.GroupNorm(1, 12)
        self.two = nn.Conv2d(12, 16, 3, padding=1)
        self.single = nn.GroupNorm(16, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        y = F.silu(self.whole(self.one(x)))
        return self.head(F.relu(x + self.single(self.two(y))))


class InstanceNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.InstanceNorm2d(10, affine=True)
        self.two = nn.Conv2d(10, 12, 3, padding=1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.two(F.relu(self.norm(self.one(x)))), 0.1))


class TransposedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 10, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(10, 14, 4, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(14)
        self.grouped = nn.ConvTranspose2d(14, 12, 3, padding=1, groups=2)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.up(F.relu(self.down(x)))))
        return torch.tanh(self.out(F.relu(self.grouped(x))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = conv_bn(3, 8)
        self.down = conv_bn(8, 14, stride=2)
        self.bottom = conv_bn(14, 20, stride=2)
        self.up_one = conv_bn(20 + 14, 12)
        self.up_two = conv_bn(12 + 8, 10)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.enter(x))
        b = F.relu(self.down(a))
        c = F.relu(self.bottom(b))
        c = F.interpolate(c, scale_factor=2, mode="nearest")
        b = F.relu(self.up_one(torch.cat([c, b], 1)))
        b = F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        return self.out(F.relu(self.up_two(torch.cat([a, b], 1))))


class Bilinear(nn.Module):
    """Pyramid pooling: pooled copies are resized back and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.branches = nn.ModuleList(nn.Conv2d(12, 4 + k, 1) for k in range(2))
        self.out = nn.Conv2d(12 + 4 + 5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pieces = [x]
        for scale, branch in zip((2, 4), self.branches, strict=True):
            small = F.relu(branch(F.avg_pool2d(x, scale)))
            pieces.append(
                F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=True)
            )
        return self.out(torch.cat(pieces, 1))


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 12, 5, padding=2)
        self.norm = nn.BatchNorm1d(12)
        self.two = nn.Conv1d(12, 16, 3, stride=2, dilation=2)
        self.gate = nn.Conv1d(12, 16, 3, stride=2, dilation=2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.one(x)))
        return self.fc((self.two(x) * torch.tanh(self.gate(x))).amax(2))


class Conv3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv3d(2, 8, 3, padding=1)
        self.two = nn.Conv3d(8, 10, 3, padding=1, stride=2)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        return self.fc(F.adaptive_avg_pool3d(F.relu(self.two(F.max_pool3d(x, 2))), 1).flatten(1))


class ChannelShuffle(nn.Module):
    """ShuffleNet's unit: split, a branch of depthwise convolution, cat and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.reduce = conv_bn(8, 8, 1)
        self.depthwise = conv_bn(8, 8, groups=8)
        self.expand = conv_bn(8, 8, 1)
        self.out = conv_bn(16, 12, 1)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        left, right = x.chunk(2, 1)
        right = F.relu(self.expand(self.depthwise(F.relu(self.reduce(right)))))
        x = torch.cat([left, right], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(F.relu(self.out(x)))


class SharedModule(nn.Module):
    """One block called twice on a stream, and once more at another resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.block = BasicBlock(12, 12, 9)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(F.relu(self.stem(x))))
        return self.head(self.block(F.avg_pool2d(x, 2)))


class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 12), nn.ReLU(), conv_bn(12, 14), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.neck = conv_bn(14, 10)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.neck(self.backbone(x))))


class ConvNeXtBlock(nn.Module):
    """Channels-last LayerNorm and a per-channel layer scale around a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 30)
        self.down = nn.Linear(30, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.last = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.fc(self.last(x.mean((2, 3))))


class PReluNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 10, 3, padding=1)
        self.act = nn.PReLU(10)
        self.two = nn.Conv2d(10, 12, 3, padding=1)
        self.act_two = nn.PReLU()
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act_two(self.two(self.act(self.one(x)))))


class ConstantActivations(nn.Module):
    """Activations that are not zero at zero, with and without padding after them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 10, 3)
        self.two = nn.Conv2d(10, 12, 3)
        self.padded = nn.Conv2d(12, 14, 3, padding=1)
        self.fc = nn.Linear(14, 9)
        self.out = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.one(x))
        x = F.softplus(self.two(x))
        x = F.relu(self.padded(x))
        return self.out(torch.cos(self.fc(x.mean((2, 3)))))


class ScaledInput(nn.Module):
    """A stream that is added to the input, which nothing may make narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(6, 10, 3, padding=1)
        self.two = nn.Conv2d(10, 6, 3, padding=1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.two(F.relu(self.one(x))))


def _net(
    name: str, make: Callable[[], nn.Module], channels: int = 3, **options: object
) -> ZooModel:
    spatial = options.pop("spatial", 2)
    assert isinstance(spatial, int)
    return ZooModel(name, make, **{**images(channels, spatial=spatial), **options})


CONVNETS: tuple[ZooModel, ...] = (
    _net(
        "residual_cnn",
        ResidualCNN,
        free=("stem.0.weight[0]", "a.one.0.weight[0]", "c.two.0.weight[0]", "head.fc.weight[1]"),
        pinned=("stem.0.weight[1]", "head.fc.weight[0]"),
    ),
    _net("preactivation", PreActivation, free=("stem.weight[0]",)),
    _net("dense_block", DenseBlock, free=("stem.weight[0]", "convs.1.weight[0]")),
    _net("grouped_conv", GroupedConv, free=("stem.0.weight[0]", "reduce.0.weight[0]")),
    _net("grouped_twice", GroupedTwice, free=("stem.weight[0]", "two.weight[0]")),
    _net("depthwise_conv", DepthwiseConv, free=("stem.0.weight[0]", "blocks.0.expand.0.weight[0]")),
    _net("depth_multiplier", DepthMultiplier, free=("stem.weight[0]",)),
    _net("squeeze_excite", SqueezeExcite, free=("stem.0.weight[0]", "reduce.weight[0]")),
    _net("squeeze_excite_hard", lambda: SqueezeExcite(nn.Hardsigmoid), free=("stem.0.weight[0]",)),
    _net("pixel_shuffle", PixelShuffle, free=("body.weight[0]", "up.weight[0]")),
    _net("pixel_unshuffle", PixelUnshuffle, free=("stem.weight[0]",)),
    _net("flatten_linear", FlattenLinear, free=("features.3.weight[0]", "classifier.1.weight[0]")),
    _net("group_norm", GroupNormNet, free=("stem.weight[0]",)),
    _net("instance_norm", InstanceNormNet, free=("one.weight[0]",)),
    _net("conv_transpose", TransposedDecoder, free=("up.weight[1]", "down.weight[0]")),
    _net("unet", UNet, free=("enter.0.weight[0]", "bottom.0.weight[0]", "up_two.0.weight[0]")),
    _net("bilinear", Bilinear, free=("stem.0.weight[0]", "branches.1.weight[0]")),
    _net("conv1d", Conv1dNet, 4, spatial=1, free=("one.weight[0]", "two.weight[0]")),
    _net("conv3d", Conv3dNet, 2, spatial=3, sizes=((2, 8), (3, 8)), free=("one.weight[0]",)),
    _net("channel_shuffle", ChannelShuffle, free=("stem.0.weight[0]", "out.0.weight[0]")),
    _net("shared_module", SharedModule, free=("stem.0.weight[0]", "block.one.0.weight[0]")),
    _net("frozen", FrozenBackbone, free=("backbone.0.0.weight[0]", "neck.0.weight[0]")),
    _net("convnext_block", ConvNeXtBlock, free=("stem.weight[0]", "up.weight[0]")),
    _net("prelu", PReluNet, free=("one.weight[0]", "two.weight[0]")),
    _net(
        "constants",
        ConstantActivations,
        free=("one.weight[0]", "fc.weight[0]"),
        approximate=("one.weight:0", "two.weight:0", "fc.weight:0"),
    ),
    _net(
        "added_input",
        ScaledInput,
        6,
        free=("one.weight[0]",),
        pinned=("two.weight[0]", "one.weight[1]"),
    ),
)
