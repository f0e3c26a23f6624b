"""The one pass over calibration data: batch by batch, with a state that a killed run goes on from.

Who collects what gives a step, called with each batch, and the accumulators that it adds to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path as Folder
from typing import Any

from torchlathe.ir import InputError, PreconditionError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.accumulators import Accumulator
from torchlathe.passes.statistics.calibration import Calibration
from torchlathe.passes.statistics.running import device_of, flat_batches, of_how_many
from torchlathe.passes.statistics.saving import StateFile, batch_digest, state_key
from torchlathe.passes.statistics.storage import MatrixStore

__all__ = ["Stream"]


@dataclass
class Stream:
    """One pass over the data, into accumulators.

    Attributes:
        program: What the batches are the inputs of.
        ctx: The batches, and where progress goes.
        setting: Where a state is saved, and how often.
        accumulators: All that the step adds to; with ``resume``, each needs `Accumulator.state`.
        about: A line for each thing that is collected; other lines have another state. Read only to
            save one.
        store: Where the accumulators' matrices are; progress tells how much is in files.
        what: What is collected, for progress.
        limit: Take so many batches at most; None for all.
    """

    program: Program
    ctx: PassContext
    setting: Calibration
    accumulators: Mapping[str, Accumulator]
    about: Iterable[str]
    store: MatrixStore
    what: str = "statistics"
    limit: int | None = None

    def run(self, step: Callable[[int, Any, list[Any]], None]) -> int:
        """Go over the batches that the saved state has not seen; the number of all batches.

        Args:
            step: Called with the batch's place, the batch as it came, and its flat inputs.

        Raises:
            InputError: A batch does not fit the program, there is none, or those that an
                interrupted run has seen are others.
            PreconditionError: An accumulator cannot be resumed.
            ArtifactError: The saved state cannot be read.
        """
        state = self._open()
        seen, digest, count = (state.seen if state else 0), "", 0
        total = of_how_many(self.ctx, self.limit)
        for batch, flat in islice(flat_batches(self.program, self.ctx), self.limit):
            count += 1
            if state:
                digest = batch_digest(digest, batch)
                if count == seen and digest != state.digest:
                    raise _other_data(state)
                if count <= seen:
                    self.ctx.report(f"{self.what}: batch {count} was seen before")
                    continue
            self.ctx.report(f"{self.what}: batch {count}{total}{_in_files(self.store)}")
            step(count - 1, batch, flat)
            if state and count % self.setting.save_every == 0:
                state.save(self.accumulators, count, digest)
        if state and count < seen:
            raise _other_data(state)
        if state and count > state.seen:
            state.save(self.accumulators, count, digest)
        return count

    def _open(self) -> StateFile | None:
        if self.setting.resume is None:
            return None
        for name, accumulator in self.accumulators.items():
            if accumulator.state() is None:
                raise PreconditionError(
                    f"{type(accumulator).__name__} of {name} cannot be resumed",
                    hint="give it state() and restore(), or leave out resume=",
                )
        key = state_key(self.program, self.about)
        state = StateFile(Folder(self.setting.resume) / f"{key}.safetensors")
        state.load(self.accumulators, device_of(self.program))
        return state


def _in_files(store: MatrixStore) -> str:
    spilled = store.spilled_bytes
    return f" ({spilled / 2**20:.0f} MiB of matrices in files)" if spilled else ""


def _other_data(state: StateFile) -> InputError:
    return InputError(
        f"the calibration data is not that of the interrupted run, which saw {state.seen} batches",
        where=str(state.path),
        hint="give the same batches in the same order, or delete the file to begin again",
    )
