"""How the cost of analysis and erase grows with the number of nodes.

Deep networks of 300 to 20,000 nodes are captured, analysed and erased at half size, and each stage
is timed by itself. Times are CPU seconds of one thread (`time.process_time`), the least of some
rounds, so that what else the machine does counts little; memory that others use still does.

Correctness first: of each kind, the smallest is erased under the float64 check of the pass manager
before anything is timed. Source: own.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchlathe.ir import Program, capture
from torchlathe.ir.axes import AxisTerms
from torchlathe.ir.capturing import from_exported
from torchlathe.ir.verifying import verify
from torchlathe.passes import PassContext, PassManager, StructuredErase, ZeroInvariantGroups
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.scaling_nets import NETS, Net

__all__ = ["STAGES", "main", "measure", "slope"]

RESULTS = Path(__file__).resolve().parent / "results" / "scaling_cpu.json"
PIPELINE = "structured-erase{sparsity=0.5}"
STAGES = ("export", "lift", "terms", "families", "cost", "verify", "erase")


def measure(net: Net, nodes: int, rounds: int) -> dict[str, Any]:
    """Time every stage on one network.

    Returns:
        The counts of nodes, edges and families, and CPU seconds by stage.
    """
    torch.manual_seed(0)
    model, x = net.make(nodes)
    model.eval()
    times: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        gc.freeze()
        start = time.process_time()
        result = work()
        taken = time.process_time() - start
        times[stage] = min(times.get(stage, math.inf), taken)
        gc.unfreeze()
        return result

    exported = timed("export", lambda: torch.export.export(model, (x,)))
    row: dict[str, Any] = {}
    for _ in range(rounds):
        program: Program = timed("lift", lambda: from_exported(exported, ((x,), {}), model=model))
        row = {
            "nodes": sum(n.op == "call_function" for n in program.nodes),
            "edges": sum(len(n.all_input_nodes) for n in program.nodes),
        }
        timed("terms", partial(program.analysis, AxisTerms))
        families = timed("families", partial(program.analysis, ZeroInvariantGroups))
        row["families"] = len(families)
        timed("cost", program.cost)
        timed("verify", partial(verify, program))
        timed("erase", partial(_erase, program))
    return {**row, "seconds": times}


def _erase(program: Program) -> None:
    StructuredErase(sparsity=0.5).run(program, PassContext(program, spec=PIPELINE))


def check(net: Net) -> None:
    """Erase the smallest of a kind under the check against its zeroed twin.

    Raises:
        PassError: It differs.
    """
    torch.manual_seed(0)
    model, x = net.make(net.nodes[0])
    PassManager(PIPELINE).run(capture(model.eval(), (x,)))


def slope(rows: Sequence[dict[str, Any]], stage: str, by: str = "nodes") -> float:
    """The exponent of growth: the least-squares slope of log(seconds) over log(nodes)."""
    points = [(math.log(r[by]), math.log(max(r["seconds"][stage], 1e-6))) for r in rows]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def _show(result: dict[str, Any], console: Console) -> None:
    for net in result["nets"]:
        table = Table(title=f"{net['net']}: CPU seconds")
        for column in ("nodes", "edges", "families", *STAGES):
            table.add_column(column, justify="right")
        for row in net["rows"]:
            counts = (f"{row[key]:,}" for key in ("nodes", "edges", "families"))
            table.add_row(*counts, *(f"{row['seconds'][s]:.3f}" for s in STAGES))
        slopes = (f"{net['slopes'][s]:.2f}" for s in STAGES)
        table.add_row("slope", "", "", *slopes, style="bold")
        console.print(table)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--nets", default=",".join(NETS), help="names, by commas")
    parser.add_argument("--most", type=int, default=20000, help="largest number of nodes")
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many (default 3)")
    parser.add_argument("--json", type=Path, help=f"where to write (default {RESULTS.name})")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.nets.split(",") if name not in NETS]:
        parser.error(f"unknown nets {', '.join(unknown)}; there are {', '.join(NETS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables and write the JSON file; returns the exit status."""
    options = _arguments(argv)
    torch.set_num_threads(1)
    console = Console()
    path = options.json or RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    result = {"rounds": options.rounds, "machine": machine(), "nets": found}
    for name in options.nets.split(","):
        net = NETS[name]
        check(net)
        rows: list[dict[str, Any]] = []
        found.append({})
        for nodes in (n for n in net.nodes if n <= options.most):
            console.print(f"{name}, {nodes} nodes")
            rows.append(measure(net, nodes, options.rounds))
            found[-1] = _entry(net, rows)
            # The largest take long, so what is there is kept.
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result, console)
    console.print(f"wrote {path}")
    return 0


def _entry(net: Net, rows: list[dict[str, Any]]) -> dict[str, Any]:
    entry: dict[str, Any] = {"net": net.name, "about": net.about, "rows": rows}
    for key, by in (("slopes", "nodes"), ("slopes_by_edges", "edges")):
        entry[key] = {s: slope(rows, s, by) if len(rows) > 1 else 0.0 for s in STAGES}
    return entry


if __name__ == "__main__":
    raise SystemExit(main())
