"""The kernels that are compiled ahead of time, with their limits, and the check of them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from torchlathe.kernels.aot.assembly import main_loop, whole
from torchlathe.kernels.aot.compiling import ARCHITECTURES, Architecture, compile_kernel

__all__ = ["CONTROL", "OPS", "Case", "Limits", "Row", "all_cases", "check_case", "check_cases"]

# The ops with cases, in the order of the table; each has a module `cases` next to its kernel.
OPS = (
    "w4a16",
    "norm_quantise",
    "w8a8",
    "w8a16",
    "w4a8",
    "w4a16_experts",
    "w8a16_experts",
    "w8a8_experts",
    "block_sparse",
    "low_rank",
)
# The kernel that must break its limits.
CONTROL = "control"

_MOST_REGISTERS = 255


@dataclass(frozen=True)
class Limits:
    """What the binary of a kernel must keep; stack and shared memory always have limits.

    Attributes:
        slots: Most instruction slots per weight, by architecture; none where it is missing.
        mma: Kinds of matrix instruction that will do, by architecture; any where it is missing.
        load_bytes: Least width of the loads that carry most bytes, on every architecture.
        conversions: Most conversions of integers to floats in the loop (NVIDIA).
    """

    slots: Mapping[str, float] = field(default_factory=dict)
    mma: Mapping[str, Collection[str]] = field(default_factory=dict)
    load_bytes: int = 16
    conversions: int | None = None


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel.

    Attributes:
        op: Name of the op.
        config: What tells this case from others of the op, in a line.
        kernel: Gives the ``@triton.jit`` function; called late, because it imports Triton.
        signature: Triton's types of the arguments.
        constants: The constexpr arguments, given the architecture.
        divisible: Arguments that are multiples of 16 at each launch.
        step: Weights (elements) and asynchronously copied bytes of a block in one iteration.
        limits: What the binary must keep.
        architectures: Names of those that it is compiled for.
        num_warps: Warps of a block.
        num_stages: Stages of the pipeline (two at most on AMD).
        loops: Whether there is a main loop; without one the whole kernel is counted.
    """

    op: str
    config: str
    kernel: Callable[[], Any]
    signature: Mapping[str, str]
    constants: Callable[[Architecture], Mapping[str, Any]]
    divisible: Collection[str]
    step: tuple[int, int]
    limits: Limits = Limits()
    architectures: Collection[str] = ("sm_80", "sm_90", "gfx942")
    num_warps: int = 4
    num_stages: int = 3
    loops: bool = True


@dataclass(frozen=True)
class Row:
    """The facts of one binary, and which limits it breaks.

    Attributes:
        op: Name of the op.
        arch: The architecture.
        config: The specialisation.
        registers: Vector registers of a thread.
        stack: Bytes of stack of a thread.
        shared: Bytes of shared memory of a block.
        slots_per_weight: Instructions of the main loop for each weight (element, where an op has
            no weights); None without a loop.
        mma: Kind of matrix instruction.
        load_bytes: Width of the loads that carry most bytes.
        problems: What breaks a limit; empty is good.
    """

    op: str
    arch: str
    config: str
    registers: int
    stack: int
    shared: int
    slots_per_weight: float | None
    mma: str
    load_bytes: int
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON."""
        return asdict(self)


def all_cases(ops: Collection[str] = OPS) -> Iterator[Case]:
    """Every case of the named ops."""
    for op in (*OPS, CONTROL):
        if op in ops:
            yield from import_module(f"torchlathe.kernels.{op}.cases").cases()


def check_cases(
    cases: Collection[Case],
    architectures: Collection[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Compile each case for each of the architectures that it has, and hold it to its limits."""
    work = [
        (case, ARCHITECTURES[name])
        for case in cases
        for name in architectures
        if name in case.architectures
    ]
    rows = []
    for done, (case, architecture) in enumerate(work, 1):
        rows.append(check_case(case, architecture))
        if progress is not None:
            progress(done, len(work))
    return rows


def check_case(case: Case, architecture: Architecture) -> Row:
    """Compile one case for one architecture, and hold it to its limits."""
    constants = case.constants(architecture)
    stages = case.num_stages if architecture.is_nvidia else min(case.num_stages, 2)
    # A row for what does not compile is of more use than a traceback from the middle of a table.
    try:
        binary = compile_kernel(
            case.kernel(),
            case.signature,
            constants,
            architecture,
            divisible=case.divisible,
            num_warps=case.num_warps,
            num_stages=stages,
        )
    except Exception as error:
        text = f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}"
        return Row(case.op, architecture.name, case.config, 0, 0, 0, None, "none", 0, (text,))
    loop = main_loop(binary) if case.loops else whole(binary)
    slots = None if loop is None else round(loop.slots_per(*case.step), 2)
    mma = "none" if loop is None else loop.mma
    width = 0 if loop is None else loop.load_bytes
    problems = list(
        _problems(case.limits, architecture, slots, mma, width, loop.conversions if loop else 0)
    )
    if binary.stack:
        problems.append(f"{binary.stack} bytes of stack, the limit is 0")
    if binary.shared > architecture.shared_bytes:
        problems.append(
            f"{binary.shared} bytes of shared memory, the limit is {architecture.shared_bytes}"
        )
    return Row(
        case.op,
        architecture.name,
        case.config,
        binary.registers,
        binary.stack,
        binary.shared,
        slots,
        mma,
        width,
        tuple(problems),
    )


def _problems(
    limits: Limits,
    architecture: Architecture,
    slots: float | None,
    mma: str,
    width: int,
    conversions: int,
) -> Iterator[str]:
    most = limits.slots.get(architecture.name)
    if most is not None and (slots is None or slots > most):
        yield f"{slots} slots per weight, the limit is {most}"
    kinds = limits.mma.get(architecture.name)
    if kinds is not None and mma not in kinds:
        yield f"matrix instructions {mma}, wanted {' or '.join(sorted(kinds))}"
    if width < limits.load_bytes:
        yield f"loads of {width} bytes, wanted {limits.load_bytes}"
    if limits.conversions is not None and conversions > limits.conversions:
        yield f"{conversions} conversions from integers, the limit is {limits.conversions}"
