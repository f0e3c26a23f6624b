import pytest

from torchlathe.tools import figures


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (987, "987"), (12345, "12,345"), (99_999, "99,999"), (22_713_216, "22.7 M")],
)
def test_count(value: float, text: str) -> None:
    assert figures.count_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023.9, "1.00 KiB"),
        (512, "512 B"),
        (2**20, "1.00 MiB"),
        (90_852_864, "86.6 MiB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert figures.bytes_text(value) == text


def test_flops() -> None:
    assert figures.flops_text(None) == "?"
    assert figures.flops_text(1.3649e9) == "1.36 GFLOP"
    assert figures.flops_text(999.9e6) == "1.00 GFLOP"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [(100, 100, "same"), (200, 100, "−50.0 %"), (100, 105, "+5.0 %"), (1e6, 999_999, "−0.000 %")],
)
def test_change(before: float, after: float, text: str) -> None:
    assert figures.change_text(before, after) == text
    assert figures.change_text(0, 3) == "new"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (1.2, "1.20 s"), (0.0123, "12.3 ms"), (85e-6, "85.0 µs"), (125, "2 min 5 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert figures.seconds_text(seconds) == text
    assert figures.ms_text(seconds * 1e3) == text


def test_shares_never_claim_all_that_is_not() -> None:
    assert figures.share_text(1.0) == "100.0 %"
    assert figures.share_text(0.99999) == "99.9 %"


def test_speedup() -> None:
    assert figures.speedup_text(1.5) == "1.50× faster"
    assert figures.speedup_text(0.5) == "2.00× slower"
    assert figures.speedup_text(1.001) == "same"
    assert figures.speedup_text(0) == "?"


def test_errors() -> None:
    assert [figures.error_text(e) for e in (0, 0.01234, 3.14e-7)] == ["0", "0.0123", "3.1e-07"]


def test_cutting_texts() -> None:
    assert figures.shorten("abcdef", 4) == "…def"
    assert figures.clip("abcdef", 4) == "abc…"
    assert figures.shorten("abcd", 4) == figures.clip("abcd", 4) == "abcd"
    assert figures.step_text("22.7 M", "19.8 M") == "22.7 → 19.8 M"
    assert figures.step_text("1.00 KiB", "512 B") == "1.00 KiB → 512 B"
