"""Axis terms, and the unification that finds which axes are one and the same.

A term says what the indices of an axis stand for:

- an `Atom` is a dimension variable with an extent;
- a `Product` of terms is row-major (``768 = 12 heads x 64``);
- a `Concat` of terms lies end to end (``[q | k | v]``).

Atoms are variables: unifying an atom with another term binds it, and everything that mentions
the atom follows. Two compound terms are brought to a common refinement, by splitting atoms
where products disagree and by cutting them where concatenations do. What has no common
refinement raises `Mismatch`, and the caller pins both sides. (Own; unification as in type
inference, with products and concatenations as the two constructors.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torchlathe.ir.axes.extents import Extent, divide, is_static, multiply, same, subtract

__all__ = ["ONE", "Atom", "Concat", "Mismatch", "Pin", "Product", "Solver", "Term"]


@dataclass(frozen=True)
class Pin:
    """Why indices of an atom cannot be erased.

    Attributes:
        reason: What needs every index to stay, as a clause.
        node: Name of the node that needs it; "" for none.
        where: Module path and source line, for the user.
    """

    reason: str
    node: str = ""
    where: str = ""

    def __str__(self) -> str:
        return self.reason + (f" ({self.where})" if self.where else "")


# One reason is enough to keep an atom; a few help to understand it.
_MAX_PINS = 4


class Atom:
    """A dimension variable.

    Attributes:
        number: Creation order; names the atom in print.
        extent: Number of indices.
        bound: The term that it stands for, once unification found out; else None.
        pins: Why its indices must stay; empty for a free atom.
    """

    __slots__ = ("bound", "extent", "number", "pins")

    def __init__(self, number: int, extent: Extent) -> None:
        self.number = number
        self.extent = extent
        self.bound: Term | None = None
        self.pins: list[Pin] = []

    def __repr__(self) -> str:
        return f"a{self.number}:{self.extent}"


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major product; the first factor is the outermost."""

    factors: tuple[Term, ...]
    extent: Extent

    def __repr__(self) -> str:
        return "*".join(map(str, self.factors)) if self.factors else "1"


@dataclass(frozen=True, eq=False)
class Concat:
    """Terms end to end."""

    pieces: tuple[Term, ...]
    extent: Extent

    def __repr__(self) -> str:
        return "[" + "|".join(map(str, self.pieces)) + "]"


Term: TypeAlias = Atom | Product | Concat

ONE = Product((), 1)


class Mismatch(Exception):  # noqa: N818 - internal control flow, not an error a user sees
    """Two terms without a common refinement."""


