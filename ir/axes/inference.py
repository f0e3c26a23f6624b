"""Giving every axis of every tensor its term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from torchlathe.ir.analysis import Analysis
from torchlathe.ir.axes.extents import Extent, divide, is_static, same
from torchlathe.ir.axes.rule import Layout, Terms
from torchlathe.ir.axes.table import rule_of
from torchlathe.ir.axes.terms import ONE, Atom, Mismatch, Pin, Product, Solver, Term
from torchlathe.ir.extents import expression
from torchlathe.ir.inputs import input_paths
from torchlathe.ir.provenance import info, module_path, source_line

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["AxisMap", "AxisTerms", "Inference", "is_one"]


@dataclass(frozen=True, eq=False)
class AxisMap:
    """The result of `AxisTerms`.

    Attributes:
        layouts: Letters of the contractions, by node.
        atoms: All free atoms, in order of creation.
        unruled: Ops without a rule that were met, with how many nodes each.
    """

    layouts: Mapping[fx.Node, Layout]
    atoms: tuple[Atom, ...]
    unruled: Mapping[str, int]
    _terms: Mapping[fx.Node, Terms]
    _solver: Solver
    _first: Mapping[fx.Node, Terms] = field(default_factory=dict)

    def terms(self, node: fx.Node) -> tuple[Term, ...]:
        """One resolved term per dimension of a tensor; empty for anything else."""
        found = self._terms.get(node, ())
        return found if isinstance(found, tuple) else ()

    def has(self, node: fx.Node) -> bool:
        """Whether a node has tensors, and so terms."""
        return node in self._terms

    def terms_of(self, node: fx.Node, index: int) -> tuple[Term, ...]:
        """The terms of one result of an op with several."""
        found = self._terms.get(node, ())
        return (found[index] or ()) if isinstance(found, list) else ()

    def results(self, node: fx.Node) -> list[tuple[Term, ...] | None]:
        """The terms of every result of a node."""
        found = self._terms.get(node, ())
        return found if isinstance(found, list) else [found]

    def resolve(self, term: Term) -> Term:
        """A term as it stands after unification."""
        return self._solver.resolve(term)

    def atoms_of(self, term: Term) -> list[Atom]:
        """The free atoms of a term, in order, with repetitions."""
        return list(self._solver.atoms(term))

    def trail(self, node: fx.Node, axis: int, atom: Atom) -> list[tuple[Atom, fx.Node]]:
        """How an axis of a tensor came to hold a free atom.

        Returns:
            The variables that were bound on the way, with the nodes that did it, beginning at the
            variable that the axis had at first; empty if that one is the atom.
        """
        first = self._first.get(node)
        if not isinstance(first, tuple):
            return []
        return self._descend(first[axis], atom, set()) or []

    def _descend(self, term: Term, goal: Atom, seen: set[int]) -> list[tuple[Atom, fx.Node]] | None:
        steps: list[tuple[Atom, fx.Node]] = []
        while isinstance(term, Atom):  # no recursion: a chain may be as long as the graph
            if term is goal:
                return steps
            if term.number in seen or term.number not in self._solver.bindings:
                return None
            seen.add(term.number)
            bound, cause = self._solver.bindings[term.number]
            assert isinstance(cause, fx.Node)
            steps.append((term, cause))
            term = bound
        for part in term.factors if isinstance(term, Product) else term.pieces:
            if (found := self._descend(part, goal, seen)) is not None:
                return steps + found
        return None


@dataclass(frozen=True)
class AxisTerms(Analysis[AxisMap]):
    """Terms of all axes of a program, by unification over its ops (own)."""

    name: ClassVar[str] = "axis-terms"

    def compute(self, program: Program) -> AxisMap:
        """Run the rules over the graph, in one pass and in execution order."""
        return Inference(program).run()

    def same(self, a: AxisMap, b: AxisMap) -> bool:
        """Equal up to which nodes they talk about: the same terms in the same order."""
        return [str(t) for t in a._terms.values()] == [str(t) for t in b._terms.values()]


@dataclass
class Inference:
    """The state of one inference, and what rules call.

    A failed unification pins both sides and goes on: the program stays analysable, and the pin
    says why those axes cannot be erased.
    """

    program: Program
    solver: Solver = field(default_factory=Solver)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    unruled: dict[str, int] = field(default_factory=dict)
    _terms: dict[fx.Node, Terms] = field(default_factory=dict)
    _node: fx.Node | None = None

    def run(self) -> AxisMap:
        """Visit every node."""
        inputs = dict(zip(self.program.input_nodes, input_paths(self.program), strict=False))
        for node in self.program.graph.nodes:
            self._node = self.solver.cause = node
            if node.op == "placeholder":
                self._placeholder(node, inputs)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for used in node.all_input_nodes:
                    for terms in self.results(used):
                        self.pin_all(terms or (), "it is an axis of an output of the model")
        resolved: dict[fx.Node, Terms] = {}
        atoms: dict[int, Atom] = {}
        for node, found in self._terms.items():
            flat = found if isinstance(found, list) else [found]
            done = [None if t is None else tuple(map(self.solver.resolve, t)) for t in flat]
            resolved[node] = done if isinstance(found, list) else done[0] or ()
            for t in done:
                for term in t or ():
                    self._pin_beside_dynamic(term, node)
                    for atom in self.solver.atoms(term):
                        atoms[atom.number] = atom
        ordered = tuple(atoms[n] for n in sorted(atoms))
        return AxisMap(self.layouts, ordered, self.unruled, resolved, self.solver, self._terms)

    def _pin_beside_dynamic(self, term: Term, node: fx.Node) -> None:
        """An axis ``s + 16`` has no factor to rescale sizes by, so the 16 have to stay."""
        if isinstance(term, Atom) or is_static(term.extent):
            return
        if isinstance(term, Product):
            for factor in term.factors:
                self._pin_beside_dynamic(factor, node)
        else:
            self._node = node
            self.pin(term, "it lies end to end with a dynamic axis")

    def _placeholder(self, node: fx.Node, inputs: Mapping[fx.Node, str]) -> None:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return
        terms = tuple(self.fresh(d) for d in node.meta["val"].shape)
        self._terms[node] = terms
        if info(node).tensor is None:
            self.pin_all(terms, f"it is an axis of the input {inputs.get(node, node.name)}")

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not _has_tensor(value):
            return
        rule = rule_of(node)
        if rule is None:
            self._opaque(node)
            return
        try:
            self._terms[node] = rule.infer(node, self)
        except Mismatch as mismatch:
            self._opaque(
                node,
                f"{_op_name(node)} relates axes in a way without a common refinement: {mismatch}",
            )

    def _opaque(self, node: fx.Node, reason: str | None = None) -> None:
        """Pin everything that an op touches, since nothing is known about it."""
        name = _op_name(node)
        if reason is None:
            self.unruled[name] = self.unruled.get(name, 0) + 1
            reason = f"{name} has no axis rule"
        for used in node.all_input_nodes:
            for terms in self.results(used):
                self.pin_all(terms or (), reason)
        fresh = self.fresh_results(node)
        self._terms[node] = fresh
        for result in fresh if isinstance(fresh, list) else [fresh]:
            self.pin_all(result or (), reason)

    # -- what rules call ---------------------------------------------------------------------

    def terms(self, node: Any) -> tuple[Term, ...]:
        """The terms of a tensor argument, one per dimension; not yet resolved."""
        found = self._terms.get(node, ())
        return found if isinstance(found, tuple) else ()

    def results(self, node: fx.Node) -> list[tuple[Term, ...] | None]:
        """The terms of every result of a node."""
        found = self._terms.get(node, ())
        return found if isinstance(found, list) else [found]

    def shape(self, node: fx.Node) -> tuple[Extent, ...]:
        """Extents of a node's (only) result."""
        return tuple(expression(d) for d in node.meta["val"].shape)

    def fresh(self, dim: Any) -> Term:
        """A new atom for a dimension of a fake tensor (or an extent)."""
        return self.solver.atom(expression(dim) if isinstance(dim, torch.SymInt) else dim)

    def fresh_results(self, node: fx.Node) -> Terms:
        """New atoms for every axis of every result."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return tuple(self.fresh(d) for d in value.shape)
        return [
            tuple(self.fresh(d) for d in v.shape) if isinstance(v, torch.Tensor) else None
            for v in value
        ]

    def unify(self, a: Term, b: Term) -> Term:
        """Unify two terms; where that fails, pin both with the reason. Returns the first."""
        try:
            self.solver.unify(a, b)
        except Mismatch as mismatch:
            reason = f"its structure does not fit at {_op_name(self._node)}: {mismatch}"
            self.pin(a, reason)
            self.pin(b, reason)
        return a

    def pin(self, term: Term, reason: str) -> None:
        """Declare that every index of a term must stay, because of the current node."""
        self.pin_all((term,), reason)

    def pin_all(self, terms: Sequence[Term], reason: str) -> None:
        """Pin several terms for one reason."""
        node = self._node
        assert node is not None
        where = ", ".join(filter(None, (module_path(node), source_line(node))))
        pin = Pin(reason, node.name, where)
        for term in terms:
            self.solver.pin(term, pin)

    def split(self, term: Term, inner: Extent) -> tuple[Term, Term]:
        """``outer x inner``; pins and makes new atoms where the structure does not allow it."""
        try:
            return self.solver.split(term, inner)
        except Mismatch as mismatch:
            self.pin(term, f"it cannot be split by {inner} at {_op_name(self._node)}: {mismatch}")
            outer = divide(term.extent, inner)
            parts = self.fresh(outer), self.fresh(inner)
            self.pin_all(
                parts, f"the axis that it is split from at {_op_name(self._node)} is fixed"
            )
            return parts

    def cut(self, term: Term, position: Extent) -> tuple[Term, Term]:
        """``[left | right]``; pins and makes new atoms where the structure does not allow it."""
        try:
            return self.solver.cut(term, position)
        except Mismatch as mismatch:
            self.pin(term, f"{_op_name(self._node)} cuts it at {position}: {mismatch}")
            parts = self.fresh(position), self.fresh(term.extent - position)
            self.pin_all(parts, f"the axis that it is cut from at {_op_name(self._node)} is fixed")
            return parts

    def broadcast(self, operands: Sequence[tuple[Term, ...]], rank: int) -> tuple[Term, ...]:
        """Unify axes aligned at the right; an axis of extent 1 fits everything."""
        out: list[Term] = []
        for axis in range(rank):
            result: Term = ONE
            for terms in operands:
                index = axis - rank + len(terms)
                if index < 0 or is_one(terms[index]):
                    continue
                result = terms[index] if result is ONE else self.unify(result, terms[index])
            out.append(result)
        return tuple(out)

    def reshape(self, terms: Sequence[Term], shape: Sequence[Extent]) -> tuple[Term, ...]:
        """Terms of the same elements in another shape, row-major.

        Axes are matched in blocks of equal size; inside a block, factors are regrouped, and split
        where the new shape cuts through them. A block that cannot be regrouped is pinned.
        """
        out: list[Term] = []
        i = 0
        j = 0
        while j < len(shape) or i < len(terms):
            start_i, start_j = i, j
            have: Extent = 1
            want: Extent = 1
            if i < len(terms):
                have, i = terms[i].extent, i + 1
            if j < len(shape):
                want, j = shape[j], j + 1
            while not same(have, want):
                grow_in = i < len(terms) and (
                    j >= len(shape)
                    or (
                        have < want
                        if is_static(have) and is_static(want)
                        else divide(want, have) is not None or divide(have, want) is None
                    )
                )
                if grow_in:
                    have, i = have * terms[i].extent, i + 1
                elif j < len(shape):
                    want, j = want * shape[j], j + 1
                else:
                    break
            out.extend(self._regroup(terms[start_i:i], shape[start_j:j]))
        return tuple(out)

    def _regroup(self, terms: Sequence[Term], shape: Sequence[Extent]) -> list[Term]:
        solver = self.solver
        remaining = [f for t in terms for f in solver.factors(t)]
        out: list[Term] = []
        try:
            for extent in shape:
                taken: list[Term] = []
                missing = extent
                while not same(missing, 1):
                    if not remaining:
                        raise Mismatch("no factors left")
                    first = remaining.pop(0)
                    left = divide(missing, first.extent)
                    if left is not None:
                        taken.append(first)
                        missing = left
                        continue
                    inner = divide(first.extent, missing)
                    if inner is None:
                        raise Mismatch(f"{first.extent} is not a multiple of {missing}")
                    outer, rest = solver.split(first, inner)
                    taken.append(outer)
                    # Splitting may have refined factors that are still to come.
                    remaining = [f for t in (rest, *remaining) for f in solver.factors(t)]
                    missing = 1
                out.append(solver.product(taken))
            if any(not same(f.extent, 1) for f in remaining):
                raise Mismatch("factors left over")
        except Mismatch as mismatch:
            reason = f"{_op_name(self._node)} cuts through it: {mismatch}"
            self.pin_all(terms, reason)
            out = [self.fresh(e) for e in shape]
            self.pin_all(out, reason)
        return out


def is_one(term: Term) -> bool:
    """Whether an axis has extent 1, and so broadcasts."""
    return is_static(term.extent) and bool(term.extent == 1)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value)


def _op_name(node: fx.Node | None) -> str:
    if node is None:
        return "?"
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).replace("::", ".") if schema is not None else str(node.name)
