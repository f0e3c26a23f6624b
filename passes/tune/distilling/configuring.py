"""Options of a distillation, from those that did well on other data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from torchlathe.ir import InputError, OptionError

__all__ = ["RANGES", "Configurations", "Experience", "meta_features"]

# What is suggested, between what; the last two on a logarithmic scale.
RANGES: Final = {
    "temperature": (2.0, 8.0),
    "alpha": (0.0, 1.0),
    "lr": (1e-5, 1e-2),
    "weight_decay": (1e-6, 1e-3),
}
_LOGARITHMIC: Final = ("lr", "weight_decay")


@dataclass(frozen=True)
class Experience:
    """Options that did well once.

    Attributes:
        features: What it was about, as `meta_features` tells.
        options: A value for each name of `RANGES`.
    """

    features: tuple[float, ...]
    options: Mapping[str, float]


def meta_features(
    inputs: torch.Tensor, labels: torch.Tensor, *, teacher: int, student: int
) -> tuple[float, ...]:
    """Numbers by which data sets, and pairs of networks, are compared.

    Args:
        inputs: (samples, ...).
        labels: (samples,), int64.
        teacher: Its number of parameters.
        student: Likewise.

    Returns:
        Logarithms to base 10 of the samples, of the values of each, of the classes, of the
        teacher's parameters and of how many times more they are than the student's; and the entropy
        of the classes over that of classes of one size.
    """
    counts = torch.bincount(labels).double()
    counts = counts[counts > 0]
    entropy = float(torch.special.entr(counts / counts.sum()).sum())
    each = inputs[0].numel()
    sizes = (len(labels), each, len(counts), teacher, teacher / student)
    return (*(math.log10(size) for size in sizes), entropy / max(1e-12, math.log(len(counts))))


class Configurations:
    """Suggests options by what did well before: HPM-KD's configuration manager.

    Where there is much experience, gradient-boosted trees tell each option from the features; else
    it is the mean of those of the most similar, by the cosine of features that are scaled to mean 0
    and deviation 1.

    Source: HPM-KD (arXiv 2512.09886); which features, and their scaling, are own. The paper's code
    fits trees to the reward of a run and takes what they tell for a temperature; here they tell
    the option itself.

    Args:
        experience: At least one.
        near: How many similar ones count.
        enough: Above so many, boosted trees are fitted.

    Raises:
        InputError: No experience, or such of other numbers of features.
        OptionError: An option is missing.
    """

    def __init__(
        self, experience: Sequence[Experience], *, near: int = 5, enough: int = 50
    ) -> None:
        if not experience:
            raise InputError("there is no experience to suggest options by")
        if len({len(each.features) for each in experience}) > 1:
            raise InputError("some of the experience has other features than the rest")
        for each in experience:
            if missing := RANGES.keys() - each.options.keys():
                raise OptionError(f"some experience has no value for {min(missing)}")
        self.near, self.enough = near, enough
        self._features = torch.tensor([e.features for e in experience], dtype=torch.float64)
        scaled = [[_scaled(name, e.options[name]) for name in RANGES] for e in experience]
        self._options = torch.tensor(scaled, dtype=torch.float64)

    def suggest(self, features: Sequence[float]) -> dict[str, Any]:
        """Options for ``Distill(**options)``.

        Args:
            features: As those of the experience.

        Raises:
            InputError: Another number of features.
        """
        if len(features) != self._features.shape[1]:
            raise InputError(
                f"there are {len(features)} features, but experience has {self._features.shape[1]}"
            )
        wanted = torch.tensor(features, dtype=torch.float64)
        many = len(self._features) > self.enough
        values = self._by_trees(wanted) if many else self._by_likeness(wanted)
        found: dict[str, Any] = {
            name: min(most, max(least, _unscaled(name, value)))
            for (name, (least, most)), value in zip(RANGES.items(), values, strict=True)
        }
        found["optimizer_options"] = {"weight_decay": found.pop("weight_decay")}
        return found

    def _by_likeness(self, wanted: torch.Tensor) -> list[float]:
        every = torch.cat([self._features, wanted[None]])
        every = (every - every.mean(0)) / every.std(0).clamp_min(1e-9)
        cosines = torch.nn.functional.cosine_similarity(every[:-1], every[-1:], dim=1)
        nearest = cosines.topk(min(self.near, len(cosines))).indices
        found: list[float] = self._options[nearest].mean(0).tolist()
        return found

    def _by_trees(self, wanted: torch.Tensor) -> list[float]:
        return [_boosted(self._features, column, wanted) for column in self._options.T]


def _boosted(
    known: torch.Tensor, values: torch.Tensor, wanted: torch.Tensor, rounds: int = 100
) -> float:
    """What trees of one split each tell for a row, each fitted to a tenth of what is left.

    Args:
        known: (rows, features).
        values: (rows,).
        wanted: (features,).
        rounds: Trees.
    """
    ordered, order = known.sort(0)
    told = float(values.mean())
    rest = values - told
    count = torch.arange(1, len(values), dtype=values.dtype)[:, None]
    for _ in range(rounds):
        sums = rest[order].cumsum(0)
        below, above = sums[:-1], sums[-1:] - sums[:-1]
        # By how much a split lessens the squared error; none is between equal values.
        gain = below.square() / count + above.square() / (len(values) - count)
        gain = gain.masked_fill(ordered[1:] == ordered[:-1], -torch.inf)
        place, feature = divmod(int(gain.argmax()), gain.shape[1])
        if gain[place, feature].isinf():
            break
        split = (ordered[place, feature] + ordered[place + 1, feature]) / 2
        low = below[place, feature] / count[place, 0]
        high = above[place, feature] / (len(values) - count[place, 0])
        rest = rest - 0.1 * torch.where(known[:, feature] <= split, low, high)
        told += 0.1 * float(low if wanted[feature] <= split else high)
    return told


def _scaled(name: str, value: float) -> float:
    return math.log10(value) if name in _LOGARITHMIC else value


def _unscaled(name: str, value: float) -> float:
    return 10**value if name in _LOGARITHMIC else value