class Solver:
    """Creates atoms and unifies terms.

    Attributes:
        cause: What unifies at the moment; the inference puts the node here.
        bindings: By number of each bound atom, the term it was bound to and the cause. Paths get
            compressed later, this record does not, so that one can tell how two axes met.
    """

    def __init__(self) -> None:
        self.count = 0
        self.cause: object = None
        self.bindings: dict[int, tuple[Term, object]] = {}

    # -- making ----------------------------------------------------------------------------

    def atom(self, extent: Extent) -> Term:
        """A new variable; an axis of extent 1 has nothing to vary and is `ONE`."""
        if is_static(extent) and extent == 1:
            return ONE
        self.count += 1
        return Atom(self.count, extent)

    def product(self, terms: Iterable[Term]) -> Term:
        """The row-major product, flattened."""
        factors = [f for t in terms for f in self.factors(t)]
        if len(factors) == 1:
            return factors[0]
        return Product(tuple(factors), multiply(f.extent for f in factors)) if factors else ONE

    def concat(self, terms: Iterable[Term]) -> Term:
        """The concatenation, flattened."""
        pieces = [p for t in terms for p in self.pieces(t)]
        if len(pieces) == 1:
            return pieces[0]
        extent: Extent = 0
        for piece in pieces:
            extent = extent + piece.extent
        return Concat(tuple(pieces), extent)

    # -- reading ---------------------------------------------------------------------------

    @staticmethod
    def find(term: Term) -> Term:
        """What the term stands for now, one level deep."""
        while isinstance(term, Atom) and term.bound is not None:
            bound = term.bound
            if isinstance(bound, Atom) and bound.bound is not None:
                term.bound = bound.bound  # path compression
            term = bound
        return term

    def factors(self, term: Term) -> list[Term]:
        """The factors of a term, none of which is a product."""
        term = self.find(term)
        if isinstance(term, Product):
            return [f for part in term.factors for f in self.factors(part)]
        return [term]

    def pieces(self, term: Term) -> list[Term]:
        """The pieces of a term, none of which is a concatenation."""
        term = self.find(term)
        if isinstance(term, Concat):
            return [p for part in term.pieces for p in self.pieces(part)]
        return [term]

    def resolve(self, term: Term) -> Term:
        """The term with every bound atom replaced, flattened."""
        term = self.find(term)
        if isinstance(term, Atom):
            return term
        if isinstance(term, Product):
            return self.product(self.resolve(f) for f in term.factors)
        return self.concat(self.resolve(p) for p in term.pieces)

    def atoms(self, term: Term) -> Iterator[Atom]:
        """The free atoms of a term, with repetitions."""
        term = self.find(term)
        if isinstance(term, Atom):
            yield term
        else:
            parts = term.factors if isinstance(term, Product) else term.pieces
            for part in parts:
                yield from self.atoms(part)

    # -- pinning ---------------------------------------------------------------------------

    def pin(self, term: Term, pin: Pin) -> None:
        """Declare that every index of the term must stay."""
        for atom in self.atoms(term):
            if len(atom.pins) < _MAX_PINS and pin not in atom.pins:
                atom.pins.append(pin)

    def _bind(self, atom: Atom, term: Term) -> None:
        if any(a is atom for a in self.atoms(term)):
            raise Mismatch(f"{atom} would contain itself")
        atom.bound = term
        self.bindings[atom.number] = (term, self.cause)
        for pin in atom.pins:
            self.pin(term, pin)

    # -- refining --------------------------------------------------------------------------

    def split(self, term: Term, inner: Extent) -> tuple[Term, Term]:
        """Write a term as ``outer x inner`` with the given inner extent.

        Raises:
            Mismatch: The inner extent does not fit the term's structure.
        """
        remaining = self.factors(term)
        taken: list[Term] = []
        while not same(inner, 1):
            if not remaining:
                raise Mismatch(f"{inner} does not divide")
            last = remaining.pop()
            left = divide(inner, last.extent)
            if left is not None:
                taken.insert(0, last)
                inner = left
                continue
            outer, part = self._split_one(last, inner)
            remaining.append(outer)
            taken.insert(0, part)
            break
        return self.product(remaining), self.product(taken)

    def _split_one(self, term: Term, inner: Extent) -> tuple[Term, Term]:
        outer_extent = divide(term.extent, inner)
        if outer_extent is None:
            raise Mismatch(f"{inner} does not divide {term.extent}")
        if isinstance(term, Atom):
            outer, part = self.atom(outer_extent), self.atom(inner)
            self._bind(term, self.product((outer, part)))
            return outer, part
        assert isinstance(term, Concat)
        halves = [self.split(piece, inner) for piece in self.pieces(term)]
        first = halves[0][1]
        for _, other in halves[1:]:
            self.unify(first, other)
        return self.concat(outer for outer, _ in halves), first

    def cut(self, term: Term, position: Extent) -> tuple[Term, Term]:
        """Write a term as ``[left | right]`` with the given left extent, strictly inside.

        Raises:
            Mismatch: The position is inside a part that cannot be cut there.
        """
        term = self.find(term)
        if isinstance(term, Atom):
            if not (is_static(term.extent) and is_static(position)):
                raise Mismatch(f"{term.extent} cannot be cut at {position}")
            left, right = self.atom(position), self.atom(term.extent - position)
            self._bind(term, self.concat((left, right)))
            return left, right
        if isinstance(term, Concat):
            return self._cut_concat(term, position)
        factors = self.factors(term)
        if len(factors) < 2:
            raise Mismatch("an axis of extent 1 cannot be cut")
        inner = self.product(factors[1:])
        outer_position = divide(position, inner.extent)
        if outer_position is None:
            raise Mismatch(f"{term} cannot be cut at {position}")
        left, right = self.cut(factors[0], outer_position)
        return self.product((left, inner)), self.product((right, inner))

    def _cut_concat(self, term: Concat, position: Extent) -> tuple[Term, Term]:
        before: list[Term] = []
        after = self.pieces(term)
        while after and not same(position, 0):
            piece = after[0]
            if is_static(piece.extent) and is_static(position) and piece.extent > position:
                left, right = self.cut(piece, position)
                before.append(left)
                after[0] = right
                return self.concat(before), self.concat(after)
            before.append(after.pop(0))
            position = subtract(position, piece.extent)
            if is_static(position) and position < 0:
                raise Mismatch(f"{term} cannot be cut inside a dynamic part")
        if not before or not after or not same(position, 0):
            raise Mismatch(f"{term} cannot be cut there")
        return self.concat(before), self.concat(after)

    # -- unifying --------------------------------------------------------------------------

    def unify(self, a: Term, b: Term) -> None:
        """Make two terms stand for the same indices.

        Raises:
            Mismatch: They have no common refinement. Bindings made on the way stay; the caller
                pins both terms, which makes them harmless.
        """
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        if not same(a.extent, b.extent):
            raise Mismatch(f"{a.extent} against {b.extent}")
        if isinstance(a, Atom) and isinstance(b, Atom):
            # The older atom stays, so that names do not depend on the order of unification.
            old, new = (a, b) if a.number < b.number else (b, a)
            self._bind(new, old)
        elif isinstance(a, Atom):
            self._unify_atom(a, b)
        elif isinstance(b, Atom):
            self._unify_atom(b, a)
        elif isinstance(a, Product) and isinstance(b, Product):
            self._unify_products(self.factors(a), self.factors(b))
        elif isinstance(a, Concat) and isinstance(b, Concat):
            self._unify_concats(self.pieces(a), self.pieces(b))
        elif isinstance(a, Product):
            assert isinstance(b, Concat)
            self._unify_mixed(a, b)
        else:
            assert isinstance(b, Product)
            self._unify_mixed(b, a)

    def _unify_atom(self, atom: Atom, term: Term) -> None:
        # A one-factor product or one-piece concatenation is what it holds.
        parts = self.factors(term) if isinstance(term, Product) else self.pieces(term)
        if len(parts) == 1:
            self.unify(atom, parts[0])
        else:
            self._bind(atom, term)

    def _unify_products(self, left: list[Term], right: list[Term]) -> None:
        while left and right:
            x, y = left[0], right[0]
            if same(x.extent, y.extent):
                self.unify(x, y)
                left.pop(0)
                right.pop(0)
            elif (inner := divide(x.extent, y.extent)) is not None:
                outer, rest = self.split(x, inner)
                self.unify(outer, y)
                left[:1] = self.factors(rest)
                right.pop(0)
            elif (inner := divide(y.extent, x.extent)) is not None:
                outer, rest = self.split(y, inner)
                self.unify(x, outer)
                left.pop(0)
                right[:1] = self.factors(rest)
            else:
                raise Mismatch(f"{x.extent} against {y.extent}")
            # Unifying may have bound what is still to come.
            left = [f for t in left for f in self.factors(t)]
            right = [f for t in right for f in self.factors(t)]
        if left or right:
            raise Mismatch("products of different length")

    def _unify_concats(self, left: list[Term], right: list[Term]) -> None:
        while left and right:
            x, y = left[0], right[0]
            if same(x.extent, y.extent):
                self.unify(x, y)
                left.pop(0)
                right.pop(0)
            elif not (is_static(x.extent) and is_static(y.extent)):
                raise Mismatch(f"{x.extent} against {y.extent}")
            elif x.extent < y.extent:
                head, rest = self.cut(y, x.extent)
                self.unify(x, head)
                left.pop(0)
                right[:1] = [rest]
            else:
                head, rest = self.cut(x, y.extent)
                self.unify(head, y)
                left[:1] = [rest]
                right.pop(0)
            left = [p for t in left for p in self.pieces(t)]
            right = [p for t in right for p in self.pieces(t)]
        if left or right:
            raise Mismatch("concatenations of different length")

    def _unify_mixed(self, product: Product, concat: Concat) -> None:
        factors = self.factors(product)
        if len(factors) == 1:
            self.unify(factors[0], concat)
            return
        # [a | b] is o x i with i shared by the pieces, if i divides each of them.
        inner = self.product(factors[1:])
        outer, part = self._split_one(concat, inner.extent)
        self.unify(outer, factors[0])
        self.unify(part, inner)
