"""The parts of `tools/gpu_check`, each of which runs in a process of its own.

A kernel that writes where it must not takes the device away from its whole process: so no part can
lose more than itself. A part gives rows as it goes, which are kept even if it is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchlathe.kernels.tuning import table as tables
from torchlathe.kernels.tuning.table import TileTable
from torchlathe.kernels.tuning.tiles import BUCKETS, Tile, candidates
from torchlathe.tools.kernels.benching import SHAPES, TOKENS, TOLERANCES, bench, error_of
from torchlathe.tools.kernels.benching import measure_ceilings as _ceilings
from torchlathe.tools.kernels.extras import measure_extras
from torchlathe.tools.kernels.further import FURTHER
from torchlathe.tools.kernels.layers import LAYERS, at_most, make_layer
from torchlathe.tools.kernels.timing import Clock
from torchlathe.tools.kernels.tuning import tune, tune_semi_structured
from torchlathe.tools.kernels.verdict import findings

__all__ = ["Part", "Setting", "parts", "run_part"]

Row = dict[str, Any]
# Tokens and features that no tile divides, and more tokens than any tile takes.
_EDGES = (
    (1, 257, 384),
    (2, 256, 512),
    (7, 1000, 768),
    (17, 300, 4096),
    (63, 128, 200),
    (65, 96, 640),
)
# What the other ops are held to: each is another kernel to compile.
_FEWER_EDGES = ((1, 257, 384), (7, 1000, 768), (17, 300, 4096), (65, 96, 640))


@dataclass(frozen=True)
class Setting:
    """What the parts run on.

    Attributes:
        device: Where.
        clock: Takes the time.
        table: Where tiles go.
        processors: Multiprocessors of the device.
        shapes: (output, input) features that are tuned and timed.
        tokens: Numbers of tokens that are timed.
        scale: What the sizes of further measurements are divided by, to try this on a CPU.
        rounds: Measurements of each contestant.
    """

    device: torch.device
    clock: Clock
    table: TileTable
    processors: int
    shapes: Sequence[tuple[int, int]] = SHAPES
    tokens: Sequence[int] = TOKENS
    scale: int = 1
    rounds: int = 40


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: ``stage:what``.
        share: Of the time that is left, compared with the other parts of its kind.
        alone: Whether nothing else may run at the same time: it takes the time.
    """

    name: str
    share: float
    alone: bool

    @property
    def stage(self) -> str:
        """What kind of part it is."""
        return self.name.partition(":")[0]


def parts() -> list[Part]:
    """All parts in order; those that are not ``alone`` run side by side, before the others."""
    sparse = Part("tune:semi_structured", 0.5, True)
    return [
        *(Part(f"compile:{op}", 1.0, False) for op in LAYERS),
        *(Part(f"correct:{op}", 1.0, False) for op in (*LAYERS, *FURTHER)),
        *(Part(f"tune:{op}", 1.0, True) for op in LAYERS),
        sparse,
        *(Part(f"time:{op}", 1.2, True) for op in LAYERS),
        Part("extra:all", 2.5, True),
    ]


def run_part(name: str, setting: Setting, seconds: float) -> Iterator[Row]:
    """The rows of one part; none is begun after so many seconds."""
    stage, _, what = name.partition(":")
    deadline = time.monotonic() + seconds
    run: dict[str, Callable[[str, Setting, float], Iterator[Row]]] = {
        "start": _start,
        "correct": _correct,
        "compile": _compile,
        "tune": _tune,
        "time": _time,
        "extra": _extra,
    }
    yield from run[stage](what, setting, deadline)


def _start(what: str, setting: Setting, deadline: float) -> Iterator[Row]:
    """One launch: where there is no compiler for C, or no driver, nothing else need be tried."""
    with at_most(1):
        layer = make_layer("w4a16", 3, 128, 256, setting.device)
    yield {"kind": "start", "error": error_of(layer), "torch": torch.__version__}


