"""Running two programs on the same inputs, and comparing the values that stand for one another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchlathe.ir import InputError, Program, UnsupportedError, capture, info, module_path
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.provenance import source_line
from torchlathe.ir.verifying import cannot_run
from torchlathe.tools.diff.aligning import align
from torchlathe.tools.diff.rows import NodeDifference, ProgramDiff
from torchlathe.tools.fidelity import as_call, output_name
from torchlathe.tools.latency import tensor_text

__all__ = ["THRESHOLD", "diff"]

# Rounding of float32 in another order of summation stays below this in networks of 100 layers.
THRESHOLD = 1e-4


def diff(
    first: Any,
    second: Any,
    inputs: Any = None,
    *,
    threshold: float = THRESHOLD,
    dtype: torch.dtype | None = None,
    names: tuple[str, str] | None = None,
) -> ProgramDiff:
    """Run two programs side by side, and say where their values part.

    The values of the first are kept while the second runs, so that it takes the memory of all
    activations: give a small batch.

    Args:
        first: What is right: a program, a compiled model, or a module (which is captured).
        second: What is to be compared; takes the same inputs.
        inputs: One batch, as `torchlathe.tools.fidelity.as_call` reads it; by default the example
            inputs of ``first``.
        threshold: Relative error above which a value counts as different.
        dtype: Compute in this dtype, as ``torch.float64``, to leave rounding out.
        names: What to call the two.

    Raises:
        InputError: The inputs fit one of them only, or are missing.
        UnsupportedError: A program without values.
    """
    if not threshold >= 0:
        raise InputError(f"threshold must not be negative, got {threshold}")
    before = _program(first, inputs)
    args, kwargs = before.example_inputs if inputs is None else as_call(inputs)
    after = _program(second, (args, kwargs))
    for program in (before, after):
        if reason := cannot_run(program):
            raise UnsupportedError(f"{program.model_name} cannot be run: {reason}")
    comparison = _Comparison(before, after, dtype)
    comparison.run(args, kwargs)
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return ProgramDiff(
        *(names or (_name(first, before), _name(second, after))),
        threshold,
        tuple(comparison.rows()),
        tuple(comparison.outputs()),
        tuple(n.name for n in comparison.unmatched(before)),
        tuple(n.name for n in comparison.unmatched(after)),
        tuple(tensor_text(x) for x in leaves if isinstance(x, torch.Tensor)),
    )


def _program(model: Any, inputs: Any) -> Program:
    if isinstance(model, Program):
        return model
    held = getattr(model, "program", None)
    if isinstance(held, Program):
        return held
    if inputs is None:
        raise InputError(
            f"{type(model).__name__} must be captured, and there are no inputs",
            hint="give inputs, or a program",
        )
    return capture(model, *as_call(inputs))


def _name(model: Any, program: Program) -> str:
    history = [str(getattr(record, "spec", "")) for record in program.history]
    text = ",".join(filter(None, history))
    return f"{program.model_name} ({text})" if text else program.model_name


class _Comparison:
    """The values of two programs, and how they differ."""

    def __init__(self, before: Program, after: Program, dtype: torch.dtype | None) -> None:
        self._before, self._after, self._dtype = before, after, dtype
        self._pairs = align(before, after)
        self._first_of = {other: node for node, other in self._pairs.items()}
        self._values: dict[fx.Node, Any] = {}
        self._found: dict[fx.Node, NodeDifference] = {}
        # Per node of the second program and axis, the indices of the first one's that it has.
        self._kept: dict[fx.Node, dict[int, torch.Tensor]] = {}
        self._order = {node: index for index, node in enumerate(before.nodes)}

    def run(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Run both, and compare."""

        def keep(node: fx.Node, value: Any) -> None:
            if node in self._pairs and _floating(value):
                self._values[node] = value

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            flat = self._before.flatten_inputs(args, kwargs)
            run_flat(self._before, flat, dtype=self._dtype, observe=keep)
            torch.manual_seed(0)
            flat = self._after.flatten_inputs(args, kwargs)
            run_flat(self._after, flat, dtype=self._dtype, observe=self._compare)

    def _compare(self, other: fx.Node, value: Any) -> None:
        node = self._first_of.get(other)
        if node is None or node not in self._values:
            return
        want = self._values[node]
        problem, matched = "", 1.0
        if want.shape != value.shape:
            chosen = self._selected(other, want, value) if _floating(value) else None
            if chosen is None:
                problem = f"{tuple(value.shape)} instead of {tuple(want.shape)}"
            else:
                matched = chosen.numel() / max(want.numel(), 1)
                want = chosen
        row = NodeDifference(
            self._order[node],
            node.name,
            other.name,
            str(other.target),
            module_path(other) or module_path(node),
            source_line(node) or "",
            info(other).created_by or "",
            tuple(value.shape),
            before=self._error_of_inputs(other),
            matched=matched,
            problem=problem,
        )
        self._found[other] = row if problem else _measured(row, want, value)

    def _error_of_inputs(self, other: fx.Node) -> float:
        """The largest error of what goes into a node, looking through what has no pair."""
        worst, seen = 0.0, set()
        waiting = list(other.all_input_nodes)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            row = self._found.get(node)
            if row is not None and row.error is not None:
                worst = max(worst, row.error)
            elif node.op == "call_function":
                waiting.extend(node.all_input_nodes)
        return worst

    def _selected(
        self, other: fx.Node, want: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        """The part of the first value that the second has; None if that is not known."""
        if want.dim() != value.dim():
            return None
        kept: dict[int, torch.Tensor] = {}
        for axis, (old, new) in enumerate(zip(want.shape, value.shape, strict=True)):
            if old == new:
                continue
            indices = self._indices(other, axis, old, new)
            if indices is None:
                return None
            kept[axis] = indices
            want = want.index_select(axis, indices.to(want.device))
        self._kept[other] = kept
        return want

    def _indices(self, other: fx.Node, axis: int, old: int, new: int) -> torch.Tensor | None:
        """Indices of an axis that stayed: as the node's weights say, or what goes into it."""
        found: list[torch.Tensor] = []
        for node in other.all_input_nodes:
            if (name := info(node).tensor) is not None:
                for place, indices in self._after.kept.get(name, {}).items():
                    extent = self._after.extents.get(name, {}).get(place)
                    if len(indices) == new and extent == old:
                        found.append(self._relative(name, place, indices))
            else:
                own = self._kept.get(node, {})
                found += [i for i in (own.get(axis), *own.values()) if i is not None]
        fitting = [i for i in found if len(i) == new and (not len(i) or int(i.max()) < old)]
        return fitting[0] if fitting else None

    def _relative(self, name: str, axis: int, indices: torch.Tensor) -> torch.Tensor:
        """Kept indices in those of the first program, which may have lost some already."""
        earlier = self._before.kept.get(name, {}).get(axis)
        return indices if earlier is None else torch.searchsorted(earlier, indices)

    def rows(self) -> list[NodeDifference]:
        """All rows, in the order of the first program."""
        return sorted(self._found.values(), key=lambda row: row.index)

    def outputs(self) -> list[tuple[str, NodeDifference]]:
        """The rows of the outputs that are floating, under the names that callers write."""
        skeleton = self._after.unflatten_outputs(list(range(self._after.out_spec.num_leaves)))
        paths, _ = pytree.tree_flatten_with_path(skeleton)
        nodes = self._after.output_node.args[0]
        found = []
        assert isinstance(nodes, tuple | list)
        for (path, _), node in zip(paths, nodes, strict=False):
            if isinstance(node, fx.Node) and node in self._found:
                found.append((output_name(path), self._found[node]))
        return found

    def unmatched(self, program: Program) -> list[fx.Node]:
        """Call nodes without a pair."""
        paired = {*self._pairs, *self._pairs.values()}
        return [n for n in program.nodes if n.op == "call_function" and n not in paired]


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 0


def _measured(row: NodeDifference, want: torch.Tensor, value: torch.Tensor) -> NodeDifference:
    from dataclasses import replace

    if not _floating(value):
        return replace(row, problem=f"{value.dtype} instead of {want.dtype}")
    a, b = want.detach().double().flatten(), value.detach().double().flatten()
    # A mask of -inf is no value to compare where both have it.
    same = torch.isinf(a) & (a == b)
    a, b = a.masked_fill(same, 0.0), b.masked_fill(same, 0.0)
    norm, other = float(a.norm()), float(b.norm())
    error = float((a - b).norm())
    if not math.isfinite(error):
        return replace(row, problem="NaN or infinity")
    relative = error / norm if norm else error
    cosine = float(a @ b) / (norm * other) if norm and other else None
    if cosine is not None:
        cosine = max(-1.0, min(1.0, cosine))
    largest = float((a - b).abs().max())
    return replace(row, error=relative, cosine=cosine, largest=largest)
