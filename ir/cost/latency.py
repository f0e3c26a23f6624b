"""How long a program takes: a table of measured ops, kept on disk and filled on demand.

An entry is one op on tensors of given shapes, dtypes and strides, on one device with one number of
threads. The sum over a program's nodes is scaled by how long a whole program took against the sum
of its ops, since what runs in between (the interpreter, cold caches) is in no single op.
Source: own; tables of ops by shape are as in FBNet (arXiv 1812.03443, section 3.3).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchlathe.ir.cost.calls import Call, Value, read_call, value_of
from torchlathe.ir.cost.roofline import NOMINAL, Peaks, measured_peaks, roofline
from torchlathe.ir.cost.timing import Clock, Timer, call_on, median, samples
from torchlathe.ir.equivalence import cannot_run
from torchlathe.ir.extents import as_int, example_sizes
from torchlathe.ir.files import write_text

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["LatencyTable", "ProgramLatency", "cache_directory"]

log = logging.getLogger("torchlathe")

_ROUNDS = 9
_CAP = 0.05  # seconds of samples per entry
_TOGETHER = 2**28  # bytes of inputs that are timed in turn
_FORMAT = 1


@dataclass(frozen=True)
class ProgramLatency:
    """What a table says about a program.

    Attributes:
        seconds: Sum over the nodes.
        nodes: Seconds of each node by name.
        measured: How many of the nodes have a measured entry.
        estimated: How many were estimated by the roofline.
    """

    seconds: float
    nodes: Mapping[str, float]
    measured: int
    estimated: int


def cache_directory() -> Path:
    """Where measurements are kept: TORCHLATHE_CACHE, or ``torchlathe`` in the user's cache."""
    if own := os.environ.get("TORCHLATHE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "torchlathe"


class LatencyTable:
    """Seconds of single ops on one device.

    Args:
        device: Where the ops run.
        directory: Where the file is; None for `cache_directory`. Entries are kept by torch
            version, processor and number of threads.
        timer: Takes the time of a call; by default the wall clock. With another one nothing is
            read from or written to disk unless ``directory`` is given.
        measure: Whether to time what is not in the table; otherwise that is estimated by FLOPs
            and bytes over the peaks of the machine.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        directory: str | os.PathLike[str] | None = None,
        timer: Timer | None = None,
        measure: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.timer = timer or Clock(self.device)
        self.measure = measure
        self.measurements = 0
        self.entries: dict[str, float] = {}
        self._peaks: Peaks | None = None
        self._key = {
            "torch": torch.__version__,
            "processor": _processor(self.device),
            "threads": torch.get_num_threads(),
        }
        kept = timer is None or directory is not None
        folder = Path(directory) if directory is not None else cache_directory()
        self.path = folder / "latency" / self._file_name() if kept else None
        self._load()

    # -- asking --------------------------------------------------------------------------------

    def program(self, program: Program, *, only: Container[str] | None = None) -> ProgramLatency:
        """The sum over a program's nodes at the sizes of its example inputs, unscaled.

        What is missing is measured first, and the table saved; but not for a program without
        values, which is too large to be run here, or meant for another machine.

        Args:
            program: The program.
            only: Names of the nodes that are asked about; by default all.

        Raises:
            InputError: An extent depends on data.
        """
        calls = {name: c for name, c in _calls(program) if only is None or name in only}
        missing = [c for c in dict.fromkeys(calls.values()) if key_of(c) not in self.entries]
        if self.measure and missing and cannot_run(program) is None:
            self.fill(missing)
            self.save()
        seconds: dict[str, float] = {}
        measured = 0
        for name, call in calls.items():
            known = self.entries.get(key_of(call))
            measured += known is not None
            seconds[name] = self.estimate(call) if known is None else known
        total = sum(seconds.values())
        return ProgramLatency(total, seconds, measured, len(seconds) - measured)

    def estimate(self, call: Call) -> float:
        """Seconds of a call by the roofline."""
        return roofline(call, self.peaks)

    @property
    def peaks(self) -> Peaks:
        """FLOPs and bytes per second of the machine; measured once, if measuring is on."""
        if self._peaks is None:
            self._peaks = measured_peaks(self.device, self.timer) if self.measure else NOMINAL
        return self._peaks

    def whole(self, *programs: Program) -> list[float]:
        """Seconds that a run of each program on its example inputs takes; timed in turn.

        Raises:
            UnsupportedError: A program has no values to run on.
        """
        with torch.inference_mode():
            works = [_run(program) for program in programs]
            return [median(s) for s in samples(works, self.timer, rounds=_ROUNDS, cap=1.0)]

    # -- measuring -----------------------------------------------------------------------------

    def fill(self, calls: Iterable[Call]) -> None:
        """Measure calls, those of a batch in turn; what does not run alone stays without entry."""
        batch: list[tuple[str, Callable[[], object]]] = []
        held = 0
        with torch.inference_mode():
            for call in calls:
                work = self._runnable(call)
                if work is not None:
                    batch.append((key_of(call), work))
                    held += sum(int(value.nbytes) for value in call.inputs)
                if held > _TOGETHER:
                    self._measure(batch)
                    batch, held = [], 0
            self._measure(batch)

    def _runnable(self, call: Call) -> Callable[[], object] | None:
        try:
            work = call_on(call, self.device)
            work()
        except Exception as error:
            log.debug("%s cannot be timed alone: %s", call.name, error)
            return None
        return work

    def _measure(self, batch: list[tuple[str, Callable[[], object]]]) -> None:
        times = samples([work for _, work in batch], self.timer, rounds=_ROUNDS, cap=_CAP)
        for (key, _), taken in zip(batch, times, strict=True):
            self.entries[key] = median(taken)
        self.measurements += len(batch)

    # -- keeping -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the table atomically, with what others have added to the file meanwhile.

        A cache that cannot be written is no error.
        """
        if self.path is None:
            return
        peaks = None if self._peaks is None else [self._peaks.flops, self._peaks.bytes]
        text = {
            "format": _FORMAT,
            **self._key,
            "peaks": peaks,
            "seconds": {**self._read().get("seconds", {}), **self.entries},
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(text, indent=0) + "\n")
        except OSError as error:
            log.debug("the latency table cannot be kept: %s", error)

    def _load(self) -> None:
        found = self._read()
        self.entries.update(found.get("seconds", {}))
        if found.get("peaks"):
            self._peaks = Peaks(*found["peaks"])

    def _read(self) -> dict[str, Any]:
        """The file's content; nothing if there is none that fits, or it is damaged."""
        if self.path is None:
            return {}
        with suppress(OSError, ValueError, TypeError, AttributeError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(found.get(name) == value for name, value in self._key.items())
            seconds = found.get("seconds", {})
            sound = all(isinstance(s, float) and s >= 0 for s in seconds.values())
            if found.get("format") == _FORMAT and same and sound:
                return dict(found)
        return {}

    def _file_name(self) -> str:
        text = "-".join(str(value) for value in self._key.values())
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return re.sub(r"[^A-Za-z0-9.]+", "-", text)[:80] + f"-{digest}.json"


# -- calls -------------------------------------------------------------------------------------


def key_of(call: Call) -> str:
    """The text that an entry is kept by: op, shapes, dtypes, strides where they are not dense."""
    parts = [*map(_text, call.args), *(f"{name}={_text(item)}" for name, item in call.kwargs)]
    return f"{call.target}({', '.join(parts)})"


def _text(item: Any) -> str:
    if isinstance(item, Value):
        text = f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
        dense = Value(item.shape, item.dtype, _dense_strides(item.shape))
        return text if item == dense else f"{text}@{list(item.strides)}"
    if isinstance(item, tuple):
        return f"[{', '.join(map(_text, item))}]"
    return str(item)


def _dense_strides(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    strides: list[Any] = []
    step = 1
    for extent in reversed(shape):
        strides.insert(0, step)
        step = step * max(extent, 1)
    return tuple(strides)


def _calls(program: Program) -> Iterable[tuple[str, Call]]:
    """The calls of a program that take time, with integer extents, by the name of their node."""
    sizes = example_sizes(program)

    def concrete(item: Any) -> Any:
        if isinstance(item, Value):
            return Value(concrete(item.shape), item.dtype, concrete(item.strides))
        if isinstance(item, tuple):
            return tuple(map(concrete, item))
        return as_int(item, sizes) if hasattr(item, "free_symbols") else item

    values: dict[Any, Any] = {}
    for node in program.graph.nodes:
        if "val" in node.meta:
            values[node] = concrete(value_of(node.meta["val"]))
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue  # taking one of several results, and arithmetic on sizes
        call = read_call(node, values)
        call = Call(call.target, concrete(call.args), concrete(call.kwargs), call.out)
        if call.outputs:
            yield node.name, call


def _run(program: Program) -> Callable[[], object]:
    """The program as something to call, on its own tensors and example inputs."""
    if reason := cannot_run(program):
        from torchlathe.ir.errors import UnsupportedError

        raise UnsupportedError(f"the program cannot be timed: {reason}")
    args, kwargs = program.example_inputs
    tensors = [program.entries[name].tensor.detach() for name in program.tensor_nodes]
    flat = [*tensors, *program.flatten_inputs(args, kwargs)]
    return lambda: program.graph_module(*flat)


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
