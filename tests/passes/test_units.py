"""Which unit each index of an axis belongs to, in every form that a term can have."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlathe.ir.axes import Atom, Concat, Product, Term
from torchlathe.passes.rewrite.erasing.units import indices_of, sum_by_unit, unit_indices

OWN = 1  # the number of the atom that is asked about


@st.composite
def terms(draw: st.DrawFn, depth: int = 2) -> Term:
    """Terms with the atom in them at least once: alone, in products, in concatenations."""
    own = Atom(OWN, draw(st.shared(st.integers(2, 5), key="extent")))
    if depth == 0:
        return own
    inner = draw(terms(depth - 1))
    others = [Atom(i + 2, n) for i, n in enumerate(draw(st.lists(st.integers(2, 4), max_size=2)))]
    place = draw(st.integers(0, len(others)))
    parts = tuple([*others[:place], inner, *others[place:]])
    kind = draw(st.sampled_from(["same", "product", "concat"]))
    if kind == "same" or len(parts) == 1:
        return inner
    if kind == "concat":
        pieces = tuple(p for part in parts for p in _flat(part, Concat))
        return Concat(pieces, sum(p.extent for p in pieces))
    factors = tuple(f for part in parts for f in _flat(part, Product))
    extent = 1
    for factor in factors:
        extent *= factor.extent
    return Product(factors, extent)


def _flat(term: Term, kind: type) -> tuple[Term, ...]:
    if not isinstance(term, kind):
        return (term,)
    if isinstance(term, Product):
        return term.factors
    assert isinstance(term, Concat)
    return term.pieces


@settings(max_examples=200, deadline=None)
@given(terms(), st.data())
def test_indices_are_those_whose_unit_is_chosen(term: Term, data: st.DataObject) -> None:
    owner = unit_indices(term, OWN)
    units = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=int(owner.max()) + 1, max_size=5))
    )[: int(owner.max()) + 1]
    expected = [i for i, unit in enumerate(owner.tolist()) if unit >= 0 and units[unit]]
    assert indices_of(term, OWN, units).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(terms())
def test_sums_add_up_the_indices_of_each_unit(term: Term) -> None:
    owner = unit_indices(term, OWN)
    values = torch.arange(1.0, len(owner) + 1, dtype=torch.float64)
    expected = [float(values[owner == unit].sum()) for unit in range(int(owner.max()) + 1)]
    # Sums of small whole numbers have no rounding.
    assert sum_by_unit(term, OWN, values).tolist() == expected
