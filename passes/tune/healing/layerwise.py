"""Layers that are linear in their weights, refitted in closed form to what the original gives.

The original and the rewritten program run side by side over the calibration batches. At each
contraction whose output stands for one of the original, the weight is fitted by least squares:
from its inputs as the program has them by then, to the output that the original has. Of two
linears that stand for one (or for several that read the same), both are fitted at once, by
regression of reduced rank. Source: own; the regression is that of
`torchlathe.passes.rewrite.compensating`, its reduced rank that of Izenman 1975.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit, Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.rewrite.compensating.refitting import Problem, solve
from torchlathe.passes.statistics import LockstepRun, Reader, patches, readers_of
from torchlathe.passes.statistics.readers import unfolds
from torchlathe.passes.statistics.running import flat_batches
from torchlathe.passes.tune.healing.alignment import aligned_nodes

__all__ = ["LayerFit", "fit_layers"]

_LINEAR = torch.ops.aten.linear.default
# Samples per input of a contraction: more hardly change what is found, and cost in proportion.
_ROWS_PER_INPUT = 32
# Inputs of one contraction past which its moments are not made.
_MOST_READ = 8192


@dataclass(frozen=True)
class LayerFit:
    """What was done about one layer.

    Attributes:
        weight: Its parameter.
        before: Mean squared error of its output, relative to the original's.
        after: The same after; equal to ``before`` if the weight was left as it is.
    """

    weight: str
    before: float
    after: float


@dataclass(frozen=True)
class _Target:
    """What the output of a contraction should be.

    Attributes:
        reader: The contraction.
        wanted: Nodes of the original whose values decide that.
        later: The linears that read the output and give these values; none if it itself does.
        bias: Name of its bias, if it has one.
        affine: Whether the bias may change too.
    """

    reader: Reader
    wanted: tuple[fx.Node, ...]
    later: tuple[Reader, ...] = ()
    bias: str | None = None
    affine: bool = False


def fit_layers(
    original: Program,
    program: Program,
    edit: Edit,
    ctx: PassContext,
    *,
    trainable: Collection[str],
    limit_bytes: int = 2**32,
) -> list[LayerFit]:
    """Refit what can be, in order of execution.

    Args:
        original: What to match.
        program: What to refit.
        edit: Of the program.
        ctx: The batches.
        trainable: Names of the parameters that may change.
        limit_bytes: Memory for values that are alive; past it, fewer batches are used.
    """
    targets = _targets(original, program, set(trainable))
    if not targets:
        return []
    batches = _batches(original, ctx, limit_bytes)
    return _Session(original, program, edit, ctx, batches).run(targets)


def _targets(original: Program, program: Program, trainable: set[str]) -> list[_Target]:
    readers = readers_of(program)
    aligned = aligned_nodes(original, program)
    found = []
    for node, reader in readers.items():
        if not _can_change(program, reader, trainable):
            continue
        given = _given_bias(node)
        bias = info(given).tensor if isinstance(given, fx.Node) else None
        if node in aligned and (given is None or bias is not None):
            affine = bias in trainable and len(given.users) == 1
            found.append(_Target(reader, (aligned[node],), (), bias, affine))
        elif later := _linears_after(node, readers):
            ends = tuple(aligned[r.node] for r in later if r.node in aligned)
            if len(ends) == len(later):
                found.append(_Target(reader, ends, later))
    return found


def _can_change(program: Program, reader: Reader, trainable: set[str]) -> bool:
    name = reader.weight
    read = [n for n in reader.node.all_input_nodes if info(n).tensor == name]
    if name not in trainable or len(read) != 1 or len(read[0].users) != 1:
        return False  # what others read too is not this layer's to change
    if reader.kernel and not unfolds(reader):
        return False
    weight = program.tensor(name).detach()
    if reader.layer_matrix(torch.empty(weight.shape, device="meta")).shape[2] > _MOST_READ:
        return False
    # Zeros stay, and least squares would fill them.
    mask = weight == 0
    return not bool(mask.any()) or bool(mask.all())


def _given_bias(node: fx.Node) -> Any:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return argument(node, "bias") if "bias" in names else None


def _linears_after(node: fx.Node, readers: Mapping[fx.Node, Reader]) -> tuple[Reader, ...]:
    """The linears that read a linear, if nothing else does."""
    if node.target is not _LINEAR or _given_bias(node) is not None:
        return ()
    users = list(node.users)
    if not all(u.target is _LINEAR and u in readers and u.args[0] is node for u in users):
        return ()
    return tuple(readers[user] for user in users)


def _batches(program: Program, ctx: PassContext, limit: int) -> list[list[Any]]:
    """As many as the limit allows; what one takes is measured on the first."""
    batches = [flat for _, flat in flat_batches(program, ctx)]
    trial = LockstepRun(program, batches[:1])
    trial.run_all()
    most = max(1, limit // max(1, 2 * trial.peak_bytes))
    if most < len(batches):
        ctx.tell(
            Diagnostic(
                "note",
                f"layers are fitted to {most} of {len(batches)} batches, for memory of "
                f"{limit / 2**20:.0f} MiB",
            )
        )
    return batches[:most]


class _Session:
    def __init__(
        self,
        original: Program,
        program: Program,
        edit: Edit,
        ctx: PassContext,
        batches: list[list[Any]],
    ) -> None:
        self.program, self.edit, self.ctx = program, edit, ctx
        self.first = LockstepRun(original, batches)
        self.second = LockstepRun(program, batches)
        self.count = len(batches)
        self.place = {node: i for i, node in enumerate(original.graph.nodes)}

    def run(self, targets: list[_Target]) -> list[LayerFit]:
        """Fit one after the other, each with what came before as it is by then."""
        uses = {node: index for index, target in enumerate(targets) for node in target.wanted}
        # The original cannot go back, so what is wanted is kept as it goes by.
        ahead = sorted(uses, key=self.place.__getitem__, reverse=True)
        kept: dict[fx.Node, list[Any]] = {}
        fits = []
        for index, target in enumerate(targets):
            self.ctx.report(f"fitting {target.reader.weight} ({index + 1}/{len(targets)})")
            while not kept.keys() >= set(target.wanted):
                node = ahead.pop()
                kept[node] = self.first.run_through(node)
            self.second.run_until(target.reader.node)
            fit = self._fit(target, kept)
            if fit is not None:
                fits.append(fit)
            kept = {node: value for node, value in kept.items() if uses[node] > index}
        return fits

    def _fit(self, target: _Target, kept: Mapping[fx.Node, list[Any]]) -> LayerFit | None:
        if target.later:
            return self._fit_factors(target, kept)
        reader = target.reader
        weight = self.program.tensor(reader.weight).detach()
        (wanted,) = target.wanted
        halves = self._sums(reader, [reader.result_rows(value) for value in kept[wanted]])
        if halves is None:
            return None
        matrix = reader.layer_matrix(weight).double()
        bias = self._bias(target.bias, matrix).reshape(matrix.shape[:2])
        whole = halves[0] + halves[1]
        scale = whole.count / max(float(whole.yy.sum()), 1e-300)
        solution = solve(halves, matrix, bias, affine=target.affine)
        if solution is None:
            error = whole.error(matrix, bias) * scale
            return LayerFit(reader.weight, error, error)
        self._write(reader.weight, reader.weight_from_layer(solution.weight, weight.shape))
        if target.bias is not None and target.affine:
            self._write(target.bias, solution.bias.flatten())
        return LayerFit(reader.weight, solution.before * scale, solution.after * scale)

    def _fit_factors(self, target: _Target, kept: Mapping[fx.Node, list[Any]]) -> LayerFit | None:
        """The best first factor, and with it the second ones: regression of reduced rank.

        Of the least squares solution W for ``y = W x``, the best approximation of the factors'
        rank in the metric of E[x x'] (Izenman 1975).
        """
        reader, later = target.reader, target.later
        ups = [self.program.tensor(each.weight).detach().double() for each in later]
        shifts = []
        for each, up in zip(later, ups, strict=True):
            bias = _given_bias(each.node)
            shifts.append(self._bias(None if bias is None else info(bias).tensor, up[None]))
        stacked, shift = torch.cat(ups), torch.cat([each.flatten() for each in shifts])
        values = zip(*(kept[node] for node in target.wanted), strict=True)
        rows = [
            torch.cat([r.result_rows(v) for r, v in zip(later, parts, strict=True)], -1) - shift
            for parts in values
        ]
        halves = self._sums(reader, rows)
        if halves is None:
            return None
        down = self.program.tensor(reader.weight).detach().double()
        start, zero = (stacked @ down)[None], stacked.new_zeros(1, stacked.shape[0])
        whole = halves[0] + halves[1]
        scale = whole.count / max(float(whole.yy.sum()), 1e-300)
        before = whole.error(start, zero)
        solution = solve(halves, start, zero, affine=False)
        if solution is not None:
            up, down = _reduced(solution.weight[0], whole.xx[0], down.shape[0])
            after = whole.error((up @ down)[None], zero)
            if after < before:
                self._write(reader.weight, down)
                for each, part in zip(later, up.split([len(old) for old in ups]), strict=True):
                    self._write(each.weight, part)
                return LayerFit(reader.weight, before * scale, after * scale)
        return LayerFit(reader.weight, before * scale, before * scale)

    def _sums(self, reader: Reader, wanted: list[torch.Tensor]) -> tuple[Problem, Problem] | None:
        """Moments of what a contraction reads now, and of what it should give."""
        halves = Problem(), Problem()
        for index, value in enumerate(self.second.value(reader.operand)):
            rows = patches(reader, value) if reader.kernel else reader.data_rows(value)
            if rows is None or rows.shape[:2] != wanted[index].shape[:2]:
                return None
            _add(halves, index, self.count, rows, wanted[index])
        return halves

    def _bias(self, name: str | None, matrix: torch.Tensor) -> torch.Tensor:
        if name is None:
            return matrix.new_zeros(matrix.shape[:2])
        return self.program.tensor(name).detach().double()

    def _write(self, name: str, value: torch.Tensor) -> None:
        old = self.program.tensor(name)
        self.edit.set_tensor(name, value.reshape(old.shape).to(old.dtype).contiguous())


def _reduced(
    weight: torch.Tensor, moment: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a weight, nearest to it on inputs of these second moments."""
    scale = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    values, vectors = torch.linalg.eigh(moment / scale)
    root = vectors * values.clamp_min(1e-12).sqrt()
    left, _, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    up = left[:, :rank]
    return up, up.T @ weight


def _add(
    halves: tuple[Problem, Problem], index: int, count: int, x: torch.Tensor, y: torch.Tensor
) -> None:
    """Batches in turn to one half and the other; a single batch in two parts."""
    most = max(256, _ROWS_PER_INPUT * x.shape[2] // count)
    if x.shape[1] > most:
        rows = torch.linspace(0, x.shape[1] - 1, most, device=x.device).long()
        x, y = x[:, rows], y[:, rows]
    if count > 1:
        halves[index % 2].add(x, y)
        return
    middle = x.shape[1] // 2
    halves[0].add(x[:, :middle], y[:, :middle])
    halves[1].add(x[:, middle:], y[:, middle:])
