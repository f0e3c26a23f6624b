"""Tensor trains and Kronecker sums next to low-rank splits: layers of MiniLM, and whole models.

``layers`` compares what each method loses in single layers at equal parameters, on sentences that
it did not see. ``quality`` splits the whole of MiniLM, ``characters`` a character-level language
model. ``recipe`` and ``recipe_minilm`` are that of CompactifAI: a tensor train, a short healing,
low-bit cores. ``speeds`` times single layers. With ``--resume`` rows that are in the result file
are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe import capture
from torchlathe.ir import Program
from torchlathe.ir.files import write_text
from torchlathe.passes import KroneckerSplit, LowRankSplit, PassContext, TensorTrainSplit
from torchlathe.passes.rewrite.factorising.metrics import collect_metrics
from torchlathe.passes.rewrite.factorising.sites import Site, find_sites
from torchlathe.passes.rewrite.factorising.splits import rank_for, split
from torchlathe.passes.rewrite.tensor_networks.network_split import NetworkSources, NetworkSplit
from torchlathe.passes.rewrite.tensor_networks.plans import (
    NetworkKind,
    bond_within,
    modes_of,
    network_cores,
    network_error,
    network_plan,
)
from torchlathe.passes.rewrite.tensor_networks.writing import LayerClock, orders
from torchlathe.tools.bench import character_model
from torchlathe.tools.bench.low_rank.remembering import Remembered
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.tensor_networks_recipe import recipe, recipe_minilm

__all__ = ["RESULTS", "SHARES", "main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "tensor_networks_cpu.json"
SHARES: Final = (0.7, 0.5, 0.35)
PARTS: Final = ("layers", "quality", "characters", "speeds", "recipe", "recipe_minilm")
TYPES: Final = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_LAYERS = (4,)
_SENTENCES, _TEST, _BATCH = 256, 96, 32
NETWORKS: Final[Mapping[str, tuple[NetworkKind, dict[str, Any]]]] = {
    "tensor train, 2 sites": ("tensor-train", {"sites": 2}),
    "tensor train, 3 sites": ("tensor-train", {"sites": 3}),
    "kronecker, skew 2": ("kronecker", {"skew": 2}),
}
# Low-rank splits of MiniLM are in the results of bench_low_rank, with the same sentences.
OF_MINILM: Final[dict[str, Any]] = {
    "tensor train, svd, uniform": {"method": "svd", "allocation": "uniform"},
    "tensor train, uniform": {"allocation": "uniform"},
    "kronecker, uniform": {"allocation": "uniform"},
}
OF_CHARACTERS: Final[dict[str, Any]] = {
    "svd": lambda share: LowRankSplit(share=share, method="svd", time=False),
    "tensor train, svd": lambda share: TensorTrainSplit(share=share, method="svd", time=False),
    "whitened svd": lambda share: LowRankSplit(share=share, time=False),
    "tensor train": lambda share: TensorTrainSplit(share=share, time=False),
    "kronecker": lambda share: KroneckerSplit(share=share, time=False),
}
Row = dict[str, Any]


class MiniLM:
    """The encoder as a program, and sentences to calibrate and to test with."""

    def __init__(self) -> None:
        from torchlathe.tools.demo_minilm import load_encoder
        from torchlathe.tools.sentence_encoder import documentation_sentences

        self.encoder, self.tokenizer = load_encoder()
        sentences = documentation_sentences()
        random.Random(0).shuffle(sentences)
        self.test = sentences[:_TEST]
        # Sentences of like length stand together, so that few of the positions are padding.
        seen = sorted(sentences[_TEST : _TEST + _SENTENCES], key=len)
        self.batches = [self.tokenizer(seen[i : i + _BATCH]) for i in range(0, len(seen), _BATCH)]
        random.Random(1).shuffle(self.batches)
        axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
        shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
        self.program = capture(self.encoder, (), dict(self.batches[0]), dynamic_shapes=shapes)

    def moments(self, batches: Sequence[Any]) -> dict[str, tuple[Site, torch.Tensor]]:
        """Second moment of what each layer reads, centred, by weight."""
        sites = [site for site in find_sites(self.program)[0] if site.kind == "linear"]
        ctx = PassContext(self.program, calibration=list(batches))
        found = collect_metrics(self.program, ctx, sites, "whitened-svd")
        return {
            site.weight: (site, moment)
            for site in sites
            if (moment := found.moment([site])) is not None
        }

    def cosine(self, run: Callable[..., Any]) -> dict[str, float]:
        """Agreement of the embeddings with those of the original."""
        from torchlathe.tools.demo_minilm import compare_embeddings, embed

        before = embed(self.encoder, self.tokenizer, self.test)
        found = compare_embeddings(before, embed(run, self.tokenizer, self.test), self.test)
        return {
            "cosine": found.cosine,
            "worst": found.worst_cosine,
            "spearman": found.spearman,
        }


def layers(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Relative squared error of the outputs on unseen sentences, by layer, method and share."""
    model = MiniLM()
    test = sorted(model.test, key=len)
    unseen = [model.tokenizer(test[i : i + _BATCH]) for i in range(0, len(test), _BATCH)]
    seen, other = model.moments(model.batches), model.moments(unseen)
    for kind, path in TYPES.items():
        for number in _LAYERS:
            (name,) = (n for n in seen if f"layer.{number}.{path}.weight" in n)
            if kind == "output" and "attention" in name:
                raise AssertionError(name)
            matrix = model.program.tensor(name).detach()
            told = {"type": kind, "layer": number, "shape": list(matrix.shape)}
            for share in SHARES:
                if any(
                    (row["type"], row["layer"], row["share"]) == (kind, number, share)
                    for row in done
                ):
                    continue
                start = time.perf_counter()
                errors = dict(_layer(matrix, seen[name][1], other[name][1], share))
                console.print(f"{name}, {share:.0%}: {errors}")
                yield told | {
                    "share": share,
                    "errors": errors,
                    "seconds": time.perf_counter() - start,
                }


