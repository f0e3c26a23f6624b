"""Sharing parameters on MiniLM: bases of their own against shared ones, and colourings.

Real text: the English sentences of Python's documentation, some to calibrate with and others to
test on. Sizes are shares of the encoder's 36 linear layers; embeddings, norms and biases stay.
Source: own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from torchlathe.passes.analysis.sharing.bases import BasisLayer, fit_basis
from torchlathe.passes.analysis.sharing.budgets import Colored, Solution, color_by_budget, colored
from torchlathe.passes.analysis.sharing.candidates import LayerType
from torchlathe.passes.analysis.sharing.costs import ClassCosts
from torchlathe.passes.analysis.sharing.curvature import (
    InputCurvature,
    KroneckerCurvature,
    merge_cost,
)
from torchlathe.passes.analysis.sharing.partitions import Partition
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.sharing.minilm import Encoder

__all__ = ["RESULTS", "main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "sharing_cpu.json"

_SHARES: Final = (0.8, 0.65, 0.5)
_SIZES: Final = (0.5, 0.25)
_ROUNDS: Final = 1  # of refitting; one gives most of what there is to gain
# Layers that share a basis, as in the first column of the table: (what, role, numbers).
_GROUPS: Final = (
    ("query + key of layer 0", ("query", "key"), (0,)),
    ("query + key + value of layer 0", ("query", "key", "value"), (0,)),
    ("query of 6 layers", ("query",), range(6)),
    ("key of 6 layers", ("key",), range(6)),
    ("value of 6 layers", ("value",), range(6)),
    ("attention.output of 6 layers", ("attention.output.dense",), range(6)),
    ("intermediate of layers 2 + 3", ("intermediate.dense",), (2, 3)),
    ("intermediate of 6 layers", ("intermediate.dense",), range(6)),
    ("output of layers 2 + 3", ("layer.N.output.dense",), (2, 3)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not in the result file yet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path("build/bench_sharing"))
    parser.add_argument("--calibration", type=int, default=128, help="sentences")
    parser.add_argument("--test", type=int, default=192, help="sentences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("costs", "bases", "fidelity"))
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    result: dict[str, Any] = {}
    if parsed.json.exists():
        result = json.loads(parsed.json.read_text(encoding="utf-8"))
    sizes = {"calibration": parsed.calibration, "test": parsed.test, "rounds": _ROUNDS}
    if any(result.get(key) != value for key, value in sizes.items()):
        result = sizes
    result["machine"] = machine()

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        result[part] = rows
        parsed.json.parent.mkdir(parents=True, exist_ok=True)
        parsed.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if parsed.only in (None, "costs") and "costs" not in result:
        keep("costs", list(_pair_costs()))
    if parsed.only == "costs":
        return 0
    encoder = Encoder(parsed.calibration, parsed.test, parsed.cache)
    for part, measure in (("bases", _bases), ("fidelity", _fidelity)):
        if parsed.only in (None, part):
            rows = result.get(part, [])
            for row in measure(encoder, rows):
                rows.append(row)
                keep(part, rows)
                sys.stdout.write(f"{json.dumps(row)}\n")
                sys.stdout.flush()
    return 0


# -- what a pair costs ---------------------------------------------------------------------------


def _pair_costs() -> Iterator[dict[str, Any]]:
    """Seconds for the cost of one pair of square layers, by both curvatures."""
    for width in (256, 512, 1024):
        generator = torch.Generator().manual_seed(0)

        def positive(width: int = width, generator: torch.Generator = generator) -> torch.Tensor:
            rows = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
            return rows.T @ rows / width

        weights = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
        a, b = positive(), positive()
        inputs = _seconds(
            lambda a=a, b=b, w=weights: merge_cost(  # type: ignore[misc]
                InputCurvature(a), w[0], InputCurvature(b), w[1]
            )
        )
        kronecker = _seconds(
            lambda a=a, b=b, w=weights: merge_cost(  # type: ignore[misc]
                KroneckerCurvature(((a, b),)), w[0], KroneckerCurvature(((b, a),)), w[1]
            )
        )
        yield {"width": width, "inputs_s": inputs, "kronecker_s": kronecker}


def _seconds(work: Callable[[], object]) -> float:
    """CPU seconds, the least of three: other programs run on the machine."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


