"""In which order to contract a network of tensors, and what that costs.

The input is one tensor of the network like the cores, so that contracting core by core, building
the matrix first, and everything between are orders of one contraction; the best one depends on
how many rows the input has. All orders are tried (dynamic programming over subsets).

Source: standard; as in Pfeifer, Haegeman and Verstraete 2014.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod

import torch

from torchlathe.ir.cost.roofline import NOMINAL, Peaks

__all__ = [
    "Contraction",
    "Step",
    "contraction",
    "in_order",
    "row_flops",
    "run_contraction",
    "train_terms",
]

_DISPATCH = 5e-6  # seconds that one product of two small tensors takes


@dataclass(frozen=True)
class Step:
    """One product of two tensors; operands are counted on: inputs first, then results.

    Attributes:
        left: Number of the first operand.
        right: Of the second one.
        legs: Of the left one, of the right one and of the result, a letter each.
    """

    left: int
    right: int
    legs: tuple[str, str, str]

    @property
    def equation(self) -> str:
        """As einsum takes it."""
        return f"{self.legs[0]},{self.legs[1]}->{self.legs[2]}"


@dataclass(frozen=True)
class Contraction:
    """An order.

    Attributes:
        steps: In turn; the last one gives the result.
        flops: Of all steps, 2 for a multiplication and its addition.
        seconds: By FLOPs and moved bytes over the peaks of a machine.
    """

    steps: tuple[Step, ...]
    flops: int
    seconds: float


def contraction(
    terms: Sequence[str],
    extents: Mapping[str, int],
    output: str,
    *,
    apart: int | None = None,
    whole: bool = True,
    peaks: Peaks = NOMINAL,
) -> Contraction:
    """The fastest order, by the cost model.

    Args:
        terms: Legs of each operand; a leg that neither another operand nor the output has is
            summed over.
        extents: Of each leg.
        output: Legs of the result, in order.
        apart: An operand that is only to be contracted last, with the product of all others.
        whole: Whether the first operand may meet that product.
        peaks: Of the machine; only their proportion matters.
    """
    count = len(terms)
    full = (1 << count) - 1
    kept = [_kept_legs(mask, terms, output) for mask in range(full + 1)]
    sizes = [prod(extents[leg] for leg in legs) for legs in kept]
    best: dict[int, tuple[float, tuple[int, int] | None]] = {
        1 << i: (0.0, None) for i in range(count)
    }
    alone = None if apart is None else 1 << apart
    for mask in range(1, full + 1):
        if mask & (mask - 1) == 0 or (alone is not None and mask & alone and mask != full):
            continue
        for left, right in _halves(mask):
            if alone is not None and mask == full and alone not in (left, right):
                continue
            if not whole and mask == full and count > 2 and 1 in (left, right):
                continue
            if left not in best or right not in best:
                continue
            own = _seconds(left, right, mask, kept, sizes, extents, peaks)
            total = best[left][0] + best[right][0] + own
            if mask not in best or total < best[mask][0]:
                best[mask] = total, (left, right)
    steps: list[Step] = []
    _unroll(full, best, terms, kept, output, steps)
    flops = sum(_flops(step, extents) for step in steps)
    return Contraction(tuple(steps), flops, best[full][0])


def in_order(
    terms: Sequence[str], order: Sequence[int], extents: Mapping[str, int], output: str
) -> Contraction:
    """The first operand with the others one by one, in a given order."""
    steps: list[Step] = []
    mask, here, legs = 1, 0, terms[0]
    for place, other in enumerate(order):
        mask |= 1 << other
        kept = _kept_legs(mask, terms, output)
        last = place == len(order) - 1
        result = output if last else _ordered(legs, terms[other], kept)
        steps.append(Step(here, other, (legs, terms[other], result)))
        here, legs = len(terms) + place, result
    seconds = sum(_step_seconds(step, extents, NOMINAL) for step in steps)
    return Contraction(tuple(steps), sum(_flops(s, extents) for s in steps), seconds)


def row_flops(out_modes: Sequence[int], in_modes: Sequence[int], bonds: Sequence[int]) -> int:
    """FLOPs for each row of the input when the cores are contracted with it one by one."""
    terms, extents, output = train_terms(out_modes, in_modes, bonds, 1)
    others = range(1, len(terms))
    return min(in_order(terms, order, extents, output).flops for order in permutations(others))


def train_terms(
    out_modes: Sequence[int], in_modes: Sequence[int], bonds: Sequence[int], rows: int
) -> tuple[list[str], dict[str, int], str]:
    """Legs of the input and of the cores of a tensor train.

    Returns:
        Per operand its legs, the input (rows, i_1, ..., i_n) first; their extents; those of the
        result, (rows, o_1, ..., o_n).
    """
    count = len(out_modes)
    outs = [chr(ord("a") + site) for site in range(count)]
    ins = [chr(ord("A") + site) for site in range(count)]
    links = [chr(ord("p") + bond) for bond in range(count - 1)]
    extents = {"m": rows}
    extents |= dict(zip(outs, out_modes, strict=True)) | dict(zip(ins, in_modes, strict=True))
    extents |= dict(zip(links, bonds, strict=True))
    terms = ["m" + "".join(ins)]
    for site in range(count):
        left = links[site - 1] if site else ""
        right = links[site] if site < count - 1 else ""
        terms.append(left + outs[site] + ins[site] + right)
    return terms, extents, "m" + "".join(outs)


def run_contraction(found: Contraction, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Carry an order out."""
    values = list(operands)
    for step in found.steps:
        values.append(torch.einsum(step.equation, values[step.left], values[step.right]))
    return values[-1]


