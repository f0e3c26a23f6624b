"""A rotation of the residual stream, folded into what writes and reads it.

A stream of which everything that touches it is linear along its channels, or an RMSNorm, may be
multiplied by an orthogonal matrix: writers give rotated values, norms keep their length, readers
turn back. Large values in few channels are spread over all, so that rounding hurts less.

Source: QuaRot (arXiv 2404.00456, section 4, stages 1a and 1b: the matrix is a Hadamard matrix with
random signs; here times a random orthogonal one where the width is no power of two). Which ops
touch the stream is read off the axis terms, and the program is compared with itself in float64.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from torchlathe.ir import Program, TensorKind, VerifyError
from torchlathe.ir.axes import AxisTerms
from torchlathe.ir.axes.inference import AxisMap
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.ir.verifying import check_equivalence
from torchlathe.passes.base import Diagnostic, PassContext

__all__ = ["orthogonal", "rotate"]

aten = torch.ops.aten
_PASSES = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.select.int,
)


def orthogonal(width: int, seed: int = 0) -> Tensor:
    """A random Hadamard matrix, (width, width) float64, times a random rotation of the odd factor.

    Every entry of a power of two is ``1/sqrt(width)`` in magnitude.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = width
    while odd % 2 == 0:
        odd //= 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width // odd:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    matrix = matrix / len(matrix) ** 0.5
    if odd > 1:
        drawn = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        matrix = torch.kron(matrix, torch.linalg.qr(drawn)[0].contiguous())
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


@dataclass
class _Stream:
    """What touches one stream.

    Attributes:
        width: Its channels.
        turned: Tensors with the axes that are channels.
        norms: Weights of norms, with what reads each norm's result.
    """

    width: int
    turned: dict[str, set[int]] = field(default_factory=dict)
    norms: list[tuple[str, fx.Node]] = field(default_factory=list)


def rotate(program: Program, ctx: PassContext) -> int:
    """Rotate the stream that most linear layers read, if that can be folded.

    Args:
        program: Changed in one edit, and held to compute what it did.
        ctx: Where the seed is, and where it is told why there is none.

    Returns:
        The number of channels; 0 if nothing was rotated.

    Raises:
        VerifyError: The program computes something else now.
    """
    axis_map = program.analysis(AxisTerms)
    reasons = []
    for atom in _candidates(program, axis_map)[:3]:
        found = _Search(program, axis_map, atom).run()
        if isinstance(found, _Stream):
            before = program.copy()
            _apply(program, ctx, found)
            check = check_equivalence(before, program)
            if not check.passed:
                raise VerifyError(f"rotating a stream is exact, but {check.detail}")
            return found.width
        reasons.append(found)
    text = f"no stream was rotated: {reasons[0] if reasons else 'no layers share one'}"
    ctx.tell(Diagnostic("warning", text))
    return 0


def _candidates(program: Program, axis_map: AxisMap) -> list[int]:
    """Atoms by how many linear layers read them, the most first; two at least."""
    counts: Counter[int] = Counter()
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        data: Any = node.args[0]
        counts.update(_last(axis_map, data))
    return [atom for atom, count in counts.most_common() if count > 1]


def _last(axis_map: AxisMap, node: fx.Node) -> list[int]:
    """Atoms of the last axis."""
    rows = axis_map.results(node)
    if not rows or not rows[0]:
        return []
    return [atom.number for atom in axis_map.atoms_of(rows[0][-1])]


