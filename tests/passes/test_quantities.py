"""Amounts in options: shares, counts, bytes and times."""

from __future__ import annotations

import pytest

from torchlathe.ir import OptionError
from torchlathe.passes.quantities import BYTES, COUNT, TIME, Quantity, Unit, quantity


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.5, COUNT, Quantity(0.5, relative=True)),
        (1, COUNT, Quantity(1.0, relative=True)),
        ("50%", BYTES, Quantity(0.5, relative=True)),
        ("0.25", COUNT, Quantity(0.25, relative=True)),
        (1_000_000, COUNT, Quantity(1e6, relative=False)),
        ("20M", COUNT, Quantity(20e6, relative=False)),
        ("1.5G", COUNT, Quantity(1.5e9, relative=False)),
        ("0.5M", COUNT, Quantity(5e5, relative=False)),
        ("2B", COUNT, Quantity(2e9, relative=False)),
        ("40MB", BYTES, Quantity(40e6, relative=False)),
        ("40M", BYTES, Quantity(40e6, relative=False)),
        ("512KiB", BYTES, Quantity(2.0**19, relative=False)),
        ("5ms", TIME, Quantity(5e-3, relative=False)),
        ("0.3 us", TIME, Quantity(0.3e-6, relative=False)),
        ("2s", TIME, Quantity(2.0, relative=False)),
        ("1e-3s", TIME, Quantity(1e-3, relative=False)),
        (0.7, TIME, Quantity(0.7, relative=True)),
    ],
    ids=str,
)
def test_what_an_amount_means(value: float | str, unit: Unit, expected: Quantity) -> None:
    got = quantity(value, unit, name="budget")
    assert got.relative == expected.relative
    assert got.value == pytest.approx(expected.value, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0, COUNT, "must be above 0"),
        (-3, COUNT, "must be above 0"),
        (float("nan"), COUNT, "must be above 0"),
        (float("inf"), COUNT, "must be above 0"),
        ("120%", COUNT, "more than there is"),
        ("5ms", COUNT, "the units are k, K, M"),
        ("20M", TIME, "the units are ns"),
        (5, TIME, "has a unit"),
        ("fast", TIME, "not a number with a unit"),
        ("-5ms", TIME, "not a number with a unit"),
        ("", BYTES, "not a number with a unit"),
    ],
    ids=str,
)
def test_what_is_no_amount(value: float | str, unit: Unit, words: str) -> None:
    with pytest.raises(OptionError, match=words) as failure:
        quantity(value, unit, name="budget")
    assert "budget is" in str(failure.value)
    assert unit.example in str(failure.value)


def test_a_share_is_of_something() -> None:
    assert quantity(0.5, COUNT, name="params").of(1000) == 500
    assert quantity("20M", COUNT, name="params").of(1000) == 20e6
