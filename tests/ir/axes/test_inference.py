"""What the inference does with ops as they come: rules, pins, and what it cannot relate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.ir.axes.commuting import captured, free_atoms, terms_fit
from torchlathe.ir import Program, capture
from torchlathe.ir.axes import AxisTerms, Concat, Product, register_rule, rule_of, ruled_ops
from torchlathe.ir.axes import table as tables
from torchlathe.ir.axes.rules.pinned import PinnedTail


@torch.library.custom_op("inference::unknown", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    """Nothing is known of it."""
    return x * 2


@unknown.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def terms_of(program: Program, name: str) -> Any:
    return program.analysis(AxisTerms).terms(program.tensor_nodes[name])


def reasons(program: Program, name: str, axis: int) -> list[str]:
    axis_map = program.analysis(AxisTerms)
    atoms = axis_map.atoms_of(terms_of(program, name)[axis])
    return [str(pin) for atom in atoms for pin in atom.pins]


def test_an_op_without_a_rule_pins_what_it_touches_and_is_counted() -> None:
    program = captured(lambda x, y: unknown(x.relu()).sum() + y.sum(), (3, 4), (3, 4))
    axis_map = program.analysis(AxisTerms)
    assert dict(axis_map.unruled) == {"inference.unknown": 1}
    assert "inference.unknown has no axis rule" in reasons(program, "p0", 1)[0]
    assert len(free_atoms(program)) == 2  # those of the other operand


def test_a_registered_rule_takes_the_place_of_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_registered", {})
    register_rule("inference::unknown", PinnedTail(1, "it is told to"))
    program = captured(lambda x: unknown(x).sum(), (3, 4))
    assert not program.analysis(AxisTerms).unruled
    assert len(free_atoms(program)) == 1
    assert reasons(program, "p0", 1)[0].startswith("it is told to (")


def test_a_name_needs_its_namespace() -> None:
    with pytest.raises(ValueError, match='an op is named "namespace::name"'):
        register_rule("unknown", PinnedTail(1, ""))


def test_overloads_may_be_other_ops() -> None:
    program = captured(lambda x, y: torch.max(x, y).max(1).values, (3, 4), (3, 4))
    largest, along = (n for n in program.nodes if str(n.target).startswith("aten.max"))
    assert rule_of(largest) is not rule_of(along)


def test_every_row_of_the_table_names_an_op_once() -> None:
    from torchlathe.ir.axes.rules.further import further_rows

    names = [name for _, text in further_rows() for name in tables._names(text)]
    assert len(names) == len(set(names))
    assert set(names) <= set(ruled_ops())
    # Some of the others exist in one version of torch or another only.
    missing = [
        name
        for name in names
        if name.startswith("aten::") and not hasattr(torch.ops.aten, name[6:].partition(".")[0])
    ]
    assert len(missing) < len(names) / 20, missing


def test_terms_that_do_not_fit_are_pinned_with_the_op() -> None:
    # 12 = 3 x 4 for one reader and 2 x 6 for another: only 6 x 2 refines both.
    program = captured(lambda x, y: (x.view(4, 6) + y, x.view(6, 4)), (24,), (4, 6))
    assert "cuts through it" in " ".join(reasons(program, "p0", 0))
    terms_fit(program)


def test_inputs_outputs_and_dynamic_neighbours_are_pinned() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 4, 8))
            self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.cat((self.token, self.up(x)[None]), 1)
            return self.down(x)

    program = capture(
        Net().eval(), (torch.randn(5, 3),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert reasons(program, "up.weight", 1)[0].startswith("it is an axis of the input")
    assert reasons(program, "down.weight", 0) == ["it is an axis of an output of the model"]
    assert "it lies end to end with a dynamic axis" in str(reasons(program, "token", 1))
    assert not reasons(program, "token", 2)


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same elements, each a grouping of the same factors."""
    factors = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))

    def grouped() -> list[int]:
        cuts = draw(st.sets(st.integers(1, max(1, len(factors) - 1)), max_size=3))
        bounds = [0, *sorted(c for c in cuts if c < len(factors)), len(factors)]
        return [
            int(torch.tensor(factors[a:b]).prod()) for a, b in itertools.pairwise(bounds) if b > a
        ]

    return grouped(), grouped()


@settings(max_examples=20)
@given(regroupings())
def test_regrouping_keeps_every_factor_free(shapes: tuple[list[int], list[int]]) -> None:
    source, target = shapes
    program = captured(lambda x: x.reshape(target), tuple(source))
    terms_fit(program)
    # Shapes that are groupings of common factors have a common refinement.
    extents = [atom.extent for atom in free_atoms(program)]
    assert torch.tensor(extents).prod() == torch.tensor(source).prod()


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_pieces_end_to_end_are_the_pieces_that_are_cut(
    sizes: list[int], data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(sizes)))
    start, end = sum(sizes[:position]), sum(sizes)
    shapes = [(2, size) for size in sizes]
    program = captured(lambda *x: torch.cat(x, 1)[:, start:end].sum(), *shapes)
    terms_fit(program)
    assert all(atom.extent in (2, *sizes) for atom in free_atoms(program))


def test_results_have_products_and_concatenations() -> None:
    program = captured(lambda x, y: torch.cat((x.flatten(), y)), (3, 4), (5,))
    axis_map = program.analysis(AxisTerms)
    cat = next(n for n in program.nodes if "cat" in str(n.target))
    (term,) = axis_map.terms(cat)
    assert isinstance(term, Concat)
    first, second = term.pieces
    assert isinstance(first, Product)
    assert [f.extent for f in first.factors] == [3, 4]
    assert second.extent == 5
