"""What values are added to, batch by batch: samples of rows, counts of indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from torchlathe.ir import OptionError

__all__ = ["Accumulator", "Allocate", "Counts", "Reservoir", "Samples", "Total"]

# Gives memory: zeros of a shape, a dtype and a device; `MatrixStore.zeros` does.
Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


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

    def describe(self) -> str:
        """A line that differs where states do not fit one another; the same in each process."""
        return type(self).__qualname__


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
        self.seed = seed
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

    def describe(self) -> str:
        """With the size and the seed."""
        return f"{super().describe()} {self.size} {self.seed}"

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

    def describe(self) -> str:
        """With the extent."""
        return f"{super().describe()} {self.extent}"

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


class Total(Accumulator):
    """The sum of tensors of one shape, such as gradients of a parameter.

    Args:
        like: Of that shape and device; sums are in its dtype, and in float32 at least.
        allocate: Gives memory for the sum.

    Attributes:
        value: The sum.
        count: How many were added, or as many as `add` was told.
    """

    def __init__(self, like: torch.Tensor, allocate: Allocate) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        self.value = allocate(tuple(like.shape), wide, like.device)
        self.count = 0

    def add(self, rows: torch.Tensor, count: int | None = None, weight: float = 1.0) -> None:
        """Add a tensor.

        Args:
            rows: Of the shape.
            count: How many it stands for; one by default.
            weight: It is multiplied with.
        """
        self.value.add_(rows.detach().to(self.value), alpha=weight)
        self.count += 1 if count is None else count

    def add_squares(
        self, rows: torch.Tensor, count: int | None = None, weight: float = 1.0
    ) -> None:
        """Add the squares of a tensor's elements; as `add`."""
        rows = rows.detach().to(self.value)
        self.value.addcmul_(rows, rows, value=weight)
        self.count += 1 if count is None else count

    def state(self) -> dict[str, torch.Tensor]:
        """Sum and count."""
        return {"count": torch.tensor(self.count), "value": self.value}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from this sum."""
        self.count = int(state["count"])
        self.value.copy_(state["value"])


class Samples(Accumulator):
    """Numbers as they come: for each batch that has any, a list.

    Attributes:
        values: The lists.
    """

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def add(self, rows: torch.Tensor, count: int | None = None) -> None:
        """Add the numbers of a batch.

        Args:
            rows: Of any shape.
            count: Not used.
        """
        self.values.append(rows.detach().double().flatten().tolist())

    def state(self) -> dict[str, torch.Tensor]:
        """All numbers, and how many are of each batch."""
        flat = [value for batch in self.values for value in batch]
        return {
            "values": torch.tensor(flat, dtype=torch.float64),
            "lengths": torch.tensor([len(batch) for batch in self.values], dtype=torch.int64),
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from these."""
        parts = state["values"].cpu().split(state["lengths"].tolist())
        self.values = [part.tolist() for part in parts]
