"""Options of a distillation that are suggested by those of earlier ones."""

from __future__ import annotations

import math

import pytest
import torch

from torchlathe.ir import InputError, OptionError
from torchlathe.passes import Distill
from torchlathe.passes.tune.distilling.configuring import (
    RANGES,
    Configurations,
    Experience,
    meta_features,
)


def experience(count: int) -> list[Experience]:
    """The better rate and temperature depend on the first feature, the others on nothing."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        first, second = torch.rand(2, generator=generator).tolist()
        options = {"temperature": 2 + 6 * first, "alpha": 0.7, "lr": 10 ** (-5 + 3 * first)}
        found.append(Experience((first, second), {**options, "weight_decay": 1e-4}))
    return found


@pytest.mark.parametrize("count", [20, 80], ids=["likeness", "trees"])
def test_what_did_well_is_suggested(count: int) -> None:
    manager = Configurations(experience(count), near=3)
    low, high = (manager.suggest((first, 0.5)) for first in (0.05, 0.95))
    # Coarse: a mean of three of twenty, and trees on eighty.
    assert low["temperature"] < 4 < 6 < high["temperature"]
    assert low["lr"] < 1e-4 < 1e-3 < high["lr"]
    assert low["alpha"] == pytest.approx(0.7)
    assert low["optimizer_options"]["weight_decay"] == pytest.approx(1e-4)
    assert Distill(**low).temperature == low["temperature"]


def test_suggestions_stay_in_their_ranges() -> None:
    wild = {name: most * 10 for name, (_, most) in RANGES.items()}
    found = Configurations([Experience((1.0,), wild)]).suggest([2.0])
    found |= found.pop("optimizer_options")
    assert found == {name: most for name, (_, most) in RANGES.items()}


def test_features_of_data_and_networks() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50)
    found = meta_features(torch.zeros(100, 1, 8, 8), labels, teacher=1000, student=100)
    assert found == pytest.approx((2, math.log10(64), math.log10(2), 3, 1, 1))
    lopsided = meta_features(torch.zeros(100, 3), (labels + labels.roll(45)) // 2, teacher=2,
                             student=1)  # fmt: skip
    assert lopsided[-1] < 0.5


def test_experience_that_does_not_fit() -> None:
    one = experience(1)[0]
    with pytest.raises(InputError, match="no experience"):
        Configurations([])
    with pytest.raises(InputError, match="other features"):
        Configurations([one, Experience((1.0,), one.options)])
    with pytest.raises(OptionError, match="no value for alpha"):
        Configurations([Experience(one.features, {"temperature": 2, "lr": 1, "weight_decay": 1})])
    with pytest.raises(InputError, match="3 features"):
        Configurations([one]).suggest((1.0, 2.0, 3.0))