def _kept_legs(mask: int, terms: Sequence[str], output: str) -> frozenset[str]:
    """Legs that the product of some operands has."""
    inside = {leg for i, term in enumerate(terms) if mask >> i & 1 for leg in term}
    outside = {leg for i, term in enumerate(terms) if not mask >> i & 1 for leg in term}
    return frozenset(inside & (outside | set(output)))


def _halves(mask: int) -> Iterator[tuple[int, int]]:
    part = (mask - 1) & mask
    while part:
        if part > mask ^ part:
            yield part, mask ^ part
        part = (part - 1) & mask


def _seconds(
    left: int,
    right: int,
    mask: int,
    kept: Sequence[frozenset[str]],
    sizes: Sequence[int],
    extents: Mapping[str, int],
    peaks: Peaks,
) -> float:
    flops = 2 * prod(extents[leg] for leg in kept[left] | kept[right])
    moved = 4 * (sizes[left] + sizes[right] + sizes[mask])
    return _DISPATCH + flops / peaks.flops + moved / peaks.bytes


def _step_seconds(step: Step, extents: Mapping[str, int], peaks: Peaks) -> float:
    moved = sum(4 * prod(extents[leg] for leg in legs) for legs in step.legs)
    return _DISPATCH + _flops(step, extents) / peaks.flops + moved / peaks.bytes


def _flops(step: Step, extents: Mapping[str, int]) -> int:
    return 2 * prod(extents[leg] for leg in {*step.legs[0], *step.legs[1]})


def _unroll(
    mask: int,
    best: Mapping[int, tuple[float, tuple[int, int] | None]],
    terms: Sequence[str],
    kept: Sequence[frozenset[str]],
    output: str | None,
    steps: list[Step],
) -> tuple[int, str]:
    """Number and legs of the product of some operands, with the steps that give it."""
    halves = best[mask][1]
    if halves is None:
        number = mask.bit_length() - 1
        return number, terms[number]
    # The operand with the input in it first: its rows stay in front.
    first, second = sorted(halves, key=lambda part: not part & 1)
    left, left_legs = _unroll(first, best, terms, kept, None, steps)
    right, right_legs = _unroll(second, best, terms, kept, None, steps)
    legs = output if output is not None else _ordered(left_legs, right_legs, kept[mask])
    steps.append(Step(left, right, (left_legs, right_legs, legs)))
    return len(terms) + len(steps) - 1, legs


def _ordered(left: str, right: str, kept: frozenset[str]) -> str:
    """Legs as a batched product gives them: shared ones, those of the left, those of the right."""
    shared = [leg for leg in left if leg in right]
    own = [leg for leg in left if leg not in right]
    other = [leg for leg in right if leg not in left]
    return "".join(leg for leg in (*shared, *own, *other) if leg in kept)
