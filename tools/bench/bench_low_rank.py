"""Low-rank splits of MiniLM: agreement against size, the time of a split, and the speed of layers.

The encoder is pretrained; its calibration and test sentences are disjoint parts of Python's
documentation. Nothing is trained after the split. Rows that the result file has are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console

from torchlathe.ir.files import write_text
from torchlathe.passes.rewrite.factorising.splits import svd_split, whitened_split
from torchlathe.passes.rewrite.tensor_networks.plans import (
    bond_within,
    modes_of,
    network_cores,
    network_plan,
)
from torchlathe.tools.bench.low_rank.memory import memory
from torchlathe.tools.bench.low_rank.quality import (
    SHARES,
    characters,
    healed,
    healed_minilm,
    minilm,
)
from torchlathe.tools.bench.machine import machine

__all__ = ["main"]

# Elements of a matrix that is timed once.
_LARGE: Final = 10_000_000
RESULTS: Final = Path(__file__).resolve().parent / "results" / "low_rank_cpu.json"


def _clock() -> float:
    """Seconds of this thread alone where it does all the work, since other programs may run."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _cases(
    weight: torch.Tensor, half: int, low: int
) -> dict[str, tuple[int, Callable[[torch.Tensor], object]]]:
    """What is timed: the rank, and a call of the second moment of the inputs."""
    products: dict[str, tuple[int, Callable[[torch.Tensor], object]]] = {
        "torch.linalg.svd": (0, lambda _: torch.linalg.svd(weight, full_matrices=False)),
        "svd, half": (half, lambda _: svd_split(weight, half)),
        "whitened, half": (half, lambda moment: whitened_split(weight, moment, half)),
        "svd, low rank": (low, lambda _: svd_split(weight, low)),
        "whitened, low rank": (low, lambda moment: whitened_split(weight, moment, low)),
    }
    modes = modes_of("tensor-train", *weight.shape)
    bond = 0 if modes is None else bond_within(*modes, weight.numel() / 2)
    plan = None if modes is None else network_plan("tensor-train", *modes, bond)
    # Fitting one takes several times as long as all of the above.
    if plan is None or weight.numel() > _LARGE:
        return products
    return products | {
        "tensor train, svd, half": (bond, lambda _: network_cores(plan, weight, None)),
        "tensor train, half": (bond, lambda moment: network_cores(plan, weight, moment)),
    }


def times(
    sizes: list[tuple[int, int]], done: Sequence[dict[str, Any]], console: Console
) -> Iterator[dict[str, Any]]:
    """CPU seconds of one split, and of one ``torch.linalg.svd``, in turn; without rows that are.

    Large matrices are timed once. Seconds are those of the thread that does the work, which other
    programs on the machine hardly change.
    """
    for outs, ins in sizes:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(outs, ins, generator=generator)
        data = torch.randn(outs, ins, generator=generator) * torch.rand(ins, generator=generator)
        half, low = outs * ins // (2 * (outs + ins)), min(outs, ins) // 16
        cases = _cases(weight, half, low)
        known = [row["case"] for row in done if row["shape"] == [outs, ins]]
        moment = torch.empty(0)
        for name, (rank, call) in cases.items():
            if name in known:
                continue
            if name != "torch.linalg.svd" and not moment.numel():
                moment = (data.T @ data / len(data)).double()
            seconds = []
            for _ in range(1 if outs * ins > _LARGE else 3):
                start = _clock()
                call(moment)
                seconds.append(_clock() - start)
            console.print(f"{outs}x{ins} {name}: {median(seconds):.2f} s")
            row = {"shape": [outs, ins], "case": name, "rank": rank}
            yield row | {"seconds": median(seconds), "rounds": len(seconds)}


def speeds(
    done: Sequence[dict[str, Any]], console: Console, *, compiled: bool
) -> Iterator[dict[str, Any]]:
    """Time of the dense layer over that of its factors, at the same number of threads.

    A row for each layer, share and number of rows that is not done yet in this mode.
    """
    mode = "inductor" if compiled else "eager"
    for outs, ins in ((384, 384), (1536, 384), (4096, 4096)):
        for share in SHARES:
            rank = int(share * outs * ins / (outs + ins))
            weight, down, up = (
                torch.randn(shape) for shape in ((outs, ins), (rank, ins), (outs, rank))
            )
            for rows in (1, 32, 256):
                row = {"shape": [outs, ins], "share": share, "rank": rank, "rows": rows}
                row |= {"mode": mode}
                if any(all(other[key] == row[key] for key in row) for other in done):
                    continue
                ratio = _ratio(torch.randn(rows, ins), weight, down, up, mode)
                console.print(f"{row}: {ratio:.2f}")
                yield row | {"ratio": ratio}


def _dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _factors(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, down), up)


def _ratio(
    x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, mode: str
) -> float:
    torch._dynamo.reset()  # past its limit of shapes it would run the rest as they are
    dense: Any = _dense if mode == "eager" else torch.compile(_dense, dynamic=False)
    factors: Any = _factors if mode == "eager" else torch.compile(_factors, dynamic=False)
    with torch.no_grad():
        dense(x, weight)
        factors(x, down, up)
        count = max(3, min(2000, int(4e9 / (2 * x.shape[0] * weight.numel() + 1e6))))
        pairs = []
        for _ in range(7):
            start = _clock()
            for _ in range(count):
                dense(x, weight)
            middle = _clock()
            for _ in range(count):
                factors(x, down, up)
            pairs.append((middle - start) / (_clock() - middle))
    return median(pairs)


QUALITIES: Final = {
    "quality": minilm,
    "characters": characters,
    "healed": healed,
    "healed_minilm": healed_minilm,
}
PARTS: Final = (*QUALITIES, "times", "speeds", "memory")


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--contestants", nargs="+", default=[], help="those of these names")
    parser.add_argument("--sizes", nargs="+", default=["1024x2752"], help="of the timed split")
    parser.add_argument("--again", action="store_true", help="measure rows that are there again")
    parser.add_argument("--compiled", action="store_true", help="time by the inductor")
    parser.add_argument("--seconds", type=float, help="stop after the row that takes it over this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    console = Console()
    begin = time.monotonic()
    result = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
    sizes = [(int(a), int(b)) for a, b in (size.split("x") for size in parsed.sizes)]

    def save(part: str, rows: list[dict[str, Any]]) -> None:
        # Other parts may have been measured by another call meanwhile.
        current = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
        write_text(parsed.out, json.dumps(current | {part: rows} | machine(), indent=1) + "\n")

    for part in parsed.only or PARTS:
        rows: list[dict[str, Any]] = (
            [] if parsed.again or part == "memory" else result.get(part, [])
        )
        if part == "times":
            fresh = times(sizes, list(rows), console)
        elif part == "speeds":
            mode = "inductor" if parsed.compiled else "eager"
            rows = [r for r in result.get(part, []) if r["mode"] != mode or not parsed.again]
            fresh = speeds(list(rows), console, compiled=parsed.compiled)
        elif part == "memory":
            fresh = memory(console)
        else:
            fresh = QUALITIES[part](console, list(rows), parsed.contestants)
        for row in fresh:
            rows.append(row)
            save(part, rows)
            if parsed.seconds is not None and time.monotonic() - begin > parsed.seconds:
                console.print("the time is up; the same call goes on")
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