class _Search:
    """Whether everything that touches an atom can follow a rotation."""

    def __init__(self, program: Program, axis_map: AxisMap, atom: int) -> None:
        self.program, self.axis_map, self.atom = program, axis_map, atom
        self.stream = _Stream(0)

    def run(self) -> _Stream | str:
        """The stream, or why it cannot be rotated."""
        for node in self.program.nodes:
            inputs = [used for used in node.all_input_nodes if self._on(used)]
            if node.op == "output" and inputs:
                return "it is an output of the model"
            if node.op != "call_function" or not (inputs or self._on(node)):
                continue
            if not self._takes(node, inputs):
                return f"%{node.name} ({node.target}) does more than a linear map along it"
        for name, norm in self.stream.norms:
            if not self._foldable(name, norm):
                return f"the weight of the norm {name} cannot move into what reads it"
        return self.stream if self.stream.turned else "nothing writes it"

    def _on(self, node: fx.Node) -> bool:
        for row in self.axis_map.results(node):
            for term in row or ():
                if self.atom in [a.number for a in self.axis_map.atoms_of(term)]:
                    return True
        return False

    def _whole(self, node: fx.Node, axis: int = -1) -> bool:
        """Whether an axis is the stream's channels and nothing else."""
        (row,) = self.axis_map.results(node)[:1]
        atoms = [] if not row else [a.number for a in self.axis_map.atoms_of(row[axis])]
        value: Any = node.meta["val"]
        self.stream.width = int(value.shape[axis]) if atoms == [self.atom] else self.stream.width
        return atoms == [self.atom]

    def _turn(self, node: Any, axis: int) -> bool:
        """Note that a tensor of the model is to be turned along an axis."""
        name = info(node).tensor if isinstance(node, fx.Node) else None
        if name is None or self.program.entries[name].kind is not TensorKind.PARAMETER:
            return False
        self.stream.turned.setdefault(name, set()).add(axis % self.program.tensor(name).dim())
        return True

    def _takes(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        target: Any = node.target
        if target is aten.embedding.default:
            return self._whole(node) and self._turn(node.args[0], 1)
        if target is aten.linear.default:
            return self._linear(node)
        if target in _PASSES:
            return self._whole(node) and all(self._whole(used) for used in inputs)
        if target is aten.add.Tensor:
            return self._sum(node, inputs)
        if target is aten.rms_norm.default:
            shape: Any = argument(node, "normalized_shape")
            weight: Any = argument(node, "weight")
            if isinstance(weight, fx.Node):
                self.stream.norms.append((str(info(weight).tensor), node))
            return len(shape) == 1 and self._whole(node)
        if target is aten.mul.Tensor:
            return self._scaled(node, inputs)
        if target is aten.pow.Tensor_Scalar:
            squares = {user.target for user in node.users} == {aten.mean.dim}
            return bool(node.args[1] == 2) and self._whole(node) and squares
        if target is aten.mean.dim:
            dims: Any = node.args[1]
            source: Any = node.args[0]
            last = list(dims) in ([-1], [source.meta["val"].dim() - 1])
            return last and source.target is aten.pow.Tensor_Scalar
        return False

    def _linear(self, node: fx.Node) -> bool:
        data, weight = node.args[:2]
        assert isinstance(data, fx.Node)
        bias: Any = argument(node, "bias")
        fits = True
        if self._on(data):
            fits = self._whole(data) and self._turn(weight, 1)
        if self._on(node):
            fits = fits and self._whole(node) and self._turn(weight, 0)
            fits = fits and (bias is None or self._turn(bias, 0))
        return fits

    def _sum(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        if node.kwargs or len(node.args) != 2 or len(inputs) != 2 or not self._whole(node):
            return False
        for used in inputs:
            if not self._whole(used) or (used.op == "placeholder" and not self._turn(used, -1)):
                return False
        return True

    def _scaled(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """By one number a token, or by the weight of a norm."""
        if not self._whole(node) or not all(self._whole(used) for used in inputs):
            return False
        vectors = [used for used in inputs if used.op == "placeholder"]
        if len(inputs) == 1:
            return not vectors
        if len(vectors) != 1 or vectors[0].meta["val"].dim() != 1:
            return False
        self.stream.norms.append((str(info(vectors[0]).tensor), node))
        return True

    def _foldable(self, name: str, norm: fx.Node) -> bool:
        """Whether only linear layers of their own read a norm's result."""
        own = len(self.program.tensor_nodes[name].users) == 1
        return own and all(
            reader.target is aten.linear.default
            and reader.args[0] is not reader.args[1]
            and len(reader.args[1].users) == 1  # type: ignore[union-attr]
            for reader in _readers(norm)
        )


def _readers(node: fx.Node) -> list[fx.Node]:
    found = []
    for user in node.users:
        found += _readers(user) if user.target in _PASSES else [user]
    return found


def _apply(program: Program, ctx: PassContext, stream: _Stream) -> None:
    matrix = orthogonal(stream.width, ctx.seed)
    changed: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        return changed[name] if name in changed else program.tensor(name).detach().double()

    for name, norm in stream.norms:
        weight = tensor(name)
        for reader in _readers(norm):
            read: Any = reader.args[1]
            own = str(info(read).tensor)
            changed[own] = tensor(own) * weight
        changed[name] = torch.ones_like(weight)
    with program.edit(by=ctx.spec) as edit:
        for number, (name, axes) in enumerate(stream.turned.items()):
            ctx.report(f"rotating {name} ({number + 1}/{len(stream.turned)})")
            value = tensor(name)
            for axis in axes:
                turn = matrix.to(value.device)
                value = (value.movedim(axis, -1) @ turn).movedim(-1, axis)
            changed.pop(name, None)
            edit.set_tensor(name, value.contiguous().to(program.tensor(name).dtype))
        for name, value in changed.items():
            edit.set_tensor(name, value.to(program.tensor(name).dtype))
