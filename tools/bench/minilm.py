"""The sentence encoder as benchmarks compress it: its program, data, and agreement with itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import torchlathe as tl
from torchlathe.ir import Program

__all__ = ["encoder_task", "without_padding"]


def without_padding(tokenizer: Callable[[list[str]], Any], sentences: list[str]) -> list[Any]:
    """Sentences in batches of equal length, so that no token is there to fill a batch up."""
    batches: dict[int, list[str]] = {}
    for sentence in sentences:
        length = tokenizer([sentence])["input_ids"].shape[1]
        batches.setdefault(length, []).append(sentence)
    return [tokenizer(batches[length]) for length in sorted(batches)]


def encoder_task(seen: int) -> tuple[Program, list[Any], Callable[[Callable[..., Any]], float]]:
    """MiniLM on sentences of Python's documentation, in a fixed order.

    Args:
        seen: Sentences to calibrate with, in batches of 32; 96 others are for the score.

    Returns:
        The program with dynamic batch and length, the batches, and the score of anything that is
        called as the encoder is: the mean cosine of its embeddings to the encoder's own.
    """
    from torchlathe.tools.demo_minilm import compare_embeddings, embed, load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences

    encoder, tokenizer = load_encoder()
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    test, known = sentences[:96], sorted(sentences[96 : 96 + seen], key=len)
    data = [tokenizer(known[i : i + 32]) for i in range(0, len(known), 32)]
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = tl.capture(encoder, (), dict(data[0]), dynamic_shapes=shapes)
    before = embed(encoder, tokenizer, test)

    def cosine(run: Callable[..., Any]) -> float:
        return compare_embeddings(before, embed(run, tokenizer, test), test).cosine

    return program, data, cosine
