"""What auxiliary heads learn: labels, how images were turned, and from the deepest of them.

Source: LSSKD (arXiv 2506.07055): self-supervised labels of class and rotation together, learnt at
every stage, and knowledge from the deepest stage to the others. How the terms are weighed, and
that features are not matched, are own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torchlathe.ir import InputError
from torchlathe.passes.tune.distilling.logits import KnowledgeDistillation

__all__ = ["ROTATIONS", "JointLabels", "turned"]

# By 0, 90, 180 and 270 degrees.
ROTATIONS = 4


def turned(flat: Sequence[Any]) -> list[Any]:
    """Flat inputs with each image in four rotations: all unturned first, then all by 90 degrees.

    Images are floating, of four axes and square; other tensors that have as many samples are
    repeated.

    Raises:
        InputError: There is no image.
    """
    images = [x for x in flat if _is_image(x)]
    if not images:
        raise InputError(
            "rotations are of square images (n, channels, height, width), and no input is one",
            hint="rotations=false",
        )
    count = images[0].shape[0]
    found: list[Any] = []
    for x in flat:
        if _is_image(x):
            found.append(torch.cat([torch.rot90(x, k, (2, 3)) for k in range(ROTATIONS)]))
        elif isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == count:
            found.append(x.repeat(ROTATIONS, *[1] * (x.dim() - 1)))
        else:
            found.append(x)
    return found


def _is_image(x: Any) -> bool:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return False
    return x.dim() == 4 and x.shape[2] == x.shape[3]


class JointLabels:
    """The loss of heads whose classes are pairs of a class and a rotation.

    By the chain rule, the cross entropy of a pair is that of the class among the logits of the
    rotation that it really is, and that of the rotation. So the user's own loss of classes serves,
    and labels need not be known. The deepest head teaches the others by the divergence of pairs.

    Args:
        task: The user's loss of class logits (n, classes) of one rotation of the batch; None to
            learn rotations alone.
        matched: Between a head and the deepest.
    """

    def __init__(
        self, task: Callable[[torch.Tensor], torch.Tensor] | None, matched: KnowledgeDistillation
    ) -> None:
        self.task, self.matched = task, matched

    def __call__(self, heads: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss.

        Args:
            heads: Logits (4 n, 4 classes) as `turned` orders samples, class by class with the four
                rotations of each; the deepest head last.

        Returns:
            A scalar.
        """
        found = torch.stack([self.labelled(head.float()) for head in heads]).mean()
        *others, deepest = heads
        if not others:
            return found
        target = deepest.float().detach()
        told = torch.stack([self.matched(head.float(), target) for head in others])
        return found + told.mean()

    def labelled(self, head: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the pairs of one head; a scalar."""
        losses = []
        for rotation, rows in enumerate(head.chunk(ROTATIONS)):
            pairs = rows.unflatten(1, (-1, ROTATIONS))
            label = torch.full((len(rows),), rotation, device=rows.device)
            loss = F.cross_entropy(pairs.logsumexp(1), label)
            if self.task is not None:
                loss = loss + self.task(pairs[..., rotation])
            losses.append(loss)
        return torch.stack(losses).mean()
