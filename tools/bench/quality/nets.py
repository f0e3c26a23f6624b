"""Two small classifiers of the bundled digits, trained here in seconds.

Written so that Torch-Pruning can prune them too: attention reads its head counts from attributes,
which a user of Torch-Pruning patches afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "NETS",
    "Attention",
    "ConvNet",
    "Digits",
    "VisionTransformer",
    "accuracy",
    "digits",
    "trained",
]


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] and their labels (n,); test images are in no batch.

    Attributes:
        train: To train on.
        test: To measure accuracy on.
        batches: Calibration: 8 batches of 64 of the training images, with labels.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batches: tuple[tuple[Tensor, Tensor], ...]


@cache
def digits(seed: int) -> Digits:
    """The digits of scikit-learn: 1,152 to train on and 640 to test on, in batches of 64."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(loaded.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    train = images[:1152], labels[:1152]
    batches = tuple(zip(train[0][:512].split(64), train[1][:512].split(64), strict=True))
    return Digits(train, (images[1152:1792], labels[1152:1792]), batches)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(x + y)


class ConvNet(nn.Module):
    """A residual network: stem, a block at each of two resolutions, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.block1 = _Block(24, 32)
        self.down = nn.Conv2d(24, 48, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(48)
        self.block2 = _Block(48, 48)
        self.hidden = nn.Linear(48, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = self.block1(torch.relu(self.bn(self.stem(x))))
        x = self.block2(torch.relu(self.bn2(self.down(x))))
        result: Tensor = self.head(torch.relu(self.hidden(x.mean((2, 3)))))
        return result


class Attention(nn.Module):
    """Self-attention with a fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (batch, tokens, width) to as many."""
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))
        return result


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class VisionTransformer(nn.Module):
    """16 patches, three layers, the mean over patches, a head.

    Patches begin every two pixels, and overlap if they are larger than that.
    """

    def __init__(self, width: int = 48, hidden: int = 128, patch: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, stride=2, padding=patch // 2 - 1)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.layers = nn.ModuleList(_Layer(width, 4, hidden) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x).mean(1))
        return result


NETS: Final[dict[str, Callable[[], nn.Module]]] = {
    "digits CNN": ConvNet,
    "digits ViT": VisionTransformer,
}

_EPOCHS: Final = {"digits CNN": 8, "digits ViT": 25}


def trained(name: str, seed: int) -> nn.Module:
    """A net, trained from a seed with Adam and a one-cycle rate; in eval mode."""
    torch.manual_seed(seed)
    data, model = digits(seed), NETS[name]()
    images, labels = data.train
    epochs, size = _EPOCHS[name], 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = epochs * -(-len(labels) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for part in order.split(size):
            shifted = images[part].roll(int(torch.randint(-1, 2, ())), dims=3)
            loss = F.cross_entropy(model(shifted), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: Callable[[Tensor], Tensor], data: Digits) -> float:
    """Share of the test images that are classified right, 0 to 1."""
    images, labels = data.test
    with torch.no_grad():
        found = torch.cat([model(part) for part in images.split(64)])
    return float((found.argmax(1) == labels).double().mean())
