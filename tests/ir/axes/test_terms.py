"""The solver of axis terms: laws of unification, and what masks of terms mean."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx

from torchlathe.ir.axes import (
    ONE,
    Atom,
    AxisMap,
    Concat,
    Inference,
    Pin,
    Product,
    Resize,
    Term,
)
from torchlathe.ir.axes.extents import divide, is_static, multiply, same
from torchlathe.ir.axes.terms import Mismatch, Solver

S = sympy.Symbol("s0", integer=True, positive=True)
T = sympy.Symbol("s1", integer=True, positive=True)


# -- random terms, as plain data so that they can be built twice -----------------------------


@st.composite
def plans(draw: st.DrawFn, extent: int, depth: int = 2) -> Any:
    """An atom ``extent``, a product ``("*", ...)`` or a concatenation ``("|", ...)``."""
    divisors = [d for d in range(2, extent) if extent % d == 0]
    kinds = ["atom"]
    if depth and divisors:
        kinds.append("*")
    if depth and extent > 1:
        kinds.append("|")
    kind = draw(st.sampled_from(kinds))
    if kind == "atom":
        return extent
    if kind == "*":
        inner = draw(st.sampled_from(divisors))
        parts = [extent // inner, inner]
    else:
        first = draw(st.integers(1, extent - 1))
        parts = [first, extent - first]
    return (kind, *(draw(plans(part, depth - 1)) for part in parts))


def build(solver: Solver, plan: Any) -> Term:
    if isinstance(plan, int):
        return solver.atom(plan)
    parts = [build(solver, part) for part in plan[1:]]
    return solver.product(parts) if plan[0] == "*" else solver.concat(parts)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Any, Any]:
    extent = draw(st.sampled_from([4, 6, 8, 12, 16, 24]))
    return draw(plans(extent)), draw(plans(extent))


def shape_of(term: Term) -> Any:
    """The structure without the names."""
    if isinstance(term, Atom):
        return term.extent
    if isinstance(term, Product):
        return ("*", *map(shape_of, term.factors))
    return ("|", *map(shape_of, term.pieces))


def resize(solver: Solver, kept: dict[int, torch.Tensor]) -> Resize:
    return Resize(AxisMap({}, (), {}, {}, solver), kept, None)  # type: ignore[arg-type]


def random_masks(solver: Solver, terms: list[Term], seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    atoms = {a.number: a for term in terms for a in solver.atoms(term)}
    return {
        number: torch.rand(atom.extent, generator=generator) < 0.6
        for number, atom in sorted(atoms.items())
    }


def mask_of(kept: Resize, term: Term) -> list[bool]:
    mask = kept.mask(term)
    return [True] * int(term.extent) if mask is None else mask.tolist()


def unified(a: Any, b: Any) -> tuple[Solver, Term, Term] | None:
    solver = Solver()
    left, right = build(solver, a), build(solver, b)
    try:
        solver.unify(left, right)
    except Mismatch:
        return None
    return solver, left, right


# -- laws ------------------------------------------------------------------------------------


@given(pairs(), st.integers(0, 1000))
def test_unified_terms_have_one_mask(pair: tuple[Any, Any], seed: int) -> None:
    found = unified(*pair)
    if found is None:
        return
    solver, left, right = found
    kept = resize(solver, random_masks(solver, [left, right], seed))
    assert left.extent == right.extent
    assert mask_of(kept, left) == mask_of(kept, right)
    assert kept.extent(left) == sum(mask_of(kept, left))


@given(pairs())
def test_unify_is_symmetric(pair: tuple[Any, Any]) -> None:
    one, two = unified(*pair), unified(*reversed(pair))
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        solver, left, right = one
        assert shape_of(solver.resolve(left)) == shape_of(two[0].resolve(two[2]))
        assert shape_of(solver.resolve(right)) == shape_of(two[0].resolve(two[1]))


def joins_inside(plan: Any, product: bool = False) -> bool:
    """Whether a factor of a product is a concatenation."""
    if isinstance(plan, int):
        return False
    return (product and plan[0] == "|") or any(joins_inside(p, plan[0] == "*") for p in plan[1:])


@given(pairs())
def test_unify_is_idempotent(pair: tuple[Any, Any]) -> None:
    # [3|21] ~ 8 x [1|2] binds the 3 to [1|2], which lies flat in the concatenation from then on
    # and no longer divides: the second time pins, which is safe.
    assume(not any(map(joins_inside, pair)))
    found = unified(*pair)
    if found is None:
        return
    solver, left, right = found
    before, made = (str(solver.resolve(left)), str(solver.resolve(right))), solver.count
    solver.unify(left, right)
    solver.unify(right, left)
    solver.unify(left, left)
    assert (str(solver.resolve(left)), str(solver.resolve(right))) == before
    assert solver.count == made


@given(st.sampled_from([6, 8, 12, 24]).flatmap(plans), st.data())
def test_split_round_trip(plan: Any, data: st.DataObject) -> None:
    solver = Solver()
    term = build(solver, plan)
    inner = data.draw(st.sampled_from([d for d in range(1, 25) if term.extent % d == 0]))
    try:
        outer, part = solver.split(term, inner)
    except Mismatch:
        return
    assert (outer.extent, part.extent) == (term.extent // inner, inner)
    together = solver.product((outer, part))
    kept = resize(solver, random_masks(solver, [term, together], 1))
    assert mask_of(kept, term) == mask_of(kept, together)


@given(st.sampled_from([6, 8, 12, 24]).flatmap(plans), st.data())
def test_cut_round_trip(plan: Any, data: st.DataObject) -> None:
    solver = Solver()
    term = build(solver, plan)
    position = data.draw(st.integers(1, term.extent - 1))
    try:
        left, right = solver.cut(term, position)
    except Mismatch:
        return
    assert (left.extent, right.extent) == (position, term.extent - position)
    together = solver.concat((left, right))
    kept = resize(solver, random_masks(solver, [term, together], 1))
    assert mask_of(kept, term) == mask_of(kept, together)
    assert kept.position(term, position) == sum(mask_of(kept, left))


@given(st.sampled_from([6, 8, 12]).flatmap(plans))
def test_resolving_is_flat(plan: Any) -> None:
    solver = Solver()
    term = solver.resolve(build(solver, plan))

    def check(term: Term) -> None:
        if isinstance(term, Product):
            assert len(term.factors) != 1
            assert not any(isinstance(f, Product) for f in term.factors)
        for part in (
            ()
            if isinstance(term, Atom)
            else (term.factors if isinstance(term, Product) else term.pieces)
        ):
            check(part)

    check(term)
    assert solver.resolve(term).extent == term.extent


def test_names_do_not_depend_on_the_order() -> None:
    solver = Solver()
    a, b = solver.atom(4), solver.atom(4)
    solver.unify(b, a)
    assert str(solver.resolve(b)) == "a1:4"


def test_print() -> None:
    solver = Solver()
    a, b, c = solver.atom(2), solver.atom(3), solver.atom(6)
    assert str(solver.concat((solver.product((a, b)), c))) == "[a1:2*a2:3|a3:6]"
    assert str(ONE) == "1"
    assert solver.atom(1) is ONE
    assert solver.product(()) is ONE
    assert solver.product((a,)) is a
    assert solver.concat((a,)) is a


def test_qkv() -> None:
    solver = Solver()
    qkv = solver.atom(24)
    heads = solver.atom(4)
    outer, dim = solver.split(qkv, 2)
    three, own = solver.split(outer, 4)
    solver.unify(own, heads)
    assert shape_of(solver.resolve(qkv)) == ("*", 3, 4, 2)
    assert three.extent == 3
    assert dim.extent == 2


def test_split_distributes_over_pieces() -> None:
    solver = Solver()
    q, k = solver.atom(8), solver.atom(4)
    outer, inner = solver.split(solver.concat((q, k)), 2)
    assert shape_of(solver.resolve(outer)) == ("|", 4, 2)
    # Both share the inner factor.
    assert solver.factors(q)[1] is solver.factors(k)[1] is solver.find(inner)


# -- what cannot be ---------------------------------------------------------------------------


def test_occurs_check() -> None:
    solver = Solver()
    a = solver.atom(12)
    outer, inner = solver.split(a, 3)
    swapped = solver.product((inner, outer))
    with pytest.raises(Mismatch):
        solver.unify(a, swapped)  # o x i is i x o of no finite structure
    b = solver.atom(4)
    with pytest.raises(Mismatch, match="contain itself"):
        solver._bind(b, Concat((b, solver.atom(4)), 8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("left", "right"),
    [(6, 4), (("*", 2, 3), ("*", 3, 2)), (("|", 2, 4), ("*", 2, 3)), (("*", 4, 3), ("*", 6, 2))],
)
def test_mismatch(left: Any, right: Any) -> None:
    assert unified(left, right) is None
    assert unified(right, left) is None


@pytest.mark.parametrize(("plan", "inner"), [(12, 5), (("*", 4, 3), 2), (("|", 4, 3), 2)])
def test_no_split(plan: Any, inner: int) -> None:
    solver = Solver()
    with pytest.raises(Mismatch):
        solver.split(build(solver, plan), inner)


@pytest.mark.parametrize(("plan", "position"), [(("*", 4, 3), 2), (("*", 2, ("|", 1, 2)), 1)])
def test_no_cut(plan: Any, position: int) -> None:
    solver = Solver()
    with pytest.raises(Mismatch):
        solver.cut(build(solver, plan), position)


def test_pins_follow_the_binding() -> None:
    solver = Solver()
    a = solver.atom(6)
    solver.pin(a, Pin("it is an output"))
    outer, inner = solver.split(a, 3)
    other = solver.atom(3)
    solver.unify(other, inner)
    for atom in (*solver.atoms(outer), *solver.atoms(other)):
        assert [str(pin) for pin in atom.pins] == ["it is an output"]


def test_few_pins_are_kept() -> None:
    solver = Solver()
    a = solver.atom(6)
    for i in range(10):
        solver.pin(a, Pin(f"reason {i % 7}", "n", "here"))
    assert isinstance(a, Atom)
    assert len(a.pins) == 4
    assert str(a.pins[0]) == "reason 0 (here)"


# -- symbolic extents --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "quotient"),
    [
        (12, 4, 3), (12, 5, None), (12, 0, None), (0, 3, 0), (12 * S, 4, 3 * S), (12 * S, S, 12),
        (S * T, T, S), (S, 2, None), (S * (T + 1), T + 1, S), (S + 1, S, None), (6, S, None),
        (S**2 + S, S + 1, S), (4 * S + 8, 4, S + 2), (4 * S + 6, 4, None), (S, S, 1),
        (S // 2 * 6, 3, S // 2 * 2),
    ],
)  # fmt: skip
def test_divide(a: Any, b: Any, quotient: Any) -> None:
    found = divide(a, b)
    assert (found is None) == (quotient is None)
    if quotient is not None:
        assert same(found, quotient)
        assert is_static(found) == isinstance(quotient, int)


def test_same() -> None:
    assert same(S * (T + 1), S * T + S)
    assert not same(S, T)
    assert not same(S, 4)
    assert same(multiply([2, S, 3]), 6 * S)


def test_symbolic_products() -> None:
    solver = Solver()
    rows = solver.atom(S * 12)
    outer, inner = solver.split(rows, 4)
    assert same(outer.extent, 3 * S)
    assert inner.extent == 4
    tokens, channels = solver.atom(S), solver.atom(12)
    solver.unify(rows, solver.product((tokens, channels)))
    assert shape_of(solver.resolve(rows)) == ("*", S, 3, 4)
    assert shape_of(solver.resolve(channels)) == ("*", 3, 4)


def test_a_dynamic_axis_is_not_cut_inside() -> None:
    solver = Solver()
    with pytest.raises(Mismatch):
        solver.cut(solver.atom(S), 3)
    left, right = solver.cut(solver.concat((solver.atom(S), solver.atom(4))), S)
    assert same(left.extent, S)
    assert right.extent == 4
    with pytest.raises(Mismatch):
        solver.cut(solver.concat((solver.atom(S), solver.atom(4))), 2)


# -- meaning: terms against explicit indices ---------------------------------------------------


@dataclass
class Traced:
    """A tensor of element numbers, with a term for each of its axes."""

    numbers: np.ndarray
    terms: tuple[Term, ...]


@dataclass
class Machine:
    """Runs the same steps on numbers and on terms."""

    ax: Inference = field(default_factory=lambda: Inference(None))  # type: ignore[arg-type]
    tensors: list[Traced] = field(default_factory=list)
    sources: list[Traced] = field(default_factory=list)
    same: list[tuple[Traced, Traced]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.ax._node = fx.Graph().placeholder("x")

    def source(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        numbers = np.arange(self.count, self.count + size).reshape(shape)
        self.count += size
        made = Traced(numbers, tuple(self.ax.fresh(d) for d in shape))
        self.sources.append(made)
        self.tensors.append(made)

    def reshape(self, t: Traced, shape: tuple[int, ...]) -> None:
        self.tensors.append(Traced(t.numbers.reshape(shape), self.ax.reshape(t.terms, shape)))

    def permute(self, t: Traced, order: tuple[int, ...]) -> None:
        terms = tuple(t.terms[i] for i in order)
        self.tensors.append(Traced(t.numbers.transpose(order), terms))

    def cut(self, t: Traced, axis: int, position: int) -> None:
        parts = self.ax.cut(t.terms[axis], position)
        for numbers, part in zip(np.split(t.numbers, [position], axis), parts, strict=True):
            terms = (*t.terms[:axis], part, *t.terms[axis + 1 :])
            self.tensors.append(Traced(numbers, terms))

    def cat(self, a: Traced, b: Traced, axis: int) -> None:
        terms = list(a.terms)
        for i, (x, y) in enumerate(zip(a.terms, b.terms, strict=True)):
            if i == axis:
                terms[i] = self.ax.solver.concat((x, y))
            elif x.extent != 1:
                self.ax.unify(x, y)
        numbers = np.concatenate([a.numbers, b.numbers], axis)
        self.tensors.append(Traced(numbers, tuple(terms)))

    def add(self, a: Traced, b: Traced) -> None:
        for x, y in zip(a.terms, b.terms, strict=True):
            self.ax.unify(x, y)
        self.same.append((a, b))

    def check(self, seed: int) -> int:
        """Erase random indices of the free atoms; the number of atoms that were free."""
        solver = self.ax.solver
        masks = random_masks(solver, [x for t in self.tensors for x in t.terms], seed)
        free = {
            a.number
            for t in self.tensors
            for term in t.terms
            for a in solver.atoms(term)
            if not a.pins
        }
        kept = resize(solver, {n: m for n, m in masks.items() if n in free})
        alive: set[int] = set()
        for source in self.sources:
            alive |= set(source.numbers[self.keep(source, kept)].tolist())
        for t in self.tensors:
            assert [x.extent for x in t.terms] == list(t.numbers.shape)
            want = np.isin(t.numbers, list(alive))
            assert (self.keep(t, kept) == want).all(), [str(solver.resolve(x)) for x in t.terms]
        for a, b in self.same:
            assert (self.keep(a, kept) == self.keep(b, kept)).all()
        return len(free)

    @staticmethod
    def keep(t: Traced, kept: Resize) -> np.ndarray:
        """Which elements stay, shape of the tensor."""
        rows = [np.array(mask_of(kept, term), dtype=bool) for term in t.terms]
        return functools.reduce(np.logical_and.outer, rows)


def factorings(size: int, rank: int) -> list[tuple[int, ...]]:
    if rank == 1:
        return [(size,)]
    return [
        (d, *rest)
        for d in range(1, size + 1)
        if size % d == 0
        for rest in factorings(size // d, rank - 1)
    ]


@given(st.data())
def test_terms_mean_what_indices_say(data: st.DataObject) -> None:
    draw = data.draw
    machine = Machine()
    for _ in range(draw(st.integers(1, 3))):
        machine.source(draw(st.sampled_from([(4, 6), (2, 12), (12,), (2, 3, 4), (24,), (4, 2, 3)])))
    for _ in range(draw(st.integers(1, 6))):
        t = draw(st.sampled_from(machine.tensors))
        step = draw(st.sampled_from(["reshape", "permute", "cut", "cat", "add"]))
        rank = t.numbers.ndim
        others = [o for o in machine.tensors if o.numbers.shape == t.numbers.shape]
        if step == "reshape":
            rank = draw(st.integers(1, 3))
            machine.reshape(t, draw(st.sampled_from(factorings(t.numbers.size, rank))))
        elif step == "permute":
            machine.permute(t, draw(st.sampled_from(list(itertools.permutations(range(rank))))))
        elif step == "cut":
            axis = draw(st.integers(0, rank - 1))
            if t.numbers.shape[axis] > 1:
                machine.cut(t, axis, draw(st.integers(1, t.numbers.shape[axis] - 1)))
        elif step == "cat":
            machine.cat(t, draw(st.sampled_from(others)), draw(st.integers(0, rank - 1)))
        else:
            machine.add(t, draw(st.sampled_from(others)))
    machine.check(draw(st.integers(0, 1000)))


def test_the_machine_finds_heads() -> None:
    machine = Machine()
    machine.source((2, 24))
    machine.reshape(machine.tensors[-1], (2, 3, 4, 2))
    machine.permute(machine.tensors[-1], (1, 2, 0, 3))
    machine.cut(machine.tensors[-1], 1, 1)
    assert machine.check(0) == 4  # one head and the three others are an atom, and no variable


@given(st.sampled_from([(4, 6), (24,), (2, 3, 4)]), st.data())
def test_reshape_back(shape: tuple[int, ...], data: st.DataObject) -> None:
    machine = Machine()
    machine.source(shape)
    ax = machine.ax
    terms = machine.tensors[0].terms
    there = data.draw(st.sampled_from(factorings(24, data.draw(st.integers(1, 3)))))
    moved = ax.reshape(terms, there)
    if any(a.pins for term in terms for a in ax.solver.atoms(term)):
        return
    back = ax.reshape(moved, shape)
    assert [str(ax.solver.resolve(t)) for t in back] == [str(ax.solver.resolve(t)) for t in terms]
