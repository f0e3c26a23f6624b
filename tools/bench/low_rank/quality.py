"""Agreement against size: MiniLM, and a character-level language model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from rich.console import Console

from torchlathe import capture
from torchlathe.ir import Program
from torchlathe.passes import LowRankSplit, PassContext
from torchlathe.passes.spec import parse_pipeline
from torchlathe.tools.bench import character_model
from torchlathe.tools.bench.low_rank.remembering import Remembered

__all__ = [
    "CONTESTANTS",
    "HEAL",
    "SHARES",
    "characters",
    "encoder",
    "healed",
    "healed_minilm",
    "minilm",
]

SHARES: Final = (0.7, 0.5, 0.35)
_PRODUCTS = ("svd", "whitened-svd", "joint")
CONTESTANTS: Final[dict[str, dict[str, Any]]] = {
    "svd, uniform": {"method": "svd", "allocation": "uniform"},
    "svd": {"method": "svd"},
    "fisher-weighted, uniform": {"method": "fisher-weighted", "allocation": "uniform"},
    "fisher-weighted": {"method": "fisher-weighted"},
    "whitened, uniform": {"allocation": "uniform"},
    "whitened and joint, uniform": {"allocation": "uniform", "joint": True},
    "whitened, by layer errors": {"weigh": "layer"},
    "whitened": {},
    "whitened and joint": {"joint": True},
    "whitened, 5 % of the rows kept": {"remainder": 0.05},
    "tensor trains": {"method": "mixed", "among": ("tensor-train",)},
    "Kronecker sums": {"method": "mixed", "among": ("kronecker",)},
    "mixed, without networks": {"method": "mixed", "among": _PRODUCTS},
    "mixed, greedy": {"method": "mixed", "allocation": "greedy"},
    "mixed, exact": {"method": "mixed"},
}
# Under a budget of the whole model, embeddings are split too.
WHOLE: Final = ("svd", "whitened", "mixed, without networks")
# What is healed: of each kind of method the allocated one, and the mixed choice.
HEALED: Final = ("svd", "whitened", "whitened and joint", "tensor trains", "mixed, exact")
# As many steps for all methods of a model.
HEAL: Final = {"characters": "heal{steps=40,lr=0.001}", "minilm": "heal{steps=20,lr=0.0001}"}
_SENTENCES, _TEST, _BATCH = 256, 96, 32

Row = dict[str, Any]
_Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
_Judge: TypeAlias = Callable[[Program], Row]


def encoder() -> tuple[Program, list[Any], _Loss, _Judge]:
    """MiniLM, its calibration batches, a loss, and how it is judged on other sentences."""
    from torchlathe.tools.demo_minilm import compare_embeddings, embed, load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences

    model, tokenizer = load_encoder()
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    test = sentences[:_TEST]
    # Sentences of like length stand together, so that few of the positions are padding.
    seen = sorted(sentences[_TEST : _TEST + _SENTENCES], key=len)
    batches = [tokenizer(seen[i : i + _BATCH]) for i in range(0, len(seen), _BATCH)]
    random.Random(1).shuffle(batches)
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = capture(model, (), dict(batches[0]), dynamic_shapes=shapes)
    before = embed(model, tokenizer, test)

    def loss(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which other sentence is nearest, with answers drawn from the encoder's own."""
        logits = 20 * outputs @ outputs.T - 1e3 * torch.eye(len(outputs))
        return F.cross_entropy(logits, torch.multinomial(logits.detach().softmax(1), 1)[:, 0])

    def judge(after: Program) -> Row:
        found = compare_embeddings(before, embed(after.run, tokenizer, test), test)
        return {
            "cosine": found.cosine,
            "worst": found.worst_cosine,
            "spearman": found.spearman,
        }

    return program, batches, loss, judge


def minilm(console: Console, done: Sequence[Row], only: Sequence[str] = ()) -> Iterator[Row]:
    """A row for each contestant and size that is not done yet, by the share of linear layers.

    Rows with ``"whole"`` are by the share of the whole model instead.
    """
    program, batches, loss, judge = encoder()
    kept = Remembered("low-rank-minilm")
    for name, options in _chosen(CONTESTANTS, only):
        for share in SHARES:
            key = {"contestant": name, "share": share}
            if not _has(done, key):
                yield key | _row(console, program, batches, loss, judge, kept, key, options)
    kept = Remembered("low-rank-minilm-whole")
    for name, options in _chosen({name: CONTESTANTS[name] for name in WHOLE}, only):
        for share in SHARES:
            key = {"contestant": name, "share": share, "whole": True}
            if not _has(done, key):
                yield key | _row(console, program, batches, loss, judge, kept, key, options)