def _layer(
    matrix: torch.Tensor, seen: torch.Tensor, unseen: torch.Tensor, share: float
) -> Iterator[tuple[str, list[float]]]:
    """Per method the errors on the sentences that were seen, and on the others."""
    outs, ins = matrix.shape
    rank = rank_for(outs, ins, share)
    for name, moment in (("svd", None), ("whitened svd", seen)):
        found = split(matrix, rank, inputs=moment, damping=1e-6, randomised=False)
        cores = [found.up[None, :, None], found.down[:, None, :, None]]
        yield name, [network_error(cores, matrix, each) for each in (seen, unseen)]
    for name, (kind, options) in NETWORKS.items():
        modes = modes_of(kind, outs, ins, **options)
        assert modes is not None
        plan = network_plan(kind, *modes, bond_within(*modes, share * outs * ins))
        assert plan is not None
        for suffix, moment in ((", svd", None), ("", seen)):
            made = network_cores(plan, matrix, moment)
            yield name + suffix, [network_error(made, matrix, each) for each in (seen, unseen)]


def quality(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Agreement of MiniLM, each layer at the same share; a row for each contestant and size."""
    model = MiniLM()
    kept = Remembered()
    for share in sorted(SHARES, key=lambda share: abs(share - 0.5)):
        for name, options in OF_MINILM.items():
            if _has(done, name, share):
                continue
            split = KroneckerSplit if "kronecker" in name else TensorTrainSplit
            chosen = split(share=share, time=False, **options)
            row = _split_row(name, share, chosen, model.program, model.batches, kept)
            row |= model.cosine(row.pop("program").run)
            console.print(
                f"{name}, {share:.0%}: cosine {row['cosine']:.4f}, {row['seconds']:.0f} s"
            )
            yield row


def characters(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Perplexity of the character model, allocated; a row for each contestant and size."""
    model = character_model.trained()
    seen = list(character_model.batches(8, seed=3))
    test = list(character_model.batches(12, test=True, seed=1))
    axes = {0: torch.export.Dim("batch", max=256)}
    program = capture(model, (seen[0],), dynamic_shapes=(axes,))
    if not _has(done, "original", 1.0):
        yield {
            "contestant": "original",
            "share": 1.0,
            "perplexity": character_model.perplexity(program.run, test),
        }
    kept = Remembered("tensor-networks-characters")
    for share in sorted(SHARES, key=lambda share: abs(share - 0.5)):
        for name, make in OF_CHARACTERS.items():
            if _has(done, name, share):
                continue
            row = _split_row(name, share, make(share), program, seen, kept)
            row["perplexity"] = character_model.perplexity(row.pop("program").run, test)
            console.print(f"{name}, {share:.0%}: {row['perplexity']:.3f}, {row['seconds']:.0f} s")
            yield row


def _has(done: Sequence[Row], name: str, share: float) -> bool:
    return any((row["contestant"], row["share"]) == (name, share) for row in done)


def _split_row(
    name: str,
    share: float,
    chosen: LowRankSplit | NetworkSplit,
    program: Program,
    batches: Sequence[Any],
    kept: Remembered,
) -> Row:
    """What a split says about itself, and the ``program`` that it made."""
    after = program.copy()
    ctx = PassContext(after, chosen.spec(), calibration=list(batches))
    start = time.perf_counter()
    if isinstance(chosen, LowRankSplit):
        result = chosen.run_with(after, ctx, kept.sources)
    else:
        result = chosen.run_with(after, ctx, NetworkSources(kept.metrics, kept.effects))
    numbers = result.statistics
    return {
        "contestant": name,
        "spec": chosen.spec(),
        "share": share,
        "kept": int(numbers["kept_of_layers"]) / int(numbers["parameters_of_layers"]),
        "flops": after.cost().flops_at() / program.cost().flops_at(),
        "split": numbers["split"],
        "seconds": time.perf_counter() - start,
        "program": after,
    }


def speeds(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Time of a dense product over that of each way to apply a network, in turn."""
    clock = LayerClock()
    for outs, ins in ((384, 384), (1536, 384)):
        for share in SHARES:
            for name, (kind, options) in NETWORKS.items():
                if any((r["shape"], r["share"], r["network"]) == ([outs, ins], share, name)
                       for r in done):  # fmt: skip
                    continue
                modes = modes_of(kind, outs, ins, **options)
                assert modes is not None
                plan = network_plan(kind, *modes, bond_within(*modes, share * outs * ins))
                assert plan is not None
                ratios = {}
                for rows in (1, 32, 256):
                    found = clock.seconds(plan, torch.zeros(1), rows, orders(plan, rows))
                    ratios[str(rows)] = [found[2] / found[0], found[2] / found[1]]
                console.print(f"{outs}x{ins}, {share:.0%}, {name}: {ratios}")
                yield {
                    "shape": [outs, ins],
                    "share": share,
                    "network": name,
                    "bonds": list(plan.bonds),
                    "flops": plan.flops / (2 * outs * ins),
                    "ratios": ratios,
                }


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--seconds", type=float, help="stop after the row that takes it over this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    console = Console()
    result = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
    measures: dict[str, Callable[[Console, Sequence[Row]], Iterator[Row]]] = {
        "layers": layers,
        "quality": quality,
        "characters": characters,
        "speeds": speeds,
        "recipe": recipe,
        "recipe_minilm": recipe_minilm,
    }
    start = time.monotonic()
    for part in parsed.only:
        rows = result.setdefault(part, []) if parsed.resume else []
        for row in measures[part](console, list(rows)):
            rows.append(row)
            result[part] = rows
            write_text(parsed.out, json.dumps(result | machine(), indent=1) + "\n")
            if parsed.seconds is not None and time.monotonic() - start > parsed.seconds:
                console.print("the time is up; go on with --resume")
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
