"""Fewer bits for the cores of tensor networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import Edit, OptionError, Program, TensorKind
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.quantising.grids import Quantised, quantised
from torchlathe.passes.rewrite.quantising.schemes import Scheme, scheme_of
from torchlathe.passes.rewrite.quantising.writing import DEQUANTIZE
from torchlathe.passes.rewrite.sweeping.sweep import relative_error

__all__ = ["QuantizeCores"]

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeCores(RewritePass):
    """Stores the tensors that ``einsum`` reads, the cores of networks, in few bits.

    Along which axis of a core its slices get scales of their own is tried: the bond as a rule,
    since slices of a bond differ in size as singular values do.

    Keeps: every other node. Changes: each core becomes numbers and scales that
    ``torchlathe::dequantize`` reads; the scales can be trained.

    Source: own; rounding is that of `quantize`.
    """

    name: ClassVar[str] = "quantize-cores"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    scheme: Literal["w8a16", "w4a16", "w2a16"] = field(
        default="w8a16", metadata={"help": "bits of the cores; activations stay as they are"}
    )
    group: int | None = field(
        default=None,
        metadata={
            "help": "numbers of a slice that share a scale: 32, 64 or 128, or 0 for a whole slice; "
            "by default 128 for 4 bits and a whole slice for 8"
        },
    )
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "quantise only these: patterns of tensors"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: The group is none that the scheme knows.
        """
        super().__post_init__()
        assert self._scheme is not None

    @property
    def _scheme(self) -> Scheme:
        return scheme_of(self.scheme, self.group, None, self.name)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights.
        """
        self.need_values(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Round one core after the other."""
        names = self._chosen(program)
        if not names:
            return PassResult(False, {"cores": 0}, [Diagnostic("warning", "there are no cores")])
        before, weights, errors, stored_bytes = program.cost().bytes, 0, [], 0
        diagnostics: list[Diagnostic] = []
        with program.edit(by=ctx.spec) as edit:
            for number, name in enumerate(names):
                ctx.report(f"rounding {name} ({number + 1}/{len(names)})")
                core = program.tensor(name).detach()
                axis, stored, error = _rounded(core, self._scheme)
                if stored.nbytes >= core.numel() * core.element_size():
                    text = "left alone, since its numbers and scales would take no fewer bytes"
                    diagnostics.append(Diagnostic("note", text, name=name))
                    continue
                _write(edit, name, axis, stored)
                weights, stored_bytes = weights + core.numel(), stored_bytes + stored.nbytes
                errors.append(error)
                text = f"{stored.format} with scales along axis {axis}: relative squared error"
                diagnostics.append(Diagnostic("note", f"{text} {error:.2g}", name=name))
        statistics: dict[str, int | float | str] = {"cores": len(errors), "weights": weights}
        if errors:
            statistics["bits_per_weight"] = 8 * stored_bytes / weights
            statistics["bytes_saved"] = before - program.cost().bytes
            statistics["mean_weight_error"] = sum(errors) / len(errors)
        return PassResult(bool(errors), statistics, diagnostics)

    def _chosen(self, program: Program) -> list[str]:
        """Names of the cores that the patterns name.

        Raises:
            OptionError: A pattern matches none.
        """
        every = list(_cores(program))
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatch(name, pattern) for name in every):
                raise OptionError(
                    f"the pattern {pattern!r} matches no core",
                    where=self.name,
                    hint=f"cores are {', '.join(every[:4])}, ..." if every else "there is none",
                )

        def wanted(name: str) -> bool:
            named = not self.include or any(fnmatch(name, p) for p in self.include)
            return named and not any(fnmatch(name, p) for p in self.exclude)

        return [name for name in every if wanted(name)]


def _cores(program: Program) -> Iterator[str]:
    """Floating parameters of two or more axes that einsum alone reads."""
    for name, node in program.tensor_nodes.items():
        entry = program.entries[name]
        if entry.kind is not TensorKind.PARAMETER or entry.tensor.dim() < 2:
            continue
        if not entry.tensor.is_floating_point() or name in program.frozen:
            continue
        if node.users and all(user.target is aten.einsum.default for user in node.users):
            yield name


def _rounded(core: torch.Tensor, scheme: Scheme) -> tuple[int, Quantised, float]:
    """The axis whose slices lose least with scales of their own, and the stored form."""
    best: tuple[int, Quantised, float] | None = None
    for axis in range(core.dim()):
        matrix = core.movedim(axis, 0).flatten(1)
        group = 0 if scheme.group > matrix.shape[1] else scheme.group
        stored = quantised(
            matrix, scheme.weights, group=group, symmetric=scheme.symmetric, clip="mse"
        )
        error = relative_error(matrix, stored.dequantised(torch.float32))
        if best is None or error < best[2]:
            best = axis, stored, error
    assert best is not None
    return best


def _write(edit: Edit, name: str, axis: int, stored: Quantised) -> None:
    """Let the readers of a core read its stored form."""
    program = edit.program
    node, old = program.tensor_nodes[name], program.tensor(name)
    users = list(node.users)
    first = min(users, key=list(program.graph.nodes).index)
    values = _add(edit, f"{name}_packed", stored.values, old, trains=False)
    scales = _add(edit, f"{name}_scale", stored.scales, old, trains=old.requires_grad)
    zeros = None
    if stored.zeros is not None:
        zeros = edit.add_tensor(_free(program, f"{name}_zero_point"), stored.zeros)

    def op(target: Any, *args: Any) -> fx.Node:
        return edit.call(target, args, like=first, before=first)

    # Of what is not packed the columns are those of the tensor, which passes may erase.
    columns = 0 if stored.values.shape[1] == stored.columns else stored.columns
    read = op(
        DEQUANTIZE, values, scales, zeros, None, columns, stored.group, stored.format, old.dtype
    )
    rest = [extent for place, extent in enumerate(old.shape) if place != axis]
    assert prod(rest) == stored.columns
    if len(rest) > 1:
        read = op(aten.unflatten.int, read, 1, rest)
    if axis:
        order = [*range(1, axis + 1), 0, *range(axis + 1, old.dim())]
        read = op(aten.permute.default, read, order)
    edit.replace(node, read, users)


def _add(edit: Edit, name: str, value: torch.Tensor, old: torch.Tensor, *, trains: bool) -> fx.Node:
    program = edit.program
    free = _free(program, name)
    parameter = torch.nn.Parameter(value.to(old.device), requires_grad=trains)
    program.rewritten |= {free}
    return edit.add_tensor(free, parameter, TensorKind.PARAMETER)


def _free(program: Program, name: str) -> str:
    taken: Sequence[Any] = (program.entries, program.aliases, program.carried, program.dropped)
    found, count = name, 1
    while any(found in names for names in taken):
        found, count = f"{name}{count}", count + 1
    return found
