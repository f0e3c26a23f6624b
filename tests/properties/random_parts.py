"""What ops of random networks are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Function", "Make"]


@dataclass(frozen=True)
class Make:
    """What an op is made for.

    Attributes:
        kind: "image", "sequence" or "vector".
        width: Channels.
        edge: Height and width of an image.
        hidden: A width of its own.
        seed: A number to choose variants by.
    """

    kind: str
    width: int
    edge: int
    hidden: int
    seed: int

    @property
    def dim(self) -> int:
        """The channels' axis."""
        return 1 if self.kind == "image" else -1

    def layer(self, width: int, out: int, **options: Any) -> nn.Module:
        """A layer over the channels alone."""
        if self.kind == "image":
            return nn.Conv2d(width, out, 1, **options)
        return nn.Linear(width, out, **options)

    def per_channel(self) -> nn.Parameter:
        """A parameter that multiplies or shifts channels."""
        trailing = (1, 1) if self.kind == "image" else ()
        return nn.Parameter(torch.randn(self.width, *trailing))


class Function(nn.Module):
    """A function of the module and its input, with parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)
