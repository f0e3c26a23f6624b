"""Whether a changed program computes what the program before it did.

Both are run node by node on the same inputs, in float64 where the ops take it and memory allows,
so that a difference means another function and not another order of summation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from torchlathe.ir.errors import Error, UnsupportedError, VerifyError
from torchlathe.ir.extents import expression
from torchlathe.ir.interpreting import ReplaceTensor, run_flat
from torchlathe.ir.memory import fits, give_back
from torchlathe.ir.provenance import describe

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = [
    "Equivalence",
    "LastOutputs",
    "cannot_run",
    "check_equivalence",
    "computed_in",
    "difference",
]

log = logging.getLogger("torchlathe")

Inputs = tuple[Sequence[Any], Mapping[str, Any]]

# Largest difference, relative to the largest output, that rounding explains when everything is
# computed in this dtype. float64 leaves 1e-16 per op and grows with depth and the length of sums;
# a wrong index or divisor is seen at 1e-3 and up. The narrower ones are a few thousand epsilons
# for float32 and a few tens for the halves, whose error deep networks add up to that.
_COMPUTED_IN = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}
# The same when only new weights were rounded to this dtype, and all else is float64.
_STORED_IN = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


# As many samples of a batch are compared; export may take an extent of one for a constant.
_SAMPLES = 2

# Outputs larger than this, of a language model with many words for instance, are computed again.
_MOST_KEPT = 64 * 2**20


def computed_in(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding explains when all is computed in this dtype."""
    return _COMPUTED_IN.get(dtype, 0.5)


@dataclass(frozen=True)
class Equivalence:
    """How far two programs are apart on some inputs.

    Attributes:
        max_abs_error: Largest absolute difference of any floating output.
        max_rel_error: Largest difference of a floating output over the largest magnitude in it.
        passed: Whether the relative error is within the tolerance and all else is equal.
        tolerance: The relative error that rounding explains.
        dtype: What was computed in, for instance ``"float64"``.
        detail: What differs and from which node on, if not passed.
    """

    max_abs_error: float
    max_rel_error: float
    passed: bool
    tolerance: float
    dtype: str
    detail: str | None = None


class LastOutputs:
    """What a program gave when it was last compared.

    In a pipeline what one pass leaves is what the next starts from: its outputs are kept for that
    one comparison, and it runs once instead of twice.
    """

    def __init__(self) -> None:
        self._run: _KeptRun | None = None

    def take(
        self, program: Program, flat: Sequence[Any], dtype: torch.dtype | None
    ) -> tuple[list[Any], frozenset[torch.dtype]] | None:
        """Outputs, and the dtypes that something was computed in, if they are those of this run.

        They are let go of, whether they are or not.

        Args:
            program: Of the pipeline, or a copy of one that has not changed since.
            flat: Its inputs.
            dtype: What is computed in.
        """
        run, self._run = self._run, None
        if run is None or not run.is_of(program, flat, dtype):
            return None
        return run.outputs, run.seen

    def keep(
        self,
        program: Program,
        flat: Sequence[Any],
        dtype: torch.dtype | None,
        outputs: list[Any],
        seen: frozenset[torch.dtype],
    ) -> None:
        """Keep the outputs of a run, unless they are large or writes could go unseen."""
        self._run = None
        tensors = [e.tensor for e in program.entries.values()]
        known = [x for x in (*flat, *tensors, *outputs) if isinstance(x, torch.Tensor)]
        if any(x.is_inference() or x.layout is not torch.strided for x in known):
            return
        if sum(x.nbytes for x in outputs if isinstance(x, torch.Tensor)) > _MOST_KEPT:
            return
        # A view, of the last token's logits for instance, would hold all that it looks at.
        outputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in outputs]
        self._run = _KeptRun(tensors, program.state(), [*flat], _writes(flat), dtype, outputs, seen)


