"""The specialisations of the W8A8 kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from torchlathe.kernels.aot.matrix import Case
from torchlathe.kernels.blocks.cases import Format, product_case

__all__ = ["PRODUCTS", "WHERE", "cases", "w8a8_format"]

# fp8 does not exist on sm_80, and is another format on gfx942.
WHERE = {"i8": ("sm_80", "sm_90", "gfx942"), "fp8e4nv": ("sm_90",)}
# These need so few instructions that either place of the left operand will do.
PRODUCTS = frozenset({"wgmma-shared", "wgmma-registers", "mma"})


def w8a8_format(kind: str = "i8") -> Format:
    """W8A8 as the kernel knows it."""
    return Format(2, kind, kind, "fp32", "bf16", 128, 1, 1, 128)


def _case(
    BM: int,
    BN: int,
    *,
    kind: str = "i8",
    split: int = 1,
    rank: int = 0,
    activation: int = 0,
    warps: int = 4,
    limit: float,
) -> Case:
    name = f"{'int8' if kind == 'i8' else 'fp8'} BM{BM} BN{BN} warps{warps} stages4"
    name += f" split{split}" * (split > 1) + f" rank{rank}" * (rank > 0)
    return product_case(
        "w8a8",
        name + " gated" * (activation >= 16),
        w8a8_format(kind),
        BM,
        BN,
        limit=limit,
        split=split,
        rank=rank,
        activation=activation,
        warps=warps,
        hopper=PRODUCTS,
        architectures=WHERE[kind],
    )


def cases() -> Iterator[Case]:
    """Each tile of the shipped table, as integers and as floats."""
    # The speed of memory allows 6.9 slots; these need few, so that latency is what is left.
    for kind in ("i8", "fp8e4nv"):
        if kind == "i8":  # fp8 tiles of 8 tokens go through fp16
            yield _case(8, 64, kind=kind, limit=1.5)
        yield _case(16, 128, kind=kind, limit=1.5)
        yield _case(16, 64, kind=kind, split=4, limit=2.0)
        yield _case(64, 128, kind=kind, warps=8, limit=2.0)
    yield _case(16, 128, rank=64, limit=1.5)
    yield _case(16, 128, activation=18, limit=1.5)
    yield _case(16, 128, kind="fp8e4nv", activation=18, limit=1.5)
