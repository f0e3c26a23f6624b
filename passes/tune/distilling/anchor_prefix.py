"""Anchors in front of the input: what a teacher knows of meanings, as a few tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.ir import OptionError

__all__ = ["AnchorPrefix"]


class AnchorPrefix(nn.Module):
    """Puts the anchors that a text is near to in front of its tokens.

    The mean of the token embeddings is projected to where the anchors are; the nearest of them, by
    cosine, are projected back, each times its share ``softmax(cosine / temperature)``, and are the
    first tokens. Only the two projections are learnt; anchors stay as they are, so that of the
    teacher nothing is needed later.

    Source: ECR (embedding-consistent reconstruction), as others describe it, since its text was not
    to be had: a reconstruction.

    Args:
        anchors: (anchors, features), as `Anchors.of` finds them in the teacher's embeddings.
        width: Of the token embeddings.
        count: Tokens that are put in front.
        temperature: Of cosines.

    Raises:
        OptionError: More tokens than anchors, or none, or a temperature that is not positive.
    """

    anchors: torch.Tensor

    def __init__(
        self, anchors: torch.Tensor, width: int, *, count: int = 4, temperature: float = 0.1
    ) -> None:
        super().__init__()
        if not 1 <= count <= len(anchors):
            raise OptionError(f"count is {count}, but must be from 1 to {len(anchors)}")
        if not temperature > 0:
            raise OptionError(f"temperature is {temperature}, but must be positive")
        self.count, self.temperature = count, temperature
        self.register_buffer("anchors", F.normalize(anchors.detach().clone(), dim=-1))
        features = anchors.shape[1]
        self.query = nn.Linear(width, features, bias=False)
        self.token = nn.Linear(features, width)

    def forward(
        self, embeddings: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The longer sequence, and its mask.

        Args:
            embeddings: Of tokens, (batch, tokens, width).
            mask: (batch, tokens), 1 where a token counts.

        Returns:
            (batch, count + tokens, width) and (batch, count + tokens).
        """
        counts = mask.to(embeddings.dtype)
        mean = (embeddings * counts[..., None]).sum(1) / counts.sum(1, keepdim=True).clamp_min(1)
        cosines = F.normalize(self.query(mean), dim=-1) @ self.anchors.T
        nearest, places = cosines.topk(self.count, dim=-1)
        shares = torch.softmax(nearest / self.temperature, -1)
        prefix = self.token(self.anchors[places]) * shares[..., None]
        ones = mask.new_ones(len(mask), self.count)
        return torch.cat([prefix, embeddings], 1), torch.cat([ones, mask], 1)
