"""Refitting what reads erased units, so that its output is again what it was.

The original and the erased program run side by side over the calibration batches, node by node.
Where a contraction lost inputs, its weight is refitted by least squares: from the inputs as the
erased and so far refitted program has them, to the outputs of the original. Then both run on,
with the new weight, so that no error adds up unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from torchlathe.ir import OptionError, Program
from torchlathe.ir.axes import AxisTerms, rule_of
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.axes.rules.contraction import Axes, Contraction, Convolution
from torchlathe.ir.edit import Edit
from torchlathe.ir.provenance import info
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.rewrite.compensating.refitting import Problem, solve
from torchlathe.passes.statistics import LockstepRun, Reader, patches, readers_of
from torchlathe.passes.statistics.running import flat_batches, need_data

__all__ = ["Compensation", "Refit"]

# Samples per input of a contraction: more hardly change what is found, and cost in proportion.
_ROWS_PER_INPUT = 32


@dataclass(frozen=True)
class Refit:
    """What was done about one contraction.

    Attributes:
        node: Its name.
        weight: Its parameter.
        before: Mean squared error of its output before, relative to that of the original.
        after: The same after; equal to ``before`` if the weight was left as it is.
        ridge: Damping, relative; None if the weight was left as it is.
    """

    node: str
    weight: str
    before: float
    after: float
    ridge: float | None


@dataclass
class Compensation:
    """Made before units are erased, applied after.

    Attributes:
        program: The program before; what is erased from it later does not matter.
        ctx: The calibration batches; without them the example inputs are used, with a warning.
        units: What will be erased.
        streamed: Fit to inputs as the erased program has them. Otherwise to those that the
            original has, less the erased ones, which needs one program at a time and does not
            see how errors add up.
        everything: Refit also what lost no inputs itself, but comes after what did.
        ridge: Damping, relative to the mean of the diagonal of the second moments; None chooses
            it, for each weight, by fitting to one half of the samples and testing on the other.
        most_read: Convolutions over more inputs (channels times kernel) are refitted by channels,
            with one mixture of channels for all positions of the kernel.
        limit_bytes: Memory for the inputs that are alive; past it, fewer batches are used.
        refits: What the last application did.
        original: The program as it was.
        readers: Its contractions with a parameter.
        added: Those of them that add something.
    """

    program: Program
    ctx: PassContext
    units: Mapping[Family, torch.Tensor]
    streamed: bool = True
    everything: bool = False
    ridge: float | None = None
    most_read: int = 2304
    limit_bytes: int = 2**32
    refits: list[Refit] = field(default_factory=list)
    original: Program = field(init=False, repr=False)
    readers: Mapping[fx.Node, Reader] = field(init=False, repr=False)
    added: frozenset[fx.Node] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Keep the program as it is now.

        Raises:
            OptionError: A negative ridge.
        """
        if self.ridge is not None and self.ridge < 0:
            raise OptionError(f"ridge is {self.ridge}, but must not be negative")
        need_data(self.ctx, "weights are refitted to them")
        # What the program knows already about its axes holds for the copy.
        readers = readers_of(self.program)
        layouts = self.program.analysis(AxisTerms).layouts
        self.original = self.program.copy()
        nodes = {node.name: node for node in self.original.nodes}
        self.readers = {
            nodes[node.name]: replace(
                reader, node=nodes[node.name], operand=nodes[reader.operand.name]
            )
            for node, reader in readers.items()
        }
        self.added = frozenset(nodes[node.name] for node in readers if layouts[node].addends)

    def apply(self, target: Program | Edit) -> list[Refit]:
        """Refit the weights of a program from which units were erased.

        Args:
            target: The program, or an edit of it that is going on.

        Returns:
            One record for each contraction that could be refitted, in order of execution.
        """
        if isinstance(target, Program):
            with target.edit(self.ctx.spec) as edit:
                return self.apply(edit)
        self.refits = _Session(self, target).run()
        return self.refits


@dataclass(frozen=True)
class _Fit:
    """One contraction in both programs.

    Attributes:
        before: In the original.
        after: In the erased program.
        kept: Per axis of the weight, which of the original's indices are left; None for all.
        bias: Name of the parameter that is added per output, if nothing else reads it.
        lost: Whether it lost inputs.
    """

    before: Reader
    after: Reader
    kept: Mapping[int, torch.Tensor]
    bias: str | None
    lost: bool