def _correct(what: str, setting: Setting, deadline: float) -> Iterator[Row]:
    for m, n, k in _EDGES if what in LAYERS else _FEWER_EDGES:
        row: Row = {"kind": "correct", "op": what, "m": m, "n": n, "k": k}
        try:
            if what in LAYERS:
                with at_most(1):
                    layer = make_layer(what, m, n, k, setting.device)
                most, error = TOLERANCES[what], error_of(layer)
            else:
                case = FURTHER[what](m, n, k, setting.device)
                most, error = case.tolerance, case.error()
        except Exception as failure:
            yield row | {"correct": False, "failure": _words(failure)}
            continue
        yield row | {"error": error, "correct": error <= most}


def _compile(what: str, setting: Setting, deadline: float) -> Iterator[Row]:
    """Run every candidate once, side by side with other ops, so that tuning need not compile."""
    for m in BUCKETS:
        seen: set[Tile] = set()
        failed: list[str] = []
        for n, k in setting.shapes:
            with at_most(1):
                layer = make_layer(what, m, n, k, setting.device)
            for tile in candidates(layer.problem, setting.processors):
                if tile in seen or time.monotonic() > deadline:
                    continue
                seen.add(tile)
                setting.table.entries[layer.problem.key] = tile
                try:
                    with tables.using(setting.table, setting.processors):
                        layer.ours.calls[0]()
                except Exception as failure:
                    failed.append(f"{tile}: {_words(failure)}")
        compiled = len(seen) - len(failed)
        yield {"kind": "compile", "op": what, "m": m, "compiled": compiled, "failed": failed}


def _tune(what: str, setting: Setting, deadline: float) -> Iterator[Row]:
    rows: list[Row] = []

    def told(problem: Any, tile: Any, seconds: float) -> None:
        chosen = None if tile is None else asdict(tile)
        rows.append({"kind": "tuned", "key": problem.key, "tile": chosen, "us": seconds * 1e6})

    if what == "semi_structured":
        tune_semi_structured(
            setting.device, setting.clock, setting.table, shapes=setting.shapes, progress=told
        )
        yield from rows
        return
    for m in BUCKETS:
        for shape in setting.shapes:
            if time.monotonic() > deadline:
                return
            tune(
                setting.device,
                setting.clock,
                setting.table,
                processors=setting.processors,
                ops=[what],
                shapes=[shape],
                buckets=[m],
                deadline=deadline,
                progress=told,
            )
            yield from rows
            rows.clear()


def _time(what: str, setting: Setting, deadline: float) -> Iterator[Row]:
    for found in bench(
        setting.device,
        setting.clock,
        ops=[what],
        shapes=setting.shapes,
        tokens=setting.tokens,
        rounds=setting.rounds,
        deadline=deadline,
    ):
        bars = [
            {"text": str(one), "bar": one.group, "ratio": one.ratio, "holds": one.holds}
            for one in findings([found])
        ]
        yield {"kind": "measurement", "measurement": found.as_dict(), "bars": bars}


def _extra(what: str, setting: Setting, deadline: float) -> Iterator[Row]:
    ceilings = _ceilings(setting.device, setting.clock)
    yield {"kind": "ceilings", **asdict(ceilings)}
    for extra in measure_extras(
        setting.device, setting.clock, ceilings, scale=setting.scale, deadline=deadline
    ):
        if extra.failure:
            yield {"kind": "failure", "text": f"{extra.name}: {extra.failure}"}
            continue
        bar = {"text": str(extra), "bar": extra.group, "ratio": extra.ratio, "holds": extra.holds}
        yield {"kind": "extra", "extra": asdict(extra), "bars": [bar]}


def _words(failure: Exception) -> str:
    """The end of what an exception says, which is where compilers say it."""
    text = " ".join(str(failure).split())
    return f"{type(failure).__name__}: {text[-300:]}"
