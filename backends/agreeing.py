"""Holding what a backend made against the eager program, before anyone gets it.

Both run on the example inputs and, where dimensions are dynamic, on inputs that are larger by one
in each of them. A backend may sum in another order and fuse ops; it may not compute another
function. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchlathe.backends.base import Backend, FlatCallable, Lowerable, capabilities_of
from torchlathe.backends.eager import Eager
from torchlathe.backends.examples import flat_examples, grown_inputs
from torchlathe.backends.rounding import rounds
from torchlathe.ir import BackendError, Error, Program
from torchlathe.ir.equivalence import computed_in, difference
from torchlathe.ir.inputs import input_paths

__all__ = ["Agreement", "DisagreementError", "check_agreement"]

# Where activations are rounded to integers, a last bit that differs takes a value to the next
# step, and later layers see it. The result is as far away as the rounding itself is from no
# rounding: a few per cent of the norm with 8 bits. A wrong layout or scale is far above it.
_ROUNDED = 5e-2


class DisagreementError(BackendError):
    """A backend made something that computes another function than the program."""


@dataclass(frozen=True)
class Agreement:
    """How far a lowered program is from the eager one.

    Attributes:
        error: Largest difference of a floating output over the largest magnitude in it; over the
            norm of the output where the program rounds activations to integers.
        tolerance: What it may be.
        dtype: Narrowest floating dtype in the program, which decides that.
        sizes: How many sizes of the inputs were tried.
    """

    error: float
    tolerance: float
    dtype: str
    sizes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def check_agreement(backend: Backend, source: Lowerable, run: FlatCallable) -> Agreement:
    """Compare a lowered program with the eager one.

    Args:
        backend: What lowered it, for messages.
        source: The program.
        run: What the backend made of it.

    Raises:
        DisagreementError: Another function, by more than rounding explains.
        BackendError: It does not run on the example inputs, or not at another size.
    """
    program = source.program
    eager = Eager().lower(source)
    rounding = rounds(program)
    dtype, tolerance = _tolerance(program)
    tolerance = max(tolerance, _ROUNDED) if rounding else tolerance
    worst, sizes = 0.0, 0
    for what, inputs in _trials(program, capabilities_of(backend).dynamic_shapes):
        want = _run(eager, inputs)
        if isinstance(want, Exception):
            if sizes:  # what else has to grow along is not known
                continue
            raise BackendError(f"the program does not run eagerly: {want}") from want
        got = _run(run, inputs)
        if isinstance(got, Exception):
            raise _does_not_run(backend, what, got) from got
        worst = max(worst, _compare(backend, program, what, want, got, tolerance, rounding))
        sizes += 1
    name = str(dtype).removeprefix("torch.")
    return Agreement(worst, tolerance, name, sizes)


def _trials(program: Program, dynamic: bool) -> list[tuple[str, Sequence[Any]]]:
    flat = flat_examples(program)
    found: list[tuple[str, Sequence[Any]]] = [("on the example inputs", flat)]
    if dynamic and (grown := grown_inputs(program)) is not None:
        found.append(("at another size of the dynamic dimensions", grown))
    return found


def _run(run: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Outputs, or the error."""
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            return list(run(*inputs))
        except Exception as error:
            return error


def _does_not_run(backend: Backend, what: str, error: Exception) -> BackendError:
    if isinstance(error, Error):
        return BackendError(error.message, where=error.where, hint=error.hint)
    text = " ".join(line.strip() for line in str(error).splitlines()[:3])
    return BackendError(
        f"what {backend.name!r} made of the program does not run {what}: "
        f"{type(error).__name__}: {text[:500]}",
        hint='backend="eager" runs every program',
    )


def _compare(
    backend: Backend,
    program: Program,
    what: str,
    want: Sequence[Any],
    got: Sequence[Any],
    tolerance: float,
    rounding: bool,
) -> float:
    """The largest relative difference of the outputs.

    Raises:
        DisagreementError: It is above the tolerance, or is no matter of rounding.
    """
    if len(want) != len(got):
        raise DisagreementError(f"{backend.name!r} gives {len(got)} outputs, not {len(want)}")
    worst = 0.0
    for index, (a, b) in enumerate(zip(want, got, strict=True)):
        _, relative, problem = difference(a, b)
        if rounding and problem is None and isinstance(a, torch.Tensor) and relative:
            relative = _by_norm(a, b)
        if problem is None and not relative <= tolerance:
            problem = f"differs by {relative:.3g} of its size, tolerance {tolerance:.3g}"
        if problem is not None:
            raise DisagreementError(
                f"{backend.name!r} does not compute what the program does: {what}, output "
                f"{index} {problem}",
                where=f"inputs {', '.join(input_paths(program))}",
                hint='backend="eager" runs every program; torchlathe.compile(verify="off") hands '
                "the result out as it is",
            )
        worst = max(worst, relative)
    return worst


def _by_norm(want: torch.Tensor, got: torch.Tensor) -> float:
    norm = float(want.double().norm())
    error = float((want.double() - got.double()).norm())
    return error / norm if norm else error


def _tolerance(program: Program) -> tuple[torch.dtype, float]:
    """The narrowest floating dtype of any value, and the error that it explains."""
    found = {
        value.dtype.to_real()
        for node in program.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
        and (value.is_floating_point() or value.is_complex())
    }
    dtype = max(found or {torch.float64}, key=computed_in)
    # A backend may fuse what the program computes in float64 into float32 constants and back.
    return dtype, max(computed_in(dtype), 1e-6)