class _Session:
    """One application."""

    def __init__(self, options: Compensation, edit: Edit) -> None:
        self.options = options
        self.original = options.original
        self.edit = edit
        self.program = edit.program

    def run(self) -> list[Refit]:
        fits = self._fits()
        if not any(fit.lost for fit in fits):
            return []
        batches = self._batches()
        first = LockstepRun(self.original, batches)
        second = LockstepRun(self.program, batches) if self.options.streamed else None
        found = []
        for number, fit in enumerate(fits):
            self.options.ctx.report(f"refitting {fit.after.weight} ({number + 1}/{len(fits)})")
            refit = _Refitting(self, fit, first, second).run()
            if refit is not None:
                found.append(refit)
        return found

    def _batches(self) -> list[list[Any]]:
        """As many as the limit allows; what one takes is measured on the first."""
        ctx, limit = self.options.ctx, self.options.limit_bytes
        batches = [flat for _, flat in flat_batches(self.original, ctx)]
        trial = LockstepRun(self.original, batches[:1])
        trial.run_all()
        each = trial.peak_bytes * (2 if self.options.streamed else 1)
        most = max(1, limit // max(1, each))
        if most < len(batches):
            message = (
                f"weights are refitted to {most} of {len(batches)} batches, for one takes "
                f"{each / 2**20:.0f} MiB and the limit is {limit / 2**20:.0f} MiB"
            )
            ctx.tell(Diagnostic("warning", message))
        return batches[:most]

    # -- what can be refitted ------------------------------------------------------------------

    def _fits(self) -> list[_Fit]:
        nodes = {node.name: node for node in self.program.nodes}
        place = {name: i for i, name in enumerate(nodes)}
        fits = []
        for before in self.options.readers.values():
            node = nodes.get(before.node.name)
            if node is None or node.target != before.node.target:
                continue
            fit = self._fit(before, node)
            if fit is not None and (fit.lost or self.options.everything):
                fits.append(fit)
        return sorted(fits, key=lambda fit: place[fit.after.node.name])

    def _fit(self, before: Reader, node: fx.Node) -> _Fit | None:
        name = before.weight
        weights = [n for n in node.all_input_nodes if info(n).tensor == name]
        if len(weights) != 1 or len(weights[0].users) != 1:
            return None  # what others read too is not this contraction's to change
        bias = None
        if before.node in self.options.added:
            rule = rule_of(node)
            conv = isinstance(rule, Convolution)
            given = argument(node, "bias") if conv else self._plain_bias(node, rule)
            if not isinstance(given, fx.Node) or (bias := info(given).tensor) is None:
                return None
            if self.program.entries[bias].tensor.dim() != 1:
                return None
        return _Fit(before, before.at(node), self._kept(name), bias, self._lost(before))

    @staticmethod
    def _plain_bias(node: fx.Node, rule: object) -> Any:
        name = rule.bias(node) if isinstance(rule, Contraction) else None
        return argument(node, name) if name else None

    def _lost(self, before: Reader) -> bool:
        old = self.original.entries[before.weight].tensor.shape
        new = self.program.entries[before.weight].tensor.shape
        return old[before.read_axis] != new[before.read_axis]

    def _kept(self, name: str) -> dict[int, torch.Tensor]:
        """Per axis, indices into the tensor as it was before the erase."""
        found = {}
        for axis, indices in self.program.kept.get(name, {}).items():
            earlier = self.original.kept.get(name, {}).get(axis)
            if earlier is not None:
                indices = torch.searchsorted(earlier, indices)
            found[axis] = indices
        return found


class _Refitting:
    """One contraction."""

    def __init__(
        self, session: _Session, fit: _Fit, first: LockstepRun, second: LockstepRun | None
    ) -> None:
        self.session = session
        self.options = session.options
        self.fit = fit
        self.first, self.second = first, second
        self.weight = session.program.entries[fit.after.weight].tensor.detach()

    def run(self) -> Refit | None:
        """Collect, solve, and put the new weight in place; None where it cannot be done."""
        before, after = self.fit.before, self.fit.after
        self.first.run_until(before.node)
        inputs = self.first.value(before.operand)
        if self.second is not None:
            self.second.run_until(after.node)
            changed = self.second.value(after.operand)
        else:
            selected = [self._select(x, before.data_axes) for x in inputs]
            if any(x is None for x in selected):
                return None
            changed = selected
        problem = self._by_outputs(changed)
        matrix = after.weight_matrix(self.weight).double()
        if problem is not None:
            return self._finish(problem, matrix)
        return self._by_channels(inputs, changed)

    # -- outputs against inputs ------------------------------------------------------------------

    def _by_outputs(self, changed: list[torch.Tensor]) -> tuple[Problem, Problem] | None:
        """Moments of the inputs as they are and the outputs as they were."""
        before, after = self.fit.before, self.fit.after
        features = patches if before.kernel else _data_rows
        channels, positions = self._extents(after)
        if positions > 1 and channels * positions > self.options.most_read:
            return None
        halves = Problem(), Problem()
        outputs = self.first.run_through(before.node)
        for index, (x, y) in enumerate(zip(changed, outputs, strict=True)):
            wanted = self._select(y, before.result_axes)
            rows = features(after, x)
            if wanted is None or rows is None:
                return None
            targets = after.result_rows(wanted)
            if rows.shape[:2] != targets.shape[:2]:
                return None
            _add(halves, index, len(changed), rows, targets)
        return halves

    def _extents(self, reader: Reader) -> tuple[int, int]:
        """Inputs per group, and positions of the kernel."""
        positions = 1
        for axis, names in enumerate(reader.weight_axes):
            if set(names) & set(reader.kernel):
                positions *= self.weight.shape[axis]
        return reader.weight_matrix(self.weight).shape[2], positions

    def _select(self, value: torch.Tensor, axes: Axes) -> torch.Tensor | None:
        """What is left of an input or result of the original; None where axes do not match."""
        for axis, indices in self.fit.kept.items():
            names = self.fit.before.weight_axes[axis]
            if set(names) & {n for own in axes for n in own}:
                if names not in axes:
                    return None
                value = value.index_select(axes.index(names), indices.to(value.device))
        return value

    def _finish(self, halves: tuple[Problem, Problem], matrix: torch.Tensor) -> Refit:
        """Solve for the weight (with its kernel, if it has one) and the bias."""
        after = self.fit.after
        groups, outs, read = halves[0].yx.shape
        kernel = bool(after.kernel)
        if kernel:
            # Rows of patches are channels times kernel, as the weight's last axes are.
            matrix = self.weight.reshape(groups, outs, read).double()
        bias = self._bias(groups, outs)
        affine = self._affine()
        solution = solve(halves, matrix, bias, affine=affine, ridge=self.options.ridge)
        if solution is None:
            error = _relative(halves, (halves[0] + halves[1]).error(matrix, bias))
            return Refit(after.node.name, after.weight, error, error, None)
        shape = self.weight.shape
        weight = (
            solution.weight.reshape(shape) if kernel else after.weight_from(solution.weight, shape)
        )
        self._write(weight, solution.bias if affine else None)
        return Refit(
            after.node.name,
            after.weight,
            _relative(halves, solution.before),
            _relative(halves, solution.after),
            solution.ridge,
        )

    # -- channels against channels ---------------------------------------------------------------

    def _by_channels(self, inputs: list[torch.Tensor], changed: list[torch.Tensor]) -> Refit | None:
        """The original's channels as mixtures of those that are left, for every kernel position."""
        before, after = self.fit.before, self.fit.after
        kept = self.fit.kept.get(before.read_axis)
        if before.groups or not before.kernel or kept is None:
            return None
        halves = Problem(), Problem()
        for index, (x, y) in enumerate(zip(changed, inputs, strict=True)):
            _add(halves, index, len(changed), after.data_rows(x), before.data_rows(y))
        _, outs, read = halves[0].yx.shape
        start = torch.zeros(1, outs, read, dtype=torch.float64)
        start[0, kept, torch.arange(read)] = 1
        start = start.to(self.weight.device)
        bias = start.new_zeros(1, outs)
        affine = self._affine()
        solution = solve(halves, start, bias, affine=affine, ridge=self.options.ridge)
        error = _relative(halves, (halves[0] + halves[1]).error(start, bias))
        if solution is None:
            return Refit(after.node.name, after.weight, error, error, None)
        original = self.first.program.entries[before.weight].tensor.detach()
        for axis, indices in self.fit.kept.items():
            if axis != before.read_axis:
                original = original.index_select(axis, indices.to(original.device))
        matrix = before.weight_matrix(original).double()
        weight = after.weight_from(matrix @ solution.weight, self.weight.shape)
        shift = None
        if affine:
            added = (matrix @ solution.bias[:, :, None])[0, :, 0]
            old = self._bias(1, self._outs())
            shift = old + added.reshape(self._outs(), -1).sum(1)
        self._write(weight, shift)
        after_error = _relative(halves, solution.after)
        return Refit(after.node.name, after.weight, error, after_error, solution.ridge)

    # -- bias ------------------------------------------------------------------------------------

    def _outs(self) -> int:
        assert self.fit.bias is not None
        return self.session.program.entries[self.fit.bias].tensor.numel()

    def _affine(self) -> bool:
        """Whether the bias is there, and this contraction's alone."""
        if self.fit.bias is None:
            return False
        nodes = self.fit.after.node.all_input_nodes
        return any(info(n).tensor == self.fit.bias and len(n.users) == 1 for n in nodes)

    def _bias(self, groups: int, outs: int) -> torch.Tensor:
        if self.fit.bias is None:
            return torch.zeros(groups, outs, dtype=torch.float64, device=self.weight.device)
        bias = self.session.program.entries[self.fit.bias].tensor.detach().double()
        return bias.expand(groups * outs).reshape(groups, outs)

    def _write(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        edit = self.session.edit
        edit.set_tensor(self.fit.after.weight, weight.to(self.weight.dtype).contiguous())
        if bias is not None and self.fit.bias is not None:
            old = self.session.program.entries[self.fit.bias].tensor
            edit.set_tensor(self.fit.bias, bias.reshape(old.shape).to(old.dtype))


def _data_rows(reader: Reader, value: torch.Tensor) -> torch.Tensor:
    return reader.data_rows(value)


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


def _relative(halves: tuple[Problem, Problem], error: float) -> float:
    whole = halves[0] + halves[1]
    return error * whole.count / max(float(whole.yy.sum()), torch.finfo(torch.float64).tiny)
