"""Does erasing commute with an op? Checked against every claim that its rule makes.

An op runs on parameters alone, so that each of its axes may be free. For an atom, and for each
choice of operands that are zero at its erased indices, the rule says through ``Flow`` whether
leaving the indices out is without loss, and what the result holds at them. Whatever it claims
has to be true: the op on the shorter operands, with its arguments resized, gives what the op on
the zeroed operands gives, without the erased indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from torchlathe.ir import Program, capture
from torchlathe.ir.axes import UNKNOWN, ZERO, Atom, AtomIndex, AxisTerms, Flow, Resize, rule_of

__all__ = [
    "Case",
    "Check",
    "Op",
    "captured",
    "case",
    "check_case",
    "check_op",
    "free_atoms",
    "terms_fit",
]

OUTPUT = "it is an axis of an output of the model"


class Op(nn.Module):
    """A function of parameters; integer operands are buffers."""

    def __init__(self, function: Callable[..., Any], *operands: Tensor | tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.names = [f"p{i}" for i in range(len(operands))]
        for name, operand in zip(self.names, operands, strict=True):
            if isinstance(operand, tuple):
                operand = torch.randn(operand, dtype=torch.float64)
            if operand.is_floating_point():
                setattr(self, name, nn.Parameter(operand))
            else:
                self.register_buffer(name, operand)

    def forward(self) -> Any:
        return self.function(*(getattr(self, name) for name in self.names))


@dataclass(frozen=True)
class Check:
    """What was checked of an op.

    Attributes:
        free: Atoms that nothing but the output pins.
        lossless: How many (atom, zeroed operands) the rules claim no loss for.
        claims: How many axes of results they claim a constant for.
    """

    free: int
    lossless: int
    claims: int


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: Test id.
        function: Of the operands.
        operands: Shapes of random float64 tensors, or tensors.
        free: How many atoms nothing pins.
    """

    name: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    free: int


def case(name: str, free: int, function: Callable[..., Any], *operands: Any) -> Any:
    return pytest.param(Case(name, function, operands, free), id=name)


def check_case(op: Case) -> Check:
    """Hold a call to what its rules claim, and to how many atoms they leave free."""
    check = check_op(op.function, *op.operands)
    assert check.free == op.free, [str(a) for a in free_atoms(captured(op.function, *op.operands))]
    return check


def captured(function: Callable[..., Any], *operands: Any) -> Program:
    return capture(Op(function, *operands).eval(), ())


def free_atoms(program: Program) -> list[Atom]:
    """Atoms that nothing pins but that they are on an axis of the output."""
    axis_map = program.analysis(AxisTerms)
    return [
        atom
        for atom in axis_map.atoms
        if isinstance(atom.extent, int)
        and atom.extent > 1
        and all(pin.reason == OUTPUT for pin in atom.pins)
    ]


def terms_fit(program: Program) -> None:
    """Every term has the extent of its axis."""
    axis_map = program.analysis(AxisTerms)
    for node in program.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, list | tuple) else [value]
        for item, terms in zip(values, axis_map.results(node), strict=False):
            if isinstance(item, Tensor):
                assert [t.extent for t in terms or ()] == list(item.shape), (node, terms)


def check_op(function: Callable[..., Any], *operands: Any, erased: int | None = None) -> Check:
    """Hold the rules of a function to all that they claim about its free atoms.

    Args:
        function: Of tensors; returns one or a tuple of them.
        operands: Tensors, or shapes of random float64 ones.
        erased: Erase this many units; by default a random number of them.
    """
    program = captured(function, *operands)
    terms_fit(program)
    lossless = claims = 0
    atoms = free_atoms(program)
    for atom in atoms:
        for zeroed in _choices(program, atom):
            found = _check_atom(program, atom.number, zeroed, erased)
            if found is not None:
                lossless += 1
                claims += found
    return Check(len(atoms), lossless, claims)


def _choices(program: Program, atom: Atom) -> Iterator[frozenset[str]]:
    """All subsets of the float operands that carry the atom."""
    axis_map = program.analysis(AxisTerms)
    names = [
        name
        for name, node in program.tensor_nodes.items()
        if any(atom in axis_map.atoms_of(term) for term in axis_map.terms(node))
        and node.meta["val"].is_floating_point()
    ]
    for count in range(len(names) + 1):
        yield from map(frozenset, itertools.combinations(names, count))


