"""Running a rebuilt module against its program, and finding where the two part."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchlathe.ir import Program
from torchlathe.ir.capturing import eval_mode
from torchlathe.ir.interpreting import run_flat

__all__ = ["Outcome", "Trial", "difference", "nodes_by_module", "other_batch"]

log = logging.getLogger("torchlathe")

# As `torchlathe.ir.equivalence` has it: a few thousand epsilons for float32, and the halves
# several tens, which is what the depth of a network makes of rounding.
_TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 2e-1,
}
# Parameters that are copied to float64 for the check: 4 GB of them.
_MOST_WIDE = 500_000_000
_RUN_ERRORS = (
    RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError,
    ZeroDivisionError, NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How far a module got in doing what its program does.

    Attributes:
        ok: Whether all outputs agree.
        reached: How many calls of modules agreed before the first that did not.
        path: Path of the module in which it failed.
        text: What was wrong.
    """

    ok: bool
    reached: int = 0
    path: str = ""
    text: str = ""


def _call(
    module: nn.Module,
    program: Program,
    flat: Sequence[Any],
    tensors: Mapping[str, torch.Tensor],
) -> list[Any]:
    """Call a module in eval mode with flat inputs of its program, and tensors for its own."""
    args, kwargs = pytree.tree_unflatten(list(flat), program.in_spec)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(module):
        torch.manual_seed(0)
        found = torch.func.functional_call(module, dict(tensors), args, kwargs)
    return list(pytree.tree_leaves(found))


def _stand_ins(program: Program) -> dict[str, torch.Tensor]:
    """Random values for parameters that are all zero, as fresh heads and biases are.

    What is behind them would not be seen in the outputs. A rebuilt module must equal its program
    whatever the values are.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in program.parameters.items():
        if tensor.is_floating_point() and not bool(tensor.detach().any()):
            value = 0.1 * torch.randn(tensor.shape, generator=generator)
            found[name] = value.to(dtype=tensor.dtype, device=tensor.device)
    return found


class Trial:
    """Runs candidates on one set of inputs, next to the values of the program.

    Args:
        program: What is right.
        flat: Its flat inputs.
    """

    def __init__(self, program: Program, flat: Sequence[Any]) -> None:
        self.program, self.flat = program, list(flat)
        self._seen: dict[int, list[tuple[float, float]]] = {}
        self._dtype = torch.float32
        for value in flat:
            self._note(value)
        self._tensors = _stand_ins(program)
        self.want = self._program_run(observe=lambda _, value: self._note(value))
        self._tolerance = max(
            [_TOLERANCES.get(v.dtype, 2e-4) for v in self.want if _floating(v)], default=2e-4
        )

    def _program_run(self, **options: Any) -> list[Any]:
        def tensor(name: str, own: torch.Tensor) -> torch.Tensor:
            return self._tensors.get(name, own)

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return run_flat(self.program, self.flat, replace_tensor=tensor, **options)

    def run(self, module: nn.Module) -> Outcome:
        """Run a candidate with hooks that tell where it goes wrong."""
        watch = _Watch(self)
        try:
            with watch.on(module):
                got = _call(module, self.program, self.flat, self._tensors)
        except _RUN_ERRORS as error:
            first = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {first[0]}"
            if watch.wrong is not None:
                return Outcome(False, watch.wrong[0], watch.wrong[1], text)
            return Outcome(False, watch.count, watch.stack[-1] if watch.stack else "", text)
        problem = difference(self.want, got, self._tolerance)
        if problem is None:
            return Outcome(True)
        if watch.wrong is not None:
            return Outcome(False, watch.wrong[0], watch.wrong[1], problem)
        return Outcome(False, watch.count, "", problem)

    def check(self, module: nn.Module) -> str | None:
        """What is wrong with a module's outputs in float64, or in its own dtypes; None: nothing."""
        narrow = _Narrowest()
        if sum(p.numel() for p in module.parameters()) > _MOST_WIDE:
            with narrow:
                got = _call(module, self.program, self.flat, self._tensors)
            return difference(self.want, got, narrow.tolerance())
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors |= self._tensors
        wide = {n: t.detach().double() if _floating(t) else t.detach() for n, t in tensors.items()}
        flat = [value.double() if _floating(value) else value for value in self.flat]
        try:
            want = self._program_run(dtype=torch.float64)
            with narrow:
                got = _call(module, self.program, flat, wide)
            got = [g.double() if _floating(g) else g for g in got]
            return difference(want, got, narrow.tolerance())
        except _RUN_ERRORS as error:
            # Code that makes tensors of its own dtype does not mix with float64.
            log.debug("the module does not run in float64: %s", error)
        with narrow:
            got = _call(module, self.program, self.flat, self._tensors)
        return difference(self.want, got, narrow.tolerance())

    def knows(self, value: torch.Tensor) -> bool:
        """Whether some value of the program is this one, up to its shape."""
        if not value.numel() or not bool(value.any()):
            return True
        total, square = _sketch(value)
        scale = square**0.5 * max(1.0, value.numel() ** 0.5)
        near = 50 * self._tolerance
        return any(
            abs(total - a) <= near * max(scale, 1e-6)
            and abs(square - b) <= near * max(square, 1e-6)
            for a, b in self._seen.get(value.numel(), ())
        )

    def _note(self, value: Any) -> None:
        for item in value if isinstance(value, list | tuple) else (value,):
            if _floating(item):
                self._seen.setdefault(item.numel(), []).append(_sketch(item))


