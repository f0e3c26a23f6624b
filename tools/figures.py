"""Numbers as people read them."""

from __future__ import annotations

import math

__all__ = [
    "bytes_text",
    "change_text",
    "clip",
    "count_text",
    "error_text",
    "flops_text",
    "ms_text",
    "seconds_text",
    "share_text",
    "shorten",
    "speedup_text",
    "step_text",
]


def count_text(value: float) -> str:
    """``987``, ``12,345``, ``22.7 M``."""
    if abs(value) < 100_000:
        return f"{value:,.0f}"
    return _scaled(value, 1000, ("", " k", " M", " G", " T", " P"))


def bytes_text(value: float) -> str:
    """``512 B``, ``86.6 MiB``."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def flops_text(value: float | None) -> str:
    """``1.36 GFLOP``; ``?`` if it is unknown."""
    if value is None:
        return "?"
    return _scaled(value, 1000, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def change_text(before: float, after: float) -> str:
    """``−31.2 %``, ``+5.0 %``, ``same``."""
    if before == after:
        return "same"
    if not before:
        return "new"
    share = 100 * (after - before) / before
    digits = 1 if abs(share) >= 0.1 else 3
    return f"{share:+.{digits}f} %".replace("-", "−")


def share_text(share: float) -> str:
    """``98.4 %``; 100 % only if it is all."""
    text = f"{100 * share:.1f} %"
    return "99.9 %" if share < 1 and text == "100.0 %" else text


def speedup_text(ratio: float) -> str:
    """``1.42× faster`` or ``1.10× slower``."""
    if 0.995 <= ratio <= 1.005:
        return "same"
    if ratio > 1:
        return f"{ratio:.2f}× faster"
    return f"{1 / ratio:.2f}× slower" if ratio > 0 else "?"


def ms_text(milliseconds: float) -> str:
    """``12.3 ms``, ``1.20 s``, ``85 µs``."""
    return seconds_text(milliseconds / 1e3)


def seconds_text(seconds: float) -> str:
    """``1.20 s``, ``12.3 ms``, ``85.0 µs``."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995:
            return f"{_digits(seconds * scale)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds * 1e6:.2f} µs"


def step_text(before: str, after: str) -> str:
    """``22.7 → 19.8 M``: two figures, with the unit said once if it is the same."""
    value, space, unit = before.rpartition(" ")
    return f"{value if space and after.endswith(f' {unit}') else before} → {after}"


def error_text(error: float) -> str:
    """``0``, ``0.0123``, ``3.1e-07``."""
    if error == 0 or not math.isfinite(error):
        return f"{error:g}"
    return f"{error:.3g}" if error >= 1e-3 else f"{error:.1e}"


def shorten(name: str, limit: int) -> str:
    """The end of a name, which tells more than its beginning."""
    return name if len(name) <= limit else "…" + name[-limit + 1 :]


def clip(text: str, limit: int) -> str:
    """The beginning of a text."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # What would be written as 1000 belongs to the next unit.
        if abs(value) < step * 0.9995:
            return (_digits(value) if unit != units[0] else f"{value:.0f}") + unit
        value /= step
    return _digits(value) + units[-1]


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    size = abs(value)
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:.{digits}f}"
