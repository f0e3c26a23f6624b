"""A character-level language model of English text, trained here: what benchmarks compress.

The text is Python's own documentation (``pydoc_data.topics``); its last tenth is for testing. The
architecture is transformers' Llama at a small size, so that nothing about it was made to suit the
passes. Trained weights are kept on disk, by everything that they depend on.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from torchlathe.ir.cost.latency import cache_directory

__all__ = [
    "CONTEXT",
    "CharacterModel",
    "batches",
    "corpus",
    "losses",
    "main",
    "perplexity",
    "trained",
]

CONTEXT: Final = 128
_PEAK_RATE: Final = 3e-3
_WARM_UP: Final = 40


class CharacterModel(nn.Module):
    """Logits of the next character, by a Llama of four layers.

    Attributes:
        body: transformers' ``LlamaForCausalLM``.
    """

    def __init__(
        self, vocabulary: int = 96, *, hidden: int = 160, inner: int = 448, layers: int = 4
    ) -> None:
        super().__init__()
        from torchlathe.tools.compat import define_torchvision_ops

        define_torchvision_ops()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.body: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=5,
                num_key_value_heads=5,
                max_position_embeddings=2 * CONTEXT,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, vocabulary) of int64 tokens (batch, tokens)."""
        logits: torch.Tensor = self.body(input_ids=tokens).logits
        return logits


@functools.cache
def corpus() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Python's documentation as numbers of characters.

    Returns:
        The training and the test part, int64 of one axis, and how many characters there are; 0
        stands for all that are rare.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    common = sorted(set(text), key=lambda c: (-text.count(c), c))[:95]
    number = {character: i + 1 for i, character in enumerate(common)}
    data = torch.tensor([number.get(c, 0) for c in text])
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:], len(common) + 1


def batches(
    count: int, size: int = 16, *, test: bool = False, seed: int = 0, context: int = CONTEXT
) -> Iterator[torch.Tensor]:
    """Excerpts of the text at random places, int64 (size, context), ``count`` times."""
    seen, unseen, _ = corpus()
    source = unseen if test else seen
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(source) - context, (size, 1), generator=generator)
        yield source[starts + torch.arange(context)]


def losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats of each character from the second on; one axis.

    Its mean is the ``loss=`` of a batch that is one tensor.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")


def perplexity(
    run: Callable[[torch.Tensor], torch.Tensor], data: Sequence[torch.Tensor] | None = None
) -> float:
    """Exponential of the mean loss in nats over test excerpts: 24 batches of 16, if not given."""
    total = count = 0.0
    with torch.no_grad():
        for tokens in batches(24, test=True, seed=1) if data is None else data:
            found = losses(run(tokens), tokens)
            total, count = total + float(found.sum(dtype=torch.float64)), count + found.numel()
    return math.exp(total / count)


def trained(
    seed: int = 0,
    steps: int = 1000,
    *,
    cache: Path | None = None,
    progress: Callable[[str], object] | None = None,
) -> CharacterModel:
    """The model after so many steps of 16 excerpts, in eval mode.

    Args:
        seed: Of the weights and of the data's order.
        steps: How long to train.
        cache: Folder of trained weights; by default in the user's cache folder.
        progress: Called with a line of text every fifty steps.
    """
    torch.manual_seed(seed)
    model = CharacterModel(corpus()[2])
    folder = cache_directory() / "benchmarks" if cache is None else cache
    file = folder / f"characters-{_describe(model)}-{seed}-{steps}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    _train(model, seed, steps, progress)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    save_file(model.state_dict(), part)
    part.replace(file)
    return model.eval()


def _describe(model: CharacterModel) -> str:
    config = model.body.config
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size)
    return "x".join(str(size) for size in (*sizes, config.num_hidden_layers))


def _train(
    model: CharacterModel, seed: int, steps: int, progress: Callable[[str], object] | None
) -> None:
    """AdamW with a warm-up and a cosine schedule."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1, (n + 1) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * n / steps)),
    )
    for step, tokens in enumerate(batches(steps, seed=1000 + seed)):
        loss = losses(model(tokens), tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None and (step % 50 == 0 or step + 1 == steps):
            progress(f"step {step + 1} of {steps}: loss {loss.item():.3f}")
    model.zero_grad()


def main(argv: list[str] | None = None) -> int:
    """Train the model, or find it trained, and print what it reaches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    console = Console()
    start = time.perf_counter()
    model = trained(parsed.seed, parsed.steps, progress=console.print)
    parameters = sum(p.numel() for p in model.parameters())
    found = perplexity(model)
    console.print(
        f"{parameters:,} parameters, perplexity {found:.3f} per character, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
