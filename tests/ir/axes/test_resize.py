"""Which indices stay, and how the integers of a graph follow."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchlathe.ir import Program, capture
from torchlathe.ir.axes import AxisTerms, Resize
from torchlathe.ir.axes.inference import AxisMap
from torchlathe.ir.axes.terms import Solver
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.shrink import erase_units


def resize_of(solver: Solver, kept: dict[Any, str]) -> Resize:
    """A resize of terms alone; what stays is written as in ``"1101"``."""
    masks = {atom.number: torch.tensor([c == "1" for c in text]) for atom, text in kept.items()}
    return Resize(AxisMap({}, (), {}, {}, solver, {}), masks, None)  # type: ignore[arg-type]


def text_of(mask: torch.Tensor | None) -> str | None:
    return None if mask is None else "".join("01"[int(bit)] for bit in mask)


def test_a_product_keeps_pairs_of_kept_indices() -> None:
    solver = Solver()
    outer, inner = solver.atom(2), solver.atom(3)
    resize = resize_of(solver, {outer: "01", inner: "110"})
    product = solver.product((outer, inner))
    assert text_of(resize.mask(product)) == "000110"
    assert resize.extent(product) == 2
    assert resize.share(product) == pytest.approx(1 / 3)


def test_a_concatenation_keeps_what_its_pieces_keep() -> None:
    solver = Solver()
    first, second = solver.atom(3), solver.atom(2)
    resize = resize_of(solver, {first: "101"})
    concat = solver.concat((first, second))
    assert text_of(resize.mask(concat)) == "10111"
    assert [resize.position(concat, i) for i in range(6)] == [0, 1, 1, 2, 3, 4]


def test_what_loses_nothing_has_no_mask() -> None:
    solver = Solver()
    first, second = solver.atom(3), solver.atom(2)
    resize = resize_of(solver, {first: "101"})
    assert resize.mask(second) is None
    assert not resize.touched(second)
    assert resize.position(second, 1) == 1


def test_a_dynamic_factor_keeps_its_symbol() -> None:
    solver = Solver()
    rows, heads = solver.atom(sympy.Symbol("s0")), solver.atom(4)
    resize = resize_of(solver, {heads: "1010"})
    product = solver.product((rows, heads))
    assert resize.extent(product) == 2 * sympy.Symbol("s0")
    assert resize.share(product) == 0.5
    with pytest.raises(AssertionError, match="shares an axis with a dynamic one"):
        resize.mask(product)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=1, max_size=3))
def test_extents_count_what_stays(masks: list[list[bool]]) -> None:
    solver = Solver()
    # An atom of extent 1 is not an atom, so that every mask gets an index that stays.
    atoms = [solver.atom(len(mask) + 1) for mask in masks]
    texts = ["1" + "".join("01"[bit] for bit in mask) for mask in masks]
    resize = resize_of(solver, dict(zip(atoms, texts, strict=True)))
    for term in (solver.product(atoms), solver.concat(atoms)):
        mask = resize.mask(term)
        assert mask is not None
        assert mask.shape == (term.extent,)
        assert int(mask.sum()) == resize.extent(term)
        assert resize.position(term, int(term.extent)) == resize.extent(term)


class Shapes(nn.Module):
    """Every kind of size argument that heads of a width end up in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = x.shape[0]
        y = self.up(x).view(b, 4, 3)
        y = y.expand(b, 4, 3) + torch.zeros(4, 3) + torch.full((b, 4, 3), 0.0)
        first, second = y.split([1, 2], dim=2)
        y = torch.cat((first, second[:, :, :2]), 2).reshape(-1, 12)
        return self.down(y.unflatten(1, (4, -1)).flatten(1))


def sizes(program: Program) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in program.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            ints = [
                [item for item in arg if isinstance(item, int)]
                if isinstance(arg, list | tuple)
                else arg
                for arg in node.args[1:]
            ]
            found.setdefault(str(node.target).split(".")[1], []).append(ints)
    return found


def test_sizes_follow_what_is_erased() -> None:
    program = capture(
        Shapes().eval(), (torch.randn(2, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    families = program.analysis(ZeroInvariantGroups)
    heads = families.by_name("up.weight:0/0")
    assert heads.extent == 4
    erase_units(program, {heads: torch.tensor([0, 2])})
    found = sizes(program)
    assert found["reshape"][0] == [[2, 3]]  # the view of the projection
    assert found["unflatten"] == [[1, [2, -1]]]
    assert program.tensor("down.weight").shape == (2, 6)
    terms = program.analysis(AxisTerms)
    assert terms.terms(program.tensor_nodes["down.weight"])[1].extent == 6
    for batch in (1, 5):
        assert program.run(torch.randn(batch, 3)).shape == (batch, 2)


def test_pieces_of_a_split_need_not_stay_equal() -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.up(x).chunk(2, -1)
            return self.a(first) + self.b(second)

    program = capture(Pieces().eval(), (torch.randn(2, 3),))
    family = program.analysis(ZeroInvariantGroups).by_name("up.weight:0/1")
    erase_units(program, {family: torch.tensor([1, 2, 3])})
    assert sizes(program)["split_with_sizes"] == [[[4, 1], 1]]
    assert program.run(torch.randn(2, 3)).shape == (2, 2)