class _Watch:
    """Follows the calls of a module's parts."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.stack: list[str] = []
        self.count = 0
        self.wrong: tuple[int, str] | None = None

    @contextlib.contextmanager
    def on(self, root: nn.Module) -> Iterator[None]:
        handles = []
        for path, module in root.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            handles.append(module.register_forward_hook(self._leave(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(path)

        return hook

    def _leave(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            values = output if isinstance(output, list | tuple) else (output,)
            floats = [v for v in values if _floating(v)]
            if self.wrong is None and not all(map(self.trial.knows, floats)):
                self.wrong = (self.count, path)
            self.count += 1

        return hook


class _Narrowest(TorchDispatchMode):
    """Notes in which floating dtypes something was computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if _floating(value):
                self.seen.add(value.dtype)
        return result

    def tolerance(self) -> float:
        """What rounding explains."""
        return max((_TOLERANCES.get(dtype, 2e-4) for dtype in self.seen), default=1e-9)


def difference(want: Sequence[Any], got: Sequence[Any], tolerance: float) -> str | None:
    """What differs in flat outputs, relative to the largest value of each; None for nothing."""
    if len(want) != len(got):
        return f"there are {len(got)} outputs instead of {len(want)}"
    for index, (a, b) in enumerate(zip(want, got, strict=True)):
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if type(a) is not type(b) or a != b:
                return f"output {index} is {b!r} instead of {a!r}"
            continue
        if a.shape != b.shape:
            return f"output {index} has the shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if not a.numel():
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        if bool(same.all()):
            continue
        if not _floating(a):
            return f"output {index} differs in {int((~same).sum())} of {a.numel()} elements"
        gap = torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=torch.inf)
        scale = a.double().abs().nan_to_num(nan=0.0, posinf=0.0).max().clamp_min(1e-30)
        if float(gap.max() / scale) > tolerance:
            return f"output {index} differs by {float(gap.max() / scale):.3g} of its largest value"
    return None


def other_batch(program: Program) -> list[Any] | None:
    """The example inputs at another size of the dynamic dimensions; None if none is dynamic."""
    args, kwargs = program.example_inputs
    flat = program.flatten_inputs(args, kwargs)
    symbols: dict[Any, int] = {}
    for node, value in zip(program.input_nodes, flat, strict=True):
        fake = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor):
            for axis, extent in enumerate(fake.shape):
                if not isinstance(extent, int) and extent.node.expr.is_symbol:
                    symbols.setdefault(extent.node.expr, value.shape[axis])
    if not symbols:
        return None
    # Export may have a symbol for each of several inputs of one batch.
    size = next(iter(symbols.values()))
    alike = {symbol for symbol, extent in symbols.items() if extent == size}
    limits = [program.range_constraints.get(symbol) for symbol in alike]
    if not all(limit is None or bool(limit.upper >= size + 1) for limit in limits):
        return None
    grown = []
    for node, value in zip(program.input_nodes, flat, strict=True):
        fake = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor):
            for axis, extent in enumerate(fake.shape):
                if not isinstance(extent, int) and extent.node.expr in alike:
                    index = torch.arange(size + 1, device=value.device) % size
                    value = value.index_select(axis, index)
        grown.append(value)
    return grown


def _sketch(value: torch.Tensor) -> tuple[float, float]:
    wide = value.detach().double()
    return float(wide.sum()), float(wide.square().sum())


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def nodes_by_module(program: Program) -> dict[str, list[fx.Node]]:
    """Nodes by each module that they were made in."""
    from torchlathe.ir.provenance import module_path

    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            found.setdefault(module_path(node), []).append(node)
    return found
