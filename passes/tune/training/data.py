"""The batches of a training: their order, those held out, and the share of each process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import InputError, Program
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.statistics.calibration import Calibration
from torchlathe.passes.statistics.running import first_extent, flat_batches, without_inference

__all__ = ["Part", "TrainingData"]


@dataclass(frozen=True)
class Part:
    """What one process has of a batch.

    Attributes:
        batch: As it came, for the loss.
        flat: Flat inputs of the program.
        share: Of the samples of the whole batch.
    """

    batch: Any
    flat: list[Any]
    share: float


class TrainingData:
    """Batches to train on, and batches to evaluate on.

    Data that can be indexed (a list) is taken in another order in each epoch, and its last
    batches are held out. Other data (a loader) is iterated as it comes; there the batches to
    evaluate on are the first ones of one pass, unless ``validation`` has them.

    With several processes, all iterate the same batches, and each takes its rows of them.

    Args:
        program: What takes them.
        ctx: Has the calibration data.
        held_out: Share of the batches to evaluate on.
        validation: Batches to evaluate on instead.
        shuffle: Another order in each epoch.
        seed: Of the orders.
        rank: Of this process.
        world: Number of processes.
    """

    def __init__(
        self,
        program: Program,
        ctx: PassContext,
        *,
        held_out: float = 0.1,
        validation: Iterable[Any] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._program, self._ctx, self._seed = program, ctx, seed
        self._rank, self._world = rank, world
        data = ctx.calibration
        self._data = data.batches if isinstance(data, Calibration) else data
        self._shuffle = shuffle
        self._train: list[int] | None = None
        if _indexable(self._data):
            self._train = list(range(len(self._data)))
        self._given = validation
        self._validation = self._choose_validation(validation, held_out)

    def _choose_validation(
        self, given: Iterable[Any] | None, held_out: float
    ) -> Iterable[Any] | None:
        if given is not None:
            return given
        if self._data is None:
            self._warn("no data was given: the example inputs stand for it, also in evaluation")
            return None
        if not _indexable(self._data):
            return self._first_of_loader(held_out)
        count = round(held_out * len(self._data))
        if held_out and len(self._data) > 1:
            count = max(1, count)
        if not count:
            self._warn("no batch is held out, so evaluation is on batches of the training")
            return self._data
        assert self._train is not None
        self._train = self._train[:-count]
        return [self._data[i] for i in range(len(self._data) - count, len(self._data))]

    def _first_of_loader(self, held_out: float) -> list[Any]:
        assert self._data is not None
        self._warn(
            "batches of a loader cannot be held out, so evaluation is on batches of the training; "
            "give validation= or a list"
        )
        length = len(self._data) if isinstance(self._data, Sized) else 10
        most = max(1, round(held_out * length))
        return [batch for _, batch in zip(range(most), self._data, strict=False)]

    def _warn(self, message: str) -> None:
        self._ctx.tell(Diagnostic("warning", message))

    def count(self) -> int | None:
        """Batches of one epoch; None where the data does not tell."""
        if self._train is not None:
            return len(self._train)
        if self._data is None:
            return 1
        return len(self._data) if isinstance(self._data, Sized) else None

    def training_batches(self) -> Iterable[Any] | None:
        """The batches to train on as they came, in order; None for the example inputs."""
        if self._train is None or not _indexable(self._data):
            return self._data
        return _Chosen(self._data, self._train)

    def epoch(self, number: int, skip: int = 0) -> Iterator[Part]:
        """The batches of an epoch, from one on; what comes before is passed over at once.

        A training that was saved when it had taken the last one skips all of them.
        """
        if self._train is None:
            parts = self._parts(self._data)
            for _ in range(skip):
                next(parts, None)
            return parts
        order = self._train
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            mixed = torch.randperm(len(order), generator=generator).tolist()
            order = [order[i] for i in mixed]
        assert _indexable(self._data)
        if skip and skip >= len(order):
            return iter(())
        return self._parts(_Chosen(self._data, order[skip:]))

    def held(self) -> Iterator[Part]:
        """The batches to evaluate on, in order."""
        yield from self._parts(self._validation)

    def digest(self, hashed: Callable[[str, Any], str]) -> str:
        """What the data is, as far as one can know it without disturbing it.

        All batches that can be indexed count, read once. A loader's may be others in each pass, so
        that of one only its class and length count.

        Args:
            hashed: From the hash of the batches before, and a batch, to a hash.
        """
        found = [self._digest_of(self._data, hashed)]
        if self._given is not None:
            found.append(self._digest_of(self._given, hashed))
        return " ".join(found)

    @staticmethod
    def _digest_of(data: Iterable[Any] | None, hashed: Callable[[str, Any], str]) -> str:
        count = len(data) if isinstance(data, Sized) else None
        if not _indexable(data):
            return f"{type(data).__name__} of {count}"
        digest = ""
        with torch.random.fork_rng(devices=[]):  # reading may draw, and the training is to go on
            for index in range(len(data)):
                digest = hashed(digest, data[index])
        return f"{count} {digest}"

    def _parts(self, data: Iterable[Any] | None) -> Iterator[Part]:
        for batch, flat in flat_batches(self._program, replace(self._ctx, calibration=data)):
            yield self._part(without_inference(batch), without_inference(flat))

    def _part(self, batch: Any, flat: list[Any]) -> Part:
        if self._world == 1:
            return Part(batch, flat, 1.0)
        size = first_extent(flat)
        if size < self._world:
            raise InputError(
                f"a batch of {size} cannot be shared by {self._world} processes",
                hint="larger batches, or fewer processes",
            )
        start, stop = (size * r // self._world for r in (self._rank, self._rank + 1))

        def cut(value: Any) -> Any:
            rows = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == size
            return value[start:stop] if rows else value

        plain = dict(batch) if hasattr(batch, "keys") else batch
        share = (stop - start) / size
        return Part(pytree.tree_map(cut, plain), [cut(value) for value in flat], share)


def _indexable(data: Any) -> TypeGuard[Sequence[Any]]:
    """Whether batches can be had by their numbers."""
    if isinstance(data, Sequence):
        return True
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "keys")


@dataclass(frozen=True)
class _Chosen:
    """Items of a sequence, read when they are asked for."""

    batches: Sequence[Any]
    order: Sequence[int]

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i] for i in self.order)

    def __len__(self) -> int:
        return len(self.order)