@dataclass(frozen=True)
class _KeptRun:
    """A run: what it was of, which is held so that nothing else can come to lie there."""

    tensors: list[torch.Tensor]
    state: tuple[int, ...]
    flat: list[Any]
    writes: list[int]
    dtype: torch.dtype | None
    outputs: list[Any]
    seen: frozenset[torch.dtype]

    def is_of(self, program: Program, flat: Sequence[Any], dtype: torch.dtype | None) -> bool:
        tensors = [entry.tensor for entry in program.entries.values()]
        return (
            dtype == self.dtype
            and program.state() == self.state
            and len(tensors) == len(self.tensors)
            and all(a is b for a, b in zip(tensors, self.tensors, strict=True))
            and len(flat) == len(self.flat)
            and all(_same_input(a, b) for a, b in zip(flat, self.flat, strict=True))
            and _writes(flat) == self.writes
        )


def _same_input(one: Any, other: Any) -> bool:
    """Whether two inputs are the same, as two cuts of the same samples are."""
    if not isinstance(one, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    return (
        isinstance(other, torch.Tensor)
        and (one.layout, one.device, one.dtype) == (other.layout, other.device, other.dtype)
        and one.layout is torch.strided
        and (one.shape, one.stride()) == (other.shape, other.stride())
        and one.data_ptr() == other.data_ptr()
    )


def _writes(flat: Sequence[Any]) -> list[int]:
    return [x._version for x in flat if isinstance(x, torch.Tensor) and not x.is_inference()]


def cannot_run(program: Program) -> str | None:
    """Why a program cannot be run, if it cannot: its tensors have no values."""
    leaves = pytree.tree_leaves(program.example_inputs)
    for tensor in (*(e.tensor for e in program.entries.values()), *leaves):
        if isinstance(tensor, FakeTensor) or (
            isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"
        ):
            return "it was captured from fake tensors, which have no values"
    return None


def check_equivalence(
    before: Program,
    after: Program,
    *,
    reference: ReplaceTensor | None = None,
    inputs: Inputs | None = None,
    dtype: torch.dtype = torch.float64,
    locate: bool = True,
    last: LastOutputs | None = None,
) -> Equivalence:
    """Compare the outputs of two programs.

    Floating outputs are compared by their largest difference relative to their largest magnitude,
    all others exactly. Where the ops do not take ``dtype``, or it would not fit in memory, both
    run in the dtypes that they have, and the tolerance is wider. It is wider too where ``after``
    has tensors with new values: those were rounded to the dtype that they are stored in.

    Args:
        before: What is right.
        after: What is to be checked; takes the same inputs.
        reference: ``(name, tensor) -> tensor``, applied to the tensors of ``before``.
        inputs: ``(args, kwargs)``; by default the example inputs of ``before``, of which two
            samples are enough where the batch is dynamic.
        dtype: The floating dtype to compute in.
        locate: Where the outputs differ, run both again to name the first node that does.
        last: Of the comparisons before in the same pipeline; what they found of ``before`` is
            used, and what this one finds of ``after`` kept.

    Raises:
        UnsupportedError: The programs have no values to compute with.
        InputError: The inputs do not fit.
        VerifyError: ``after`` does not run.
    """
    if reason := cannot_run(before) or cannot_run(after):
        raise UnsupportedError(f"the programs cannot be compared: {reason}")
    give_back()
    args, kwargs = before.example_inputs if inputs is None else inputs
    flat = before.flatten_inputs(args, kwargs)
    if inputs is None and (few := _first_samples(before, flat)) is not None:
        try:
            found = check_equivalence(
                before,
                after,
                reference=reference,
                inputs=few,
                dtype=dtype,
                locate=locate,
                last=last,
            )
        except (Error, RuntimeError, TypeError, ValueError, IndexError) as error:
            log.debug("cannot compare on the first samples alone: %s", error)
        else:
            return found
    wide = all(fits(program, (args, kwargs), dtype) for program in (before, after))
    if wide:
        run = _Run(before, after, reference, flat, dtype, last)
        try:
            return run.compare(*run.outputs(), locate=locate)
        except (RuntimeError, TypeError, ValueError, VerifyError) as error:
            # An op without a kernel for the dtype, or one that fixes the dtype of an input.
            log.debug("cannot compare in %s: %s", dtype, error)
    run = _Run(before, after, reference, flat, None, last)
    return run.compare(*run.outputs(), locate=locate)


def _first_samples(program: Program, flat: Sequence[Any]) -> Inputs | None:
    """The first samples of a batch: two tell as much as all, at a share of time and memory.

    Only where the first axis of every tensor is the batch and nothing else is: of a graph's nodes
    and edges, for instance, none can be left out.
    """
    batch = None
    for node, value in zip(program.input_nodes, flat, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        shape = [expression(extent) for extent in node.meta["val"].shape]
        first = shape[0] if shape else None
        batch = first if batch is None else batch
        if isinstance(first, int) or not getattr(first, "is_Symbol", False) or first != batch:
            return None
        if any(batch in getattr(extent, "free_symbols", ()) for extent in shape[1:]):
            return None
        if len(value) <= _SAMPLES:
            return None
    if batch is None:
        return None
    few = [v[:_SAMPLES] if isinstance(v, torch.Tensor) else v for v in flat]
    args, kwargs = pytree.tree_unflatten(few, program.in_spec)
    return args, kwargs


class _Run:
    """One comparison in one dtype; None stands for the dtypes that the programs have."""

    def __init__(
        self,
        before: Program,
        after: Program,
        reference: ReplaceTensor | None,
        flat: Sequence[Any],
        dtype: torch.dtype | None,
        last: LastOutputs | None,
    ) -> None:
        self.before, self.after, self.reference = before, after, reference
        self.flat, self.dtype, self.last = flat, dtype, last
        self.seen: set[torch.dtype] = set()  # dtypes that something was computed in

    def outputs(self, watch: _Watch | None = None) -> tuple[list[Any], list[Any]]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            # Random ops draw the same numbers on both sides.
            torch.manual_seed(0)
            want = self._right(watch)
            torch.manual_seed(0)
            return want, self._changed(watch)

    def _right(self, watch: _Watch | None) -> list[Any]:
        """Outputs of the program before."""

        def observe(node: fx.Node, value: Any) -> None:
            self._note(value)
            if watch is not None:
                watch.first(node, value)

        if self.last is not None and self.reference is None and watch is None:
            known = self.last.take(self.before, self.flat, self.dtype)
            if known is not None:
                self.seen |= known[1]
                return known[0]
        replace = self.reference
        return run_flat(
            self.before, self.flat, replace_tensor=replace, dtype=self.dtype, observe=observe
        )

    def _changed(self, watch: _Watch | None) -> list[Any]:
        """Outputs of the program after."""
        done: list[fx.Node] = []
        before, self.seen = self.seen, set()

        def observe(node: fx.Node, value: Any) -> None:
            done.append(node)
            self._note(value)
            if watch is not None:
                watch.second(node, value)

        try:
            got = run_flat(self.after, self.flat, dtype=self.dtype, observe=observe)
        except (RuntimeError, TypeError, ValueError) as error:
            calls = [node for node in self.after.nodes if node.op == "call_function"]
            raise VerifyError(
                f"the changed program does not run: {error}",
                where=describe(calls[len(done)]) if len(done) < len(calls) else None,
            ) from error
        if self.last is not None:
            self.last.keep(self.after, self.flat, self.dtype, got, frozenset(self.seen))
        self.seen |= before
        return got

    def _note(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            self.seen.add(value.dtype.to_real())

    def compare(self, want: Sequence[Any], got: Sequence[Any], *, locate: bool) -> Equivalence:
        tolerance, name = self._tolerance()
        worst_abs = worst_rel = 0.0
        detail: str | None = None
        if len(want) != len(got):
            detail = f"{len(got)} outputs instead of {len(want)}"
        for index, (a, b) in enumerate(zip(want, got, strict=False)):
            absolute, relative, problem = difference(a, b)
            worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
            if problem is None and relative > tolerance:
                problem = f"differs by {relative:.3g} of its largest value"
            if problem is not None and detail is None:
                detail = f"output {index} {problem}"
        if detail is not None and locate and (place := self._first_difference(tolerance)):
            detail += f"; the first node that differs is {place}"
        return Equivalence(worst_abs, worst_rel, detail is None, tolerance, name, detail)

    def _tolerance(self) -> tuple[float, str]:
        """The tolerance, and the narrowest dtype that anything was computed in.

        A cast that the graph fixes, to complex64 for instance, is narrower than what was asked for.
        """
        found = self.seen or {torch.float64}
        narrowest = max(found, key=computed_in)
        tolerance = computed_in(narrowest)
        if self.dtype is not None:
            stored = (_STORED_IN.get(d, 5e-2) for d in _new_values(self.before, self.after))
            tolerance = max([tolerance, *stored])
        return tolerance, str(narrowest).removeprefix("torch.")

    def _first_difference(self, tolerance: float) -> str | None:
        """The first node, of those that both programs have, whose value is another one."""
        watch = _Watch(tolerance)
        self.outputs(watch)
        return None if watch.found is None else describe(watch.found)


class _Watch:
    """Compares node by node by two numbers of each value, so that no value has to be kept."""

    def __init__(self, tolerance: float) -> None:
        self.found: fx.Node | None = None
        self._tolerance = tolerance
        self._seen: dict[str, tuple[Any, ...]] = {}

    def first(self, node: fx.Node, value: Any) -> None:
        """Observe a node of the program before."""
        self._seen[node.name] = _sketch(value)

    def second(self, node: fx.Node, value: Any) -> None:
        """Observe a node of the program after; keep the first that differs."""
        want = self._seen.get(node.name)
        if self.found is not None or want is None:
            return
        got = _sketch(value)
        # Another shape is no difference: that is what erasing does.
        if want and got and want[0] == got[0]:
            scale = max(abs(want[1]), torch.finfo(torch.float64).tiny)
            if any(
                abs(a - b) > self._tolerance * scale for a, b in zip(want[1:], got[1:], strict=True)
            ):
                self.found = node


def _sketch(value: Any) -> tuple[Any, ...]:
    """Shape, norm, and product with a fixed vector: enough to tell two values apart."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return ()
    flat = value.detach().reshape(-1).double()
    probe = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return tuple(value.shape), float(flat.norm()), float(flat @ probe)


def difference(want: Any, got: Any) -> tuple[float, float, str | None]:
    """Largest absolute difference of two outputs, relative to the largest value, and what is wrong.

    The last is None unless they differ in what is no number: shape, dtype, or integers.
    """
    if not (isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)):
        same = type(want) is type(got) and bool(want == got)
        return 0.0, 0.0, None if same else f"is {got!r} instead of {want!r}"
    if want.shape != got.shape or want.dtype != got.dtype:
        return 0.0, 0.0, f"is {_kind(got)} instead of {_kind(want)}"
    if not want.numel():
        return 0.0, 0.0, None
    if not (want.is_floating_point() or want.is_complex()):
        count = int((want != got).sum())
        return 0.0, 0.0, f"differs in {count} of {want.numel()} elements" if count else None
    # Equal infinities and two NaNs in one place are equal.
    equal = (want == got) | (want.isnan() & got.isnan())
    if want.is_floating_point():  # a difference of halves would be rounded again
        want, got = want.double(), got.double()
    gap = torch.where(equal, 0.0, (want - got).abs())
    absolute = float(gap.nan_to_num(nan=torch.inf).max())
    if absolute == 0.0:
        return 0.0, 0.0, None
    finite = want.abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = max(float(finite.max()), torch.finfo(torch.float32).tiny)
    return absolute, absolute / scale, None


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


# -- tensors with new values ---------------------------------------------------------------------


def _new_values(before: Program, after: Program) -> Iterator[torch.dtype]:
    """Dtypes of the floating tensors of ``after`` that are no selection of one of ``before``."""
    for name, entry in after.entries.items():
        old = before.entries.get(name)
        new = entry.tensor
        if not new.is_floating_point() or (old is not None and old.tensor is new):
            continue
        if old is None or not _is_selection(old.tensor, new, name, before, after):
            yield new.dtype


def _is_selection(
    old: torch.Tensor, new: torch.Tensor, name: str, before: Program, after: Program
) -> bool:
    """Whether a tensor is what is left of the old one at the indices that were kept."""
    earlier = before.kept.get(name, {})
    with torch.no_grad():
        for axis, indices in after.kept.get(name, {}).items():
            if axis in earlier:
                indices = torch.searchsorted(earlier[axis], indices)
            if indices.numel() != old.shape[axis]:
                old = old.index_select(axis, indices.to(old.device))
        return old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
