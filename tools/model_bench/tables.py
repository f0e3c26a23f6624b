"""A comparison of models as a rich table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from torchlathe.tools.figures import bytes_text, error_text, ms_text
from torchlathe.tools.report_text import new_table, section

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchlathe.tools.model_bench.rows import ModelBench, ModelRow

__all__ = ["renderables"]


def renderables(found: ModelBench) -> Iterator[RenderableType]:
    """The parts of a comparison, in order of reading."""
    table = new_table(
        "*model", ">p50", ">p95", ">p99", ">speed", ">per s", ">peak memory", ">size", ">cosine",
        ">rel. error",
    )  # fmt: skip
    for row in found.rows:
        table.add_row(escape(row.name), *_cells(found, row))
    rounds = max((len(row.milliseconds) for row in found.rows), default=0)
    threads = f"{found.threads} thread{'s' if found.threads != 1 else ''}"
    caption = f"{rounds} interleaved rounds, {threads}, {', '.join(found.inputs)}"
    yield section("Models, against the first", table, caption)
    for row in found.rows:
        if row.problem:
            yield Text(f"{row.name}: {row.problem}", style="yellow")


def _cells(found: ModelBench, row: ModelRow) -> list[str]:
    speed, rate = found.speedup(row), found.throughput(row)
    times = [ms_text(row.percentile(s)) if row.milliseconds else "" for s in (0.5, 0.95, 0.99)]
    return [
        *times,
        "" if speed is None else f"{speed:.2f}×",
        "" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}",
        "" if row.peak_bytes is None else bytes_text(row.peak_bytes),
        bytes_text(row.bytes) if row.bytes else "",
        "" if row.cosine is None else f"{row.cosine:.5f}",
        "" if row.relative_error is None else error_text(row.relative_error),
    ]
