"""What collecting statistics of layers costs, against runs and training steps of the same model.

A GPT-2 of transformers with random weights, on random tokens. Each way of collecting runs in a
process of its own, for the memory: what is counted is anonymous memory, which the system cannot
write to a file by itself. Times are CPU seconds of one thread, the least of the rounds.

Correctness first: matrices in files equal those in memory, before anything is timed. Source: own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchlathe.ir import Program, capture
from torchlathe.ir.files import write_text
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import LayerMoments, collect_layers
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.memory import PeakMemory
from torchlathe.tools.compat import define_torchvision_ops

__all__ = ["WAYS", "main", "measured_section"]

RESULTS = Path(__file__).resolve().parent / "results" / "calibration_cpu.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "calibration.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"

WAYS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "forward": ("runs of the model, without gradients", None),
    "training": ("runs with gradients of all parameters", None),
    "inputs-32": ("A, in float32", {"dtype": torch.float32}),
    "inputs-64": ("A, in float64", {}),
    "both-32": ("A and G, in float32", {"dtype": torch.float32, "gradients": True}),
    "both-64": ("A and G, in float64", {"gradients": True}),
    "files-64": ("A and G, in float64, in files", {"gradients": True, "limit_bytes": 0}),
}

TEXT = """\
`python -m torchlathe.tools.bench.bench_calibration` on {cpu}, one thread, torch {torch}: a GPT-2 of
{layers} layers and width {width} ({parameters:.1f} M parameters) on {batches} batches of
{batch} x {tokens} tokens. *Time* is CPU time, with {forward:.1f} s as the unit. *Memory* is what
anonymous memory rises by at its peak; the matrices of all layers take {matrices:.0f} MiB in
float64.

| | time | memory |
| --- | ---: | ---: |
{rows}
Most of the time goes into the products of rows: at a layer with i features and o outs, i² + o²
products for each row, where the run itself takes i · o.
"""


def _model(size: dict[str, int]) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    define_torchvision_ops()  # transformers imports torchvision where it is there
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000,
        n_embd=size["width"],
        n_layer=size["layers"],
        n_head=8,
        n_positions=size["tokens"],
        use_cache=False,
    )
    shape = (size["batch"], size["tokens"])
    ids = [torch.randint(0, 1000, shape) for _ in range(size["batches"])]
    return GPT2LMHeadModel(config).eval(), [{"input_ids": i, "labels": i} for i in ids]


def _work(way: str, model: Any, program: Program, data: list[Any]) -> Callable[[], Any]:
    options = WAYS[way][1]
    if options is not None:
        ctx = PassContext(program, "bench", calibration=data)
        return lambda: collect_layers(program, ctx, **options)

    def runs() -> None:
        with torch.set_grad_enabled(way == "training"):
            for batch in data:
                loss = model(**batch).loss
                if way == "training":
                    loss.backward()
                    model.zero_grad()

    return runs


def _measure(way: str, size: dict[str, int], rounds: int) -> dict[str, float]:
    """CPU seconds and the rise of anonymous memory; in this process."""
    torch.set_num_threads(1)
    model, data = _model(size)
    program = capture(model, (), data[0])
    work = _work(way, model, program, data)
    seconds = math.inf
    with PeakMemory() as memory:
        for _ in range(rounds):
            start = time.process_time()
            work()
            seconds = min(seconds, time.process_time() - start)
    return {"seconds": seconds, "bytes": memory.rise}


def _check(size: dict[str, int]) -> int:
    """That files change nothing; the size of all matrices in float64."""
    model, data = _model({**size, "batches": 1, "layers": 2})
    program = capture(model, (), data[0])
    ctx = PassContext(program, "bench", calibration=data)
    in_memory = collect_layers(program, ctx, gradients=True)
    in_files = collect_layers(program, ctx, gradients=True, limit_bytes=0)
    for node, moments in in_memory.items():
        assert all(map(torch.equal, _matrices(moments), _matrices(in_files[node])))
    model, data = _model({**size, "batches": 1, "batch": 1, "tokens": 2})
    program = capture(model, (), data[0])
    found = collect_layers(program, PassContext(program, "bench", calibration=data), gradients=True)
    every = {id(m): m for moments in found.values() for m in _matrices(moments)}
    return sum(matrix.nbytes for matrix in every.values())


def _matrices(moments: LayerMoments) -> list[torch.Tensor]:
    both = (moments.inputs, moments.outputs)
    return [m.products for m in both if m is not None and m.products is not None]


def measured_section(data: dict[str, Any]) -> str:
    """The section of the page, as text."""
    size = data["size"]
    forward = data["ways"]["forward"]["seconds"]
    rows = ""
    for way, found in data["ways"].items():
        time_taken, memory = found["seconds"] / forward, found["bytes"] / 2**20
        rows += f"| {WAYS[way][0]} | {time_taken:.2f} | {memory:.0f} MiB |\n"
    return TEXT.format(
        **data["machine"],
        **size,
        parameters=data["parameters"] / 1e6,
        forward=forward,
        matrices=data["matrix_bytes"] / 2**20,
        rows=rows,
    )


def _write_page(data: dict[str, Any]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(PAGE, before + BEGIN + measured_section(data) + END + after)


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results and the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help="measure only this, and print it as JSON")
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    given = parser.parse_args(argv)
    if given.page:
        _write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return 0
    size = {n: getattr(given, n) for n in ("layers", "width", "tokens", "batch", "batches")}
    if given.way:
        sys.stdout.write(json.dumps(_measure(given.way, size, given.rounds)) + "\n")
        return 0
    torch.set_num_threads(1)
    data: dict[str, Any] = {"machine": machine(), "rounds": given.rounds, "size": size}
    data["matrix_bytes"] = _check(size)
    data["parameters"] = sum(p.numel() for p in _model(size)[0].parameters())
    words = [f"--{name}={value}" for name, value in [*size.items(), ("rounds", given.rounds)]]
    command = [sys.executable, "-m", "torchlathe.tools.bench.bench_calibration", *words]
    data["ways"] = {}
    for way in WAYS:
        done = subprocess.run(
            [*command, f"--way={way}"], check=True, capture_output=True, text=True
        )
        data["ways"][way] = json.loads(done.stdout.splitlines()[-1])
    write_text(RESULTS, json.dumps(data, indent=1) + "\n")
    _write_page(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
