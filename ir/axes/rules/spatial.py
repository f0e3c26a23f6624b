"""Ops that move over positions and treat channels alike: pooling, resampling, pixel shuffle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from torchlathe.ir.axes.extents import same
from torchlathe.ir.axes.rule import Rule, Terms, Values, argument
from torchlathe.ir.axes.rules.shaping import Structural, zeros_or_unknown
from torchlathe.ir.axes.terms import Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["OverPositions", "PixelShuffle"]


@dataclass(frozen=True)
class OverPositions(Rule):
    """Each channel by itself, over the last axes.

    Attributes:
        positions: Number of position axes.
        zero: Whether a channel of zeros stays zero.
    """

    positions: int
    zero: bool = True

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Leading axes pass; positions are fixed, before and after."""
        terms = ax.terms(node.args[0])
        lead = terms[: -self.positions]
        ax.pin_all(terms[-self.positions :], "it is a position that a window moves over")
        values = node.meta["val"]

        def result(value: torch.Tensor) -> tuple[Term, ...]:
            fresh = tuple(ax.fresh(d) for d in value.shape[-self.positions :])
            ax.pin_all(fresh, "it is a position that a window moved to")
            return (*lead, *fresh)

        if isinstance(values, torch.Tensor):
            return result(values)
        return [result(v) for v in values]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Channels stay apart; padding may mix zeros into another constant."""
        values = zeros_or_unknown(node, flow) if self.zero else flow.unknown(node)
        if not isinstance(values, list):
            return values
        unknown = flow.unknown(node)
        assert isinstance(unknown, list)
        return [values[0], *unknown[1:]]  # the others are positions


class PixelShuffle(Structural):
    """``pixel_shuffle`` and ``pixel_unshuffle``: channels are ``kept x factor x factor``."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The kept channels pass; the factors become positions."""
        terms = ax.terms(node.args[0])
        shape = ax.shape(node)
        *lead, channels, height, width = terms
        ax.pin_all((height, width), "pixel shuffle rearranges positions")
        factor = argument(node, "upscale_factor")
        if factor is not None:
            kept, moved = ax.split(channels, factor * factor)
            ax.pin(moved, "pixel shuffle spreads it over positions")
        else:
            factor = argument(node, "downscale_factor")
            moved = ax.fresh(factor * factor)
            ax.pin(moved, "pixel unshuffle gathers it from positions")
            kept = ax.solver.product((channels, moved))
        positions = [ax.fresh(e) for e in shape[-2:]]
        ax.pin_all(positions, "pixel shuffle rearranges positions")
        assert same(kept.extent, shape[-3])
        return (*lead, kept, *positions)