def characters(console: Console, done: Sequence[Row], only: Sequence[str] = ()) -> Iterator[Row]:
    """Perplexity of the character model for each contestant and size that is not done yet."""
    model = character_model.trained()
    batches = list(character_model.batches(16))
    axes = ({0: torch.export.Dim("batch", max=64)},)
    program = capture(model, (batches[0],), dynamic_shapes=axes)
    test = list(character_model.batches(24, test=True, seed=1))

    def loss(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return character_model.losses(outputs, batch).mean()

    def judge(after: Program) -> Row:
        return {"perplexity": character_model.perplexity(after.run, test)}

    if not _has(done, {"contestant": "dense", "share": 1.0}):
        size = sum(p.numel() for p in program.parameters.values())
        yield {"contestant": "dense", "share": 1.0, "parameters": size, **judge(program)}
    kept = Remembered("low-rank-characters")
    for name, options in _chosen(CONTESTANTS, only):
        for share in SHARES:
            key = {"contestant": name, "share": share}
            if not _has(done, key):
                yield key | _row(console, program, batches, loss, judge, kept, key, options)


def healed(console: Console, done: Sequence[Row], only: Sequence[str] = ()) -> Iterator[Row]:
    """Perplexity of the character model before and after `heal`, for some of the contestants."""
    model = character_model.trained()
    batches = list(character_model.batches(16))
    axes = ({0: torch.export.Dim("batch", max=64)},)
    program = capture(model, (batches[0],), dynamic_shapes=axes)
    test = list(character_model.batches(24, test=True, seed=1))
    kept = Remembered("low-rank-characters")

    def judge(after: Program) -> Row:
        return {"perplexity": character_model.perplexity(after.run, test)}

    given = console, program, batches, judge, kept, HEAL["characters"]
    for row in _healed(*given, done, only):
        yield row | {"before": row["before"]["perplexity"]}


def healed_minilm(console: Console, done: Sequence[Row], only: Sequence[str] = ()) -> Iterator[Row]:
    """Agreement of MiniLM before and after `heal`, for some of the contestants."""
    program, batches, _, judge = encoder()
    kept = Remembered("low-rank-minilm")
    given = console, program, batches, judge, kept, HEAL["minilm"]
    for row in _healed(*given, done, only):
        yield row | {"before": row["before"]["cosine"]}


def _healed(
    console: Console,
    program: Program,
    batches: Sequence[Any],
    judge: _Judge,
    kept: Remembered,
    healing: str,
    done: Sequence[Row],
    only: Sequence[str],
) -> Iterator[Row]:
    (heal,) = parse_pipeline(healing)
    wanted = [(name, share) for share in (0.5, 0.35, 0.7) for name in HEALED]
    for name, share in wanted:
        key = {"contestant": name, "share": share, "heal": healing}
        if _has(done, key) or not (not only or name in only):
            continue
        chosen = LowRankSplit(share=share, time=False, **CONTESTANTS[name])
        after = program.copy()
        ctx = PassContext(after, chosen.spec(), calibration=batches)
        chosen.run_with(after, ctx, kept.sources)
        before = judge(after)
        ctx = PassContext(after, heal.spec(), batches, original=program)
        start = time.process_time()
        heal.run(after, ctx)  # type: ignore[attr-defined]  # a rewrite, as its name says
        seconds = time.process_time() - start
        found = judge(after)
        console.print(f"{key}: {before}, healed {found}, {seconds:.0f} s")
        row = key | {"spec": f"{chosen.spec()},{healing}", "before": before}
        yield row | found | {"seconds": seconds}


def _chosen(
    contestants: Mapping[str, dict[str, Any]], only: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((n, o) for n, o in contestants.items() if not only or n in only)


def _has(done: Sequence[Row], key: Row) -> bool:
    names = ("contestant", "share", "whole", "heal")
    return any(all(row.get(n) == key.get(n) for n in names) for row in done)


def _row(
    console: Console,
    program: Program,
    batches: Sequence[Any],
    loss: _Loss,
    judge: _Judge,
    kept: Remembered,
    key: Row,
    options: dict[str, Any],
) -> Row:
    amount = "params" if key.get("whole") else "share"
    chosen = LowRankSplit(**{amount: key["share"]}, time=False, **options)
    after = program.copy()
    ctx = PassContext(after, chosen.spec(), calibration=batches, loss=loss)
    start = time.perf_counter()
    statistics = chosen.run_with(after, ctx, kept.sources).statistics
    seconds = time.perf_counter() - start
    found = judge(after)
    console.print(f"{key}: {found}, {seconds:.0f} s")
    return {
        "spec": chosen.spec(),
        "kept": int(statistics["kept_of_layers"]) / int(statistics["parameters_of_layers"]),
        "parameters": sum(p.numel() for p in after.parameters.values()),
        **found,
        "split": statistics["split"],
        "joint": statistics["joint"],
        "seconds": seconds,
    }
