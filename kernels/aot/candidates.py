"""Every tile that the tuner would time, as cases that are compiled ahead of time.

What spills, or breaks a bar, is no candidate: time on a GPU is too dear for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torchlathe.kernels.aot.matrix import Case
from torchlathe.kernels.blocks.cases import Format, product_case
from torchlathe.kernels.tuning.tiles import BUCKETS, Problem, Tile, candidates
from torchlathe.kernels.w4a16.cases import w4a16_format
from torchlathe.kernels.w8a8.cases import PRODUCTS, WHERE, w8a8_format
from torchlathe.kernels.w8a16.cases import w8a16_format

__all__ = ["TUNED", "Tuned", "candidate_cases", "tiles_of"]

# Shapes of the benchmark: what is split, and so what tiles there are, depends on them.
_SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096))
_PROCESSORS = 132  # of an H200


@dataclass(frozen=True)
class Tuned:
    """What is tuned as one: an op, with a type of activations.

    Attributes:
        op: As problems name it.
        dtype: Of the activations, as torch names it.
        kind: The same, as Triton names it.
        form: The format.
        group: Weights that share a scale.
        few: Most slots for each weight for up to 16 tokens, on sm_90.
        many: The same for more: what the speed of memory allows.
        products: Kinds of matrix instruction beyond 8 tokens.
    """

    op: str
    dtype: str
    kind: str
    form: Format
    group: int
    few: float
    many: float
    products: Collection[str] = frozenset({"wgmma-registers"})


TUNED: Sequence[Tuned] = (
    Tuned("w4a16", "float16", "fp16", w4a16_format("fp16"), 128, 2.6, 3.56),
    Tuned("w4a16", "bfloat16", "bf16", w4a16_format("bf16"), 128, 2.6, 3.56),
    Tuned("w8a16", "float16", "fp16", w8a16_format("fp16"), 0, 3.2, 6.9),
    Tuned("w8a16", "bfloat16", "bf16", w8a16_format("bf16"), 0, 3.2, 6.9),
    Tuned("w8a8", "int8", "i8", w8a8_format("i8"), 0, 2.0, 6.9, PRODUCTS),
    Tuned("fp8", "float8_e4m3fn", "fp8e4nv", w8a8_format("fp8e4nv"), 0, 2.0, 6.9, PRODUCTS),
    Tuned(
        "w4a8", "int8", "i8", Format(3, "i8", "i8", "fp32", "bf16", 128, 2, 1, 128), 0, 1.0, 3.56
    ),
)


def tiles_of(tuned: Tuned, buckets: Collection[int] = BUCKETS) -> list[Tile]:
    """Distinct binaries: splits of one tile differ in whether there is a split alone."""
    found: dict[tuple[int | bool, ...], Tile] = {}
    for bucket in buckets:
        for n, k in _SHAPES:
            problem = Problem(tuned.op, tuned.dtype, bucket, n, k, tuned.group)
            for tile in candidates(problem, _PROCESSORS):
                key = (tile.BM, tile.BN, tile.warps, tile.stages, tile.split > 1)
                found.setdefault(key, tile)
    return list(found.values())


def candidate_cases(ops: Collection[str] | None = None) -> Iterator[Case]:
    """A case for each candidate of the named ops, or of all."""
    for tuned in TUNED:
        if ops is not None and tuned.op not in ops:
            continue
        where = [name for name in WHERE.get(tuned.kind, ("sm_80", "sm_90")) if name != "gfx942"]
        for tile in tiles_of(tuned):
            split = f" split{tile.split}" * (tile.split > 1)
            shape = f"BM{tile.BM} BN{tile.BN} warps{tile.warps} stages{tile.stages}"
            yield product_case(
                tuned.op,
                f"candidate {tuned.kind} {shape}{split}",
                tuned.form,
                tile.BM,
                tile.BN,
                limit=tuned.few if tile.BM <= 16 else tuned.many,
                group=tuned.group,
                split=tile.split,
                warps=tile.warps,
                stages=tile.stages,
                hopper={"mma"} if tile.BM <= 8 else tuned.products,
                architectures=where,
            )
