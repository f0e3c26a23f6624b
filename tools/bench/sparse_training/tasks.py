"""What is trained: two classifiers of digits, and a small language model of characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.tools.bench import character_model
from torchlathe.tools.bench.quality import nets
from torchlathe.tools.bench.sparse_training.contestants import Task

__all__ = ["TASKS", "characters", "digits_task"]

_EPOCHS = {"digits CNN": 20, "digits ViT": 50}
_SIZE = 64


def _digit_batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = nets.digits(seed).train
    while True:
        for part in torch.randperm(len(labels)).split(_SIZE):
            yield images[part].roll(int(torch.randint(-1, 2, ())), dims=3), labels[part]


def _digit_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def digits_task(name: str, seed: int) -> Task:
    """A net of `nets`, in percent of the test images that it gets right."""
    data = nets.digits(seed)
    return Task(
        nets.NETS[name],
        (data.test[0][:8],),
        _digit_batches,
        _digit_loss,
        lambda model: 100 * nets.accuracy(model, data),
        _EPOCHS[name] * -(-len(data.train[1]) // _SIZE),
        3e-3,
    )


def _character_batches(steps: int, seed: int) -> Iterator[torch.Tensor]:
    return character_model.batches(steps, seed=1000 + seed)


def _character_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return character_model.losses(model(tokens), tokens).mean()


def characters(seed: int) -> Task:
    """A Llama of two layers on English text, in perplexity of a character."""
    steps = 300
    vocabulary = character_model.corpus()[2]
    return Task(
        lambda: character_model.CharacterModel(vocabulary, hidden=80, inner=224, layers=2),
        (next(character_model.batches(1, seed=1))[:2],),
        partial(_character_batches, steps),
        _character_loss,
        lambda model: character_model.perplexity(model),
        steps,
        4e-3,
    )


TASKS: dict[str, Callable[[int], Task]] = {
    "digits CNN": partial(digits_task, "digits CNN"),
    "digits ViT": partial(digits_task, "digits ViT"),
    "characters": characters,
}
