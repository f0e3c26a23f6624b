"""StackedUnets, as the published graphs of OTOv3 show them: 22 segments, 6 of them removable.

A reconstruction: the graphs number the calls and name the removable segments and what is left
after erasing four of them; forks, joints and chain lengths here are those that fit all of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["StackedUnets"]


class _Unet(nn.Module):
    """Two levels down, two up; the numbers are those of the calls in the published graph."""

    def __init__(self, inner: int, width: int, *, long: bool) -> None:
        super().__init__()
        stem = [nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        more = [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.stem = nn.Sequential(*stem, *(more if long else []))  # 0-4, or 39-41
        self.down1 = nn.Sequential(  # 5-7
            nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.down2 = nn.Sequential(  # 8-12
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )
        self.up2 = nn.Sequential(  # 13-15, 19 (a resize)
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.up1 = nn.Sequential(  # 26-29, 33 (a resize)
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.out = nn.Sequential(  # 35-38
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.stem(x)
        second = self.down1(first)
        third = self.down2(second)
        joined = _resize(self.up2(third)) + second  # 20
        joined = _resize(third) + joined  # 24, 25
        last = _resize(self.up1(joined)) + first  # 34
        return last, self.out(last)


class StackedUnets(nn.Module):
    """Two U-Nets, the second on the features of the first; their outputs are added."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one = _Unet(3, width, long=True)
        self.two = _Unet(width, width, long=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features, first = self.one(x)
        _, second = self.two(features)
        joined = first + second  # 76
        pooled = F.adaptive_avg_pool2d(joined, 1).squeeze(-1).squeeze(-1)
        result: torch.Tensor = self.head(pooled)
        return result


def _resize(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear")
