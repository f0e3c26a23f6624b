"""Attention inside of a program: where it is, and its maps from values of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import PreconditionError, Program

__all__ = ["AttentionSite", "attention_sites", "paired_sites"]

_FUSED = torch.ops.aten.scaled_dot_product_attention.default
_SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a program.

    Attributes:
        query: Name of the node of the queries, or of the probabilities where the graph has them.
        key: Of the keys; None where ``query`` is the probabilities.
        mask: Of what is added to the scores, or tells where they count; None for no such.
        causal: Whether later keys are hidden.
        scale: Of the scores; None for one over the root of the features.
    """

    query: str
    key: str | None = None
    mask: str | None = None
    causal: bool = False
    scale: float | None = None

    @property
    def taps(self) -> list[str]:
        """Names of the nodes whose values `probabilities` needs."""
        return [name for name in (self.query, self.key, self.mask) if name is not None]

    def probabilities(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What each query attends to, (batch, heads, queries, keys), from values of the taps."""
        query = values[self.query].float()
        if self.key is None:
            return query
        key = values[self.key].float()
        if query.shape[-3] != key.shape[-3]:  # groups of heads share their keys
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = query @ key.transpose(-2, -1) * scale
        if self.causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        if self.mask is not None:
            mask = values[self.mask]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, float("-inf"))
            else:
                scores = scores + mask.float()
        # A row that may attend to nothing attends to nothing.
        return scores.softmax(-1).nan_to_num(0.0)


def attention_sites(program: Program) -> list[AttentionSite]:
    """The attentions of a program in order: fused calls, and softmaxes of four axes."""
    found = []
    for node in program.graph.nodes:
        if node.target is _FUSED:
            query, key = node.args[0], node.args[1]
            mask = _given(node, 3, "attn_mask")
            found.append(
                AttentionSite(
                    query.name,
                    key.name,
                    mask.name if isinstance(mask, fx.Node) else None,
                    bool(_given(node, 5, "is_causal")),
                    _given(node, 6, "scale"),
                )
            )
        elif node.target in _SOFTMAX and node.meta["val"].dim() == 4 and node.args[1] in (-1, 3):
            found.append(AttentionSite(node.name))
    return found


def _given(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def paired_sites(student: Program, teacher: Program) -> list[tuple[AttentionSite, AttentionSite]]:
    """Each attention of the student with one of the teacher, evenly spread where it has more.

    Raises:
        PreconditionError: One of them has none, or the student has more than the teacher.
    """
    ours, theirs = attention_sites(student), attention_sites(teacher)
    if not ours or len(theirs) < len(ours):
        raise PreconditionError(
            f"the student has {len(ours)} attentions and the teacher {len(theirs)}, so their maps "
            "cannot be matched",
            hint="attention_maps=0",
        )
    # The last of the student is to be as the last of the teacher, as in TinyBERT's uniform map.
    return [(one, theirs[(i + 1) * len(theirs) // len(ours) - 1]) for i, one in enumerate(ours)]
