"""What values are added to, batch by batch: samples of rows, counts of indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from torchlathe.ir import OptionError

__all__ = ["Accumulator", "Counts", "Reservoir"]


class Accumulator(ABC):
    """Sums up the values of one `Watch`. A subclass says how, and how it is saved."""

    @abstractmethod
    def add(self, rows: torch.Tensor, count: int | None = None) -> None:
        """Add one batch.

        Args:
            rows: What the watch makes of the value. Not to be kept or changed.
            count: How many samples the batch has, for gradients; None for values.
        """

    def state(self) -> dict[str, torch.Tensor] | None:
        """Everything that `restore` needs, without copies; None if it cannot be resumed."""
        return None

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what `state` was taken of."""
        raise NotImplementedError


class Reservoir(Accumulator):
    """A uniform sample of all rows, of bounded size.

    Each row of the stream draws a key, and the rows with the largest keys stay. The keys depend on
    the seed and on the place in the stream alone: reservoirs with one seed and one size keep the
    same rows of all values that have equally many, so that inputs and outputs stay paired.

    Args:
        size: How many rows to keep.
        seed: Of the keys.

    Attributes:
        count: Number of rows seen.

    Source: weighted reservoir sampling with equal weights (Efraimidis and Spirakis 2006,
    algorithm A-Res).
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise OptionError(f"size of a reservoir is {size}, but must be at least 1")
        self.size = size
        self.count = 0
        self._generator = torch.Generator()
        self._generator.manual_seed(seed)
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._positions = torch.zeros(0, dtype=torch.int64)
        self._rows: torch.Tensor | None = None

    def add(self, rows: torch.Tensor, count: int | None = None) -> None:
        """Add a batch.

        Args:
            rows: Shape (groups, rows, extent); rows of all groups are taken together.
            count: Not used.
        """
        number = rows.shape[1]
        keys = torch.rand(number, dtype=torch.float64, generator=self._generator)
        # Only what can stay is copied.
        chosen = keys.topk(min(number, self.size)).indices.sort().values
        new = rows.detach()[:, chosen.to(rows.device)].clone()
        joined = new if self._rows is None else torch.cat([self._rows, new], 1)
        keys = torch.cat([self._keys, keys[chosen]])
        positions = torch.cat([self._positions, self.count + chosen])
        stay = keys.topk(min(len(keys), self.size)).indices.sort().values
        self._keys, self._positions = keys[stay], positions[stay]
        self._rows = joined[:, stay.to(joined.device)]
        self.count += number

    @property
    def rows(self) -> torch.Tensor:
        """What was kept, in the order of the stream; shape (groups, at most size, extent).

        Raises:
            ValueError: Nothing was added.
        """
        if self._rows is None:
            raise ValueError("no rows were collected")
        return self._rows

    @property
    def positions(self) -> torch.Tensor:
        """Place of each of `rows` in the stream, from 0."""
        return self._positions

    def state(self) -> dict[str, torch.Tensor]:
        """Rows, keys and the state of the generator."""
        state = {
            "count": torch.tensor(self.count),
            "keys": self._keys,
            "positions": self._positions,
            "generator": self._generator.get_state(),
        }
        return state if self._rows is None else {**state, "rows": self._rows}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with these rows."""
        self.count = int(state["count"])
        self._keys, self._positions = state["keys"].cpu(), state["positions"].cpu()
        self._generator.set_state(state["generator"].cpu())
        self._rows = state.get("rows")


class Counts(Accumulator):
    """How often each index occurs: the experts that a router chose, tokens, classes.

    Args:
        extent: Number of different indices; those below 0 and from it on are not counted.

    Attributes:
        values: Occurrences of each index, shape (extent,), int64.
        count: Number of indices seen.
    """

    def __init__(self, extent: int) -> None:
        self.extent = extent
        self.count = 0
        self.values = torch.zeros(extent, dtype=torch.int64)

    def add(self, rows: torch.Tensor, count: int | None = None) -> None:
        """Add a batch.

        Args:
            rows: Integers, of any shape.
            count: Not used.
        """
        flat = rows.detach().reshape(-1)
        inside = flat[(flat >= 0) & (flat < self.extent)]
        self.values += torch.bincount(inside, minlength=self.extent).cpu()
        self.count += flat.numel()

    @property
    def shares(self) -> torch.Tensor:
        """Share of each index among those counted, shape (extent,), float64."""
        return self.values.double() / max(1, int(self.values.sum()))

    def state(self) -> dict[str, torch.Tensor]:
        """The counts."""
        return {"count": torch.tensor(self.count), "values": self.values}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on with these counts."""
        self.count = int(state["count"])
        self.values = state["values"].cpu()