def _check_atom(
    original: Program, number: int, zeroed: frozenset[str], erased: int | None
) -> int | None:
    """The number of constants claimed; None if the rules claim a loss."""
    program = original.copy()
    axis_map = program.analysis(AxisTerms)
    index = AtomIndex(axis_map, program.graph)
    atom = next(a for a in axis_map.atoms if a.number == number)
    flow = Flow(index, atom)
    start = {}
    for name, node in program.tensor_nodes.items():
        value = ZERO if name in zeroed else UNKNOWN
        carries = [atom in axis_map.atoms_of(t) for t in axis_map.terms(node)]
        start[node] = [value if c else None for c in carries]
    flow.run(start)
    if flow.losses:
        return None
    mask = torch.ones(atom.extent, dtype=torch.bool)
    count = int(torch.randint(1, atom.extent, ())) if erased is None else erased
    mask[torch.randperm(atom.extent)[:count]] = False
    masks = {
        node: [Resize(axis_map, {number: mask}, None).mask(t) for t in axis_map.terms(node)]  # type: ignore[arg-type]
        for node in program.tensor_nodes.values()
    }

    def zero(name: str, tensor: Tensor) -> Tensor:
        if name in zeroed:
            tensor = tensor.detach().clone()
            for axis, keep in enumerate(masks[program.tensor_nodes[name]]):
                if keep is not None:
                    tensor.index_fill_(axis, (~keep).nonzero().flatten(), 0)
        return tensor

    seen: dict[fx.Node, Any] = {}
    with torch.no_grad():
        wanted = _run(program, zero, seen)
    claims = _check_values(flow, axis_map, {number: mask}, seen)
    out_terms = _output_terms(program)
    resize_for_outputs = Resize(axis_map, {number: mask}, None)  # type: ignore[arg-type]
    out_masks = [[resize_for_outputs.mask(t) for t in terms] for terms in out_terms]
    before = {name: entry.tensor for name, entry in program.entries.items()}
    twin = {name: zero(name, tensor) for name, tensor in before.items()}
    _erase(program, number, mask, frozenset(flow.corrections), index, twin)
    with torch.no_grad():
        got = _run(program, None, {})
    assert len(got) == len(wanted)
    for short, want, out in zip(got, wanted, out_masks, strict=True):
        for axis, keep in enumerate(out):
            if keep is not None:
                want = want.index_select(axis, keep.nonzero().flatten())
        assert short.shape == want.shape, (program.graph, short.shape, want.shape)
        torch.testing.assert_close(
            short,
            want,
            rtol=1e-11,
            atol=1e-11,
            equal_nan=False,
            msg=lambda m: f"atom a{number}, zero: {sorted(zeroed)}\n{m}\n{program.graph}",
        )
    _check_meta(program)
    return claims


def _run(program: Program, replace: Any, seen: dict[fx.Node, Any]) -> list[Tensor]:
    from torchlathe.ir.interpreting import run_flat

    found = run_flat(program, [], replace_tensor=replace, observe=seen.__setitem__)
    return [value.detach() for value in found if isinstance(value, Tensor)]


def _output_terms(program: Program) -> list[Any]:
    axis_map = program.analysis(AxisTerms)
    outputs: Any = program.output_node.args[0]
    return [axis_map.terms(n) for n in outputs if isinstance(n, fx.Node)]


def _check_values(flow: Flow, axis_map: Any, kept: Any, seen: dict[fx.Node, Any]) -> int:
    """What the flow says of the erased indices of each node is what they hold."""
    resize = Resize(axis_map, kept, None)  # type: ignore[arg-type]
    claims = 0
    for node, values in flow._values.items():
        if node.op != "call_function":
            continue
        rows = values if isinstance(values, list) else [values]
        results = seen[node] if isinstance(seen[node], list | tuple) else [seen[node]]
        for row, result, terms in zip(rows, results, axis_map.results(node), strict=True):
            for axis, (value, term) in enumerate(zip(row, terms or (), strict=True)):
                keep = resize.mask(term)
                assert (value is None) == (keep is None), (node, axis, value)
                if value is None or keep is None or value.constant is None or not result.numel():
                    continue
                claims += 1
                held = result.index_select(axis, (~keep).nonzero().flatten()).double()
                assert torch.allclose(
                    held, torch.full_like(held, value.constant), rtol=1e-12, atol=0
                ), f"{node} claims {value} on axis {axis}, holds {held}"
    return claims


def _erase(
    program: Program,
    number: int,
    mask: Tensor,
    corrected: frozenset[fx.Node],
    index: AtomIndex,
    twin: dict[str, Tensor],
) -> None:
    """As ``erase_units`` does it, with an atom that only the output pins."""
    axis_map = index.axis_map
    with program.edit("test") as edit:
        resize = Resize(axis_map, {number: mask}, edit, corrected, twin.__getitem__)
        for name, node in program.tensor_nodes.items():
            keep = {
                axis: m.nonzero().flatten()
                for axis, term in enumerate(axis_map.terms(node))
                if (m := resize.mask(term)) is not None
            }
            if keep:
                edit.keep(name, keep)
        for node in index.touching[number]:
            if node.op == "call_function":
                rule = rule_of(node)
                assert rule is not None, node
                edit.set_shape(node, resize.shapes(node))
                rule.resize(node, resize)


def _check_meta(program: Program) -> None:
    """Shapes that were derived from the terms are those that the ops give."""
    from torchlathe.ir.verifying import verify

    verify(program, "full")
