"""Which entries of a matrix may be other than zero: patterns, and masks of them.

Source: N:M as in arXiv 2010.14701 (SR-STE) and in NVIDIA's sparse tensor cores (2:4); the rest is
textbook.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlathe.ir import OptionError

__all__ = ["Pattern", "parse_pattern"]

_SPELLING = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """What a mask has to look like.

    Attributes:
        kind: ``"n:m"``, ``"block"`` or ``"unstructured"``.
        keep: Of N:M the N: how many of ``span`` neighbours in a row may be other than zero.
        span: Of N:M the M; of blocks their side; 0 for none.
        sparsity: Share of zeros.
    """

    kind: Literal["n:m", "block", "unstructured"]
    keep: int
    span: int
    sparsity: float

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.keep}:{self.span}"
        side = f" of {self.span} x {self.span}" if self.kind == "block" else ""
        return f"{self.kind}{side}, {self.sparsity:g}"

    def why_not(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape has no such mask; None if it has."""
        if self.kind == "n:m" and columns % self.span:
            return f"its {columns} columns are no multiple of {self.span}"
        if self.kind == "block" and (rows % self.span or columns % self.span):
            return f"{rows} x {columns} is no multiple of blocks of {self.span}"
        return None

    def mask(self, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """The mask that keeps the highest scores; of equal ones the first.

        Args:
            scores: (rows, columns), not negative.
            by_row: Whether each row loses the same share, where the pattern leaves that open.

        Returns:
            (rows, columns) bool: where entries stay. Exactly ``keep`` of each ``span`` for N:M;
            for the others ``floor(sparsity * count)`` entries or blocks go.
        """
        if self.kind == "n:m":
            groups = scores.unflatten(1, (-1, self.span))
            return _highest(groups, self.keep).flatten(1)
        if self.kind == "block":
            return self._blocks(scores)
        if by_row:
            return _highest(scores, scores.shape[1] - math.floor(self.sparsity * scores.shape[1]))
        flat = scores.reshape(1, -1)
        left = flat.shape[1] - math.floor(self.sparsity * flat.shape[1])
        return _highest(flat, left).view_as(scores)

    def mask_among(self, kept: Tensor, scores: Tensor) -> Tensor:
        """The mask of those entries that are kept already; the others count as zeros of it.

        Args:
            kept: (rows, columns) bool.
            scores: As `mask` takes them.
        """
        return self.mask(scores.masked_fill(~kept, -1)) & kept

    def _blocks(self, scores: Tensor) -> Tensor:
        rows, columns = scores.shape
        side = self.span
        sums = scores.reshape(rows // side, side, columns // side, side).sum((1, 3))
        left = sums.numel() - math.floor(self.sparsity * sums.numel())
        kept = _highest(sums.reshape(1, -1), left).view_as(sums)
        return kept.repeat_interleave(side, 0).repeat_interleave(side, 1)

    def holds(self, matrix: Tensor) -> bool:
        """Whether a matrix has its zeros in the pattern; for N:M also if it has more."""
        rows, columns = matrix.shape
        if self.why_not(rows, columns) is not None:
            return False
        kept = matrix != 0
        if self.kind == "n:m":
            return bool((kept.unflatten(1, (-1, self.span)).sum(2) <= self.keep).all())
        if self.kind == "block":
            side = self.span
            blocks = kept.reshape(rows // side, side, columns // side, side).any(3).any(1)
            return int((~blocks).sum()) >= math.floor(self.sparsity * blocks.numel())
        return int((~kept).sum()) >= math.floor(self.sparsity * kept.numel())


def _highest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest of the last axis are."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :count], True)


def parse_pattern(text: str, sparsity: float, block: int, where: str) -> Pattern:
    """The pattern of the options.

    Args:
        text: ``"2:4"`` or any N:M, ``"block"`` or ``"unstructured"``.
        sparsity: Share of zeros, of the last two.
        block: Side of a block.
        where: The pass, for messages.

    Raises:
        OptionError: There is no such pattern.
    """
    if text in ("block", "unstructured"):
        if not 0 < sparsity < 1:
            raise OptionError(f"sparsity is {sparsity}, but must be between 0 and 1", where=where)
        if text == "block" and block < 2:
            raise OptionError(f"block is {block}, but must be 2 or more", where=where)
        kind: Literal["block", "unstructured"] = "block" if text == "block" else "unstructured"
        return Pattern(kind, 0, block if text == "block" else 0, sparsity)
    found = _SPELLING.fullmatch(text)
    if found is None:
        raise OptionError(
            f"no pattern {text!r}",
            where=where,
            hint='known are N:M such as "2:4" and "4:8", "block" and "unstructured"',
        )
    keep, span = int(found[1]), int(found[2])
    if not 0 < keep < span:
        raise OptionError(
            f"the pattern {text} keeps {keep} of {span}", where=where, hint="keep fewer, but some"
        )
    return Pattern("n:m", keep, span, 1 - keep / span)
