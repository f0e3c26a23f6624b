"""Batches together with how statistics of them are to be collected."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torchlathe.ir import InputError, OptionError
from torchlathe.passes.statistics.storage import usable_folder

__all__ = ["Calibration", "Path"]

Path = str | os.PathLike[str]


class Calibration:
    """Batches for ``calibration=``, with settings for all passes that collect statistics of them.

    Args:
        batches: Any iterable of batches; one that can be iterated only once is read into a list.
        limit_bytes: Memory for the matrices of one run over the data; 2 GiB by default.
        spill: Folder for the files of what does not fit; by default the system's temporary one.
        resume: Folder for the states of runs, to go on from after an interruption.
        save_every: Save a state after so many batches.
        samples: How many samples a batch has, the loss being the mean of theirs; by default the
            first extent of its first tensor.

    Raises:
        OptionError: A negative limit, a state to be saved after less than one batch, or samples
            that are no function.
        InputError: No batches, or a folder that cannot be used.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        limit_bytes: int | None = None,
        spill: Path | None = None,
        resume: Path | None = None,
        save_every: int = 16,
        samples: Callable[[Any], int] | None = None,
    ) -> None:
        if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
            raise InputError(
                f"calibration must be batches, got {type(batches).__name__}",
                hint="a list of batches, or a data loader",
            )
        if limit_bytes is not None and limit_bytes < 0:
            raise OptionError(f"limit_bytes is {limit_bytes}, but must not be negative")
        if save_every < 1:
            raise OptionError(f"save_every is {save_every}, but must be at least 1")
        if samples is not None and not callable(samples):
            raise OptionError(
                f"samples is {samples}, but must be a function of a batch that counts them"
            )
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        self.limit_bytes = limit_bytes
        self.spill = None if spill is None else usable_folder(spill, "spill")
        self.resume = None if resume is None else usable_folder(resume, "resume")
        self.save_every = save_every
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    @classmethod
    def of(cls, data: Iterable[Any] | None, **given: Any) -> Calibration:
        """The settings to use: those that are given, else those of the data.

        Args:
            data: What the user gave for ``calibration=``.
            **given: Settings; None for those that are left to the data.
        """
        found = data if isinstance(data, Calibration) else cls(())
        names = ("limit_bytes", "spill", "resume", "save_every", "samples")
        settings = {name: getattr(found, name) for name in names}
        settings.update({name: value for name, value in given.items() if value is not None})
        return cls(found.batches, **settings)
