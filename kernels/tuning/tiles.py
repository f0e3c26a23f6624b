"""Tiles of the kernels that multiply by quantised weights, and the rule for one that is unmeasured.

Source: own; the crossovers are those that the roofline of an H200 gives, and are replaced by
measured tables where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torchlathe.kernels.packing import ROWS, padded

__all__ = ["BUCKETS", "Problem", "Tile", "candidates", "default_tile"]

# Tokens are rounded up to one of these; above the last the dequantised product takes over.
BUCKETS = (2, 8, 16, 32, 64)
_MANY = 1024


@dataclass(frozen=True)
class Tile:
    """How one product is cut up.

    Attributes:
        BM: Tokens of a block.
        BN: Output features of a block; divides 128.
        split: Blocks that share the sum over input features.
        warps: Warps of a block.
        stages: Stages of the software pipeline.
    """

    BM: int
    BN: int
    split: int = 1
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Problem:
    """One product, as tables know it.

    Attributes:
        op: Name of the op.
        dtype: Type of the activations, as torch names it.
        m: Tokens.
        n: Output features.
        k: Input features.
        group: Weights that share a scale; 0 for a whole row.
    """

    op: str
    dtype: str
    m: int
    n: int
    k: int
    group: int = 0

    @property
    def bucket(self) -> int:
        """Tokens, rounded up; 0 where there are more than any tile takes.

        Sparse products pay for many tokens alone, 1,024 or more, rounded up to a power of two.
        """
        if self.op == "semi_structured":
            return 0 if self.m < _MANY else 1 << (self.m - 1).bit_length()
        return next((bucket for bucket in BUCKETS if self.m <= bucket), 0)

    @property
    def key(self) -> str:
        """The key of a table's entry."""
        return f"{self.op} {self.dtype} n{self.n} k{self.k} g{self.group} m{self.bucket}"


# Columns of the weights in one step of the loop.
_STEP: Mapping[str, int] = {"w4a16": 256, "w8a16": 128, "w4a8": 256, "w8a8": 128, "fp8": 128}
_LEAST_STEPS = 4  # of a block, or filling the pipeline is all that it does


def default_tile(problem: Problem, processors: int) -> Tile | None:
    """The tile for a problem that no table has.

    Args:
        problem: The product.
        processors: Multiprocessors of the device.

    Returns:
        The tile, or None where the weights should be dequantised for the library's product.
    """
    if problem.bucket == 0 or problem.op == "semi_structured":
        return None
    BM = problem.bucket
    if problem.dtype.startswith("float8"):
        BM = max(BM, 16)  # smaller products of fp8 go through fp16
    # Beyond 8 tokens warp-group products take 64 rows each, and two of them hide the waiting.
    BN = 64 if BM <= 8 else 128
    warps = 8 if BM == 64 else 4
    return Tile(BM, BN, _split(problem, BN, processors), warps, 4)


def _split(problem: Problem, BN: int, processors: int) -> int:
    blocks = padded(problem.n, ROWS) // BN
    steps = -(-problem.k // _STEP.get(problem.op, 128))
    split = 1
    while blocks * split < processors and steps // (2 * split) >= _LEAST_STEPS and split < 16:
        split *= 2
    return split


def candidates(problem: Problem, processors: int) -> Iterator[Tile]:
    """At most a dozen tiles that are worth timing, the default first."""
    first = default_tile(problem, processors)
    if first is None:
        return
    seen: set[Tile] = set()
    shapes = [(first.BM, first.BN, first.warps)]
    # Weights that are unpacked want many tokens for each: what the bars of ahead-of-time facts
    # forbid (`torchlathe kernels check --candidates`) is not timed.
    unpacks = problem.op not in ("w8a8", "fp8")
    if first.BM <= 8:
        shapes += [(problem.bucket, 128, 4), (16, 128, 4)]
    elif first.BM == 16 and unpacks:
        shapes += [(32, 128, 4)]
    elif first.BM <= 32:
        shapes += [(first.BM, 64, 4), (first.BM, 128, 8)]
    else:
        shapes += [(32, 128, 4)] if unpacks else [(32, 128, 4), (64, 64, 4)]
    for BM, BN, warps in shapes:
        split = _split(problem, BN, processors)
        for tile in (
            Tile(BM, BN, split, warps, 4),
            Tile(BM, BN, 2 * split, warps, 4),
            Tile(BM, BN, max(1, split // 2), warps, 4),
            Tile(BM, BN, split, warps, 3),
        ):
            if tile not in seen and len(seen) < 12:
                seen.add(tile)
                yield tile
