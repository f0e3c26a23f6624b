"""What is trained: two classifiers of digits, and a small language model of characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.tools.bench import character_model
from torchlathe.tools.bench.quality import nets
from torchlathe.tools.bench.sparse_training.contestants import Task

__all__ = ["TASKS", "characters", "digits_task"]

_SIZE = 64


def _rolled(images: torch.Tensor) -> torch.Tensor:
    """All images of a batch, moved sideways by a pixel at most; what leaves comes back in."""
    return images.roll(int(torch.randint(-1, 2, ())), dims=3)


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """Each image moved by a pixel at most along both axes; zeros come in."""
    count, _, height, width = images.shape
    down, right = torch.randint(0, 3, (2, count, 1, 1))
    rows, columns = torch.arange(height)[:, None] + down, torch.arange(width) + right
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


@dataclass(frozen=True)
class _Recipe:
    """How a net learns digits; the same for all methods.

    Chosen on a part of the training images, for the net that stays dense and for HESSO.
    """

    make: Callable[[], nn.Module]
    moved: Callable[[torch.Tensor], torch.Tensor]
    epochs: int


_RECIPES = {
    "digits CNN": _Recipe(nets.ConvNet, _rolled, 20),
    "digits ViT": _Recipe(
        partial(nets.VisionTransformer, width=64, hidden=256, patch=4), _shifted, 50
    ),
}


def _digit_batches(
    moved: Callable[[torch.Tensor], torch.Tensor],
    data: tuple[torch.Tensor, torch.Tensor],
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in the order of torch's generator: no seed makes other images of them."""
    del seed
    images, labels = data
    while True:
        for part in torch.randperm(len(labels)).split(_SIZE):
            yield moved(images[part]), labels[part]


def _digit_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def digits_task(name: str, seed: int) -> Task:
    """A net, in percent of the test images that it gets right."""
    data, recipe = nets.digits(seed), _RECIPES[name]
    return Task(
        recipe.make,
        (data.test[0][:8],),
        partial(_digit_batches, recipe.moved, data.train),
        _digit_loss,
        lambda model: 100 * nets.accuracy(model, data),
        recipe.epochs * -(-len(data.train[1]) // _SIZE),
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