# -- own and shared bases at equal size ------------------------------------------------------------


def _bases(encoder: Encoder, known: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    weighed = encoder.weighed("inputs")
    done = {(row["group"], row["size"]) for row in known}
    for group, roles, numbers in _GROUPS:
        wanted = [f".{role}." for role in roles]
        names = [
            name
            for n in numbers
            for name in weighed
            if f".layer.{n}." in name and any(w.replace("N", str(n)) in name for w in wanted)
        ]
        layers = [basis for name in names if (basis := weighed[name].basis) is not None]
        for size in _SIZES:
            if (group, size) in done:
                continue
            whole = sum(layer.energy for layer in layers)
            own = sum(fit_basis([layer], _rank([layer], size)).cost for layer in layers)
            shared = fit_basis(layers, _rank(layers, size), _ROUNDS).cost
            yield {
                "group": group,
                "size": size,
                "layers": len(layers),
                "own": (own / whole) ** 0.5,
                "shared": (shared / whole) ** 0.5,
            }


def _rank(layers: Sequence[BasisLayer], size: float) -> int:
    """The largest rank within a share of the layers' size."""
    features = layers[0].weight.shape[1]
    outs = sum(len(layer.weight) for layer in layers)
    return max(1, int(size * outs * features / (outs + features)))


# -- fidelity of the embeddings --------------------------------------------------------------------

_OWN: Final = tuple(frozenset({i}) for i in range(6))
_ADJACENT: Final = tuple(frozenset({i, i + 1}) for i in (0, 2, 4))
_ALL: Final = (frozenset(range(6)),)
# Who, the classes of each type, the curvature, and whether ranks follow from one price.
_CONTESTANTS: Final[tuple[tuple[str, Partition | None, str, bool], ...]] = (
    ("colouring", None, "outputs", True),
    ("own basis per layer", _OWN, "outputs", True),
    ("adjacent pairs", _ADJACENT, "outputs", True),
    ("all layers", _ALL, "outputs", True),
    ("own basis per layer, one ratio", _OWN, "inputs", False),
    ("adjacent pairs, one ratio", _ADJACENT, "inputs", False),
)


def _fidelity(encoder: Encoder, known: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    done = {(row["who"], row["share"]) for row in known}
    for share in _SHARES:
        for who, partition, curvature, priced in _CONTESTANTS:
            if (who, share) in done:
                continue
            start = time.process_time()
            types, solution = _solved(encoder, partition, curvature, priced, share)
            coloring = encoder.coloring(types, solution, curvature)
            found = encoder.fidelity(coloring, _ROUNDS)
            yield {
                "who": who,
                "share": share,
                "curvature": curvature,
                **found,
                "cost": solution.cost,
                "gap": solution.gap,
                "classes": coloring.to_dict()["types"] if partition is None else None,
                "cpu_seconds": time.process_time() - start,
            }


def _solved(
    encoder: Encoder, partition: Partition | None, curvature: str, priced: bool, share: float
) -> tuple[Sequence[LayerType], Solution]:
    """Classes and ranks within a share of the layers' size."""
    budget = share * encoder.size
    if partition is None:
        found = []
        for types in (encoder.types, encoder.fused):
            costs = [encoder.costs(part, curvature) for part in types]
            solution = color_by_budget(costs, budget)
            assert solution is not None
            found.append((types, solution))
        return min(found, key=lambda one: one[1].cost)
    costs = [encoder.costs(part, curvature) for part in encoder.types]
    if priced:
        solution = color_by_budget(costs, budget, fixed=[partition] * len(costs))
        assert solution is not None
        return encoder.types, solution
    parts = [_one_ratio(each, partition, share) for each in costs]
    return encoder.types, Solution(tuple(parts))


def _one_ratio(costs: ClassCosts, partition: Partition, share: float) -> Colored:
    """Every class at the same share of the size of its layers."""
    picks = []
    for members in partition:
        offers = costs.offers(members)
        whole = sum(costs.layers[i].size for i in members)
        picks.append(int((offers.parameters <= share * whole).sum()) - 1)
    return colored(costs, partition, picks)


if __name__ == "__main__":
    raise SystemExit(main())
