"""What a program consists of, as plain rows for tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchlathe.ir import Program, module_path
from torchlathe.ir.extents import expression, symbol_names
from torchlathe.ir.inputs import input_paths
from torchlathe.tools.collecting import (
    family_rows,
    pin_rows,
    program_families,
    program_totals,
)
from torchlathe.tools.fidelity import output_name
from torchlathe.tools.report import FamilyRow, PinRow, Totals

__all__ = ["CostRow", "CostTables", "Inspection", "inspect_program"]


@dataclass(frozen=True)
class CostRow:
    """Cost of some operations together, at the sizes of the example inputs.

    Attributes:
        name: Of the operator, the module or the node.
        calls: How many operations these are.
        flops: Of contractions (matrix products, convolutions, attention).
        bytes: Read and written, if every operation goes to memory.
        parameters: That they read.
    """

    name: str
    calls: int
    flops: int
    bytes: int
    parameters: int


@dataclass(frozen=True)
class CostTables:
    """Cost by operator and by module, dearest first."""

    operators: tuple[CostRow, ...]
    modules: tuple[CostRow, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_program` finds.

    Attributes:
        model: Class name.
        totals: Size of the model.
        inputs: Names, dtypes and shapes.
        outputs: The same of outputs.
        families: Largest first.
        pins: Those that hold most parameters first.
        cost: By operator and by module; None if an extent depends on data.
        free_share: Share of the parameters of which at least one axis can shrink.
        result: The families as the analysis gave them.
        notes: What a reader should know.
    """

    model: str
    totals: Totals
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    families: tuple[FamilyRow, ...]
    pins: tuple[PinRow, ...]
    cost: CostTables | None
    free_share: float
    result: Any
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without ``result``."""
        data: dict[str, Any] = {
            "model": self.model,
            "totals": asdict(self.totals),
            "free_share": self.free_share,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "families": [asdict(row) for row in self.families],
            "pins": [asdict(row) for row in self.pins],
            "cost": asdict(self.cost) if self.cost is not None else None,
            "notes": list(self.notes),
        }
        plain: dict[str, Any] = json.loads(json.dumps(data))
        return plain


def inspect_program(program: Program, *, notes: Sequence[str] = ()) -> Inspection:
    """Analyse a program without changing it."""
    families = program_families(program)
    totals = program_totals(program)
    names = symbol_names(program)
    return Inspection(
        model=program.model_name,
        totals=totals,
        inputs=tuple(_input_texts(program, names)),
        outputs=tuple(_output_texts(program, names)),
        families=tuple(family_rows(families)),
        pins=tuple(pin_rows(families)),
        cost=_cost_tables(program) if totals.flops is not None else None,
        free_share=_free_share(program, families),
        result=families,
        notes=tuple(notes),
    )


def _input_texts(program: Program, names: Mapping[Any, str]) -> list[str]:
    """The inputs with their dynamic extents by name and example: ``ids: int64[s0=2, s1=16]``."""
    args, kwargs = program.example_inputs
    examples = pytree.tree_leaves((tuple(args), dict(kwargs)))
    texts = []
    for path, node, example in zip(
        input_paths(program), program.input_nodes, examples, strict=True
    ):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            texts.append(f"{path}: {example!r}")
            continue
        extents = [
            str(extent) if isinstance(extent, int) else f"{_extent_text(extent, names)}={size}"
            for extent, size in zip(value.shape, example.shape, strict=True)
        ]
        texts.append(f"{path}: {_dtype_text(value)}[{', '.join(extents)}]")
    return texts


def _output_texts(program: Program, names: Mapping[Any, str]) -> list[str]:
    """The outputs as a caller finds them, with symbolic shapes."""
    flat: Any = program.output_node.args[0]
    values = [node.meta.get("val") if isinstance(node, fx.Node) else node for node in flat]
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(values, program.out_spec))
    texts = []
    for path, value in leaves:
        text = repr(value)
        if isinstance(value, torch.Tensor):
            extents = ", ".join(_extent_text(extent, names) for extent in value.shape)
            text = f"{_dtype_text(value)}[{extents}]"
        texts.append(f"{output_name(path)}: {text}")
    return texts


def _extent_text(extent: Any, names: Mapping[Any, str]) -> str:
    import sympy

    renamed = {symbol: sympy.Symbol(name, integer=True) for symbol, name in names.items()}
    return str(sympy.sympify(expression(extent)).xreplace(renamed))


def _dtype_text(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _cost_tables(program: Program) -> CostTables:
    cost = program.cost().at()
    operators: dict[str, list[Any]] = {}
    modules: dict[str, list[Any]] = {}
    for node in program.nodes:
        if (spent := cost.nodes.get(node.name)) is not None:
            operators.setdefault(str(node.target), []).append(spent)
            modules.setdefault(module_path(node) or "(top)", []).append(spent)
    return CostTables(_cost_rows(operators), _cost_rows(modules))


def _cost_rows(grouped: dict[str, list[Any]]) -> tuple[CostRow, ...]:
    rows = [
        CostRow(
            name,
            len(costs),
            sum(int(c.flops) for c in costs),
            sum(int(c.bytes_read) + int(c.bytes_written) for c in costs),
            sum(c.parameters for c in costs),
        )
        for name, costs in grouped.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-row.flops, -row.bytes, row.name)))


def _free_share(program: Program, families: Iterable[Any]) -> float:
    parameters = program.parameters
    free = {part.name for family in families if family.prunable for part in family.slices}
    total = sum(tensor.numel() for tensor in parameters.values())
    owned = sum(tensor.numel() for name, tensor in parameters.items() if name in free)
    return owned / total if total else 0.0
