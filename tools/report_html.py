"""A report as one self-contained page: no script, no font and no picture from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlathe.tools import figures, plots
from torchlathe.tools.report_text import agreement_text, short_place, verification_text

if TYPE_CHECKING:
    from torchlathe.tools.report import Report

__all__ = ["page"]

_FIRST_ROWS = 15  # of a long table; the rest unfolds


def page(report: Report) -> str:
    """The HTML text of a report's page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("torchlathe.tools", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        count=figures.count_text,
        bytes=figures.bytes_text,
        flops=figures.flops_text,
        ms=figures.ms_text,
        seconds=figures.seconds_text,
        share=figures.share_text,
        error=figures.error_text,
        place=short_place,
        verification=verification_text,
    )
    drawings = {
        "sizes": plots.sizes_plot(report),
        "latency": plots.latency_plot(report.latency) if report.latency else "",
        "layers": plots.layers_plot(report.parameters),
        "fidelity": plots.fidelity_plot(report.fidelity),
        "sharing": plots.sharing_plot(report),
        "profile": plots.profile_plot(report),
        "training": plots.training_plot(report),
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        tiles=_tiles(report),
        agreement=agreement_text(report),
        # The drawings are SVG that this package made; matplotlib escapes the text in them.
        plots={name: Markup(text) for name, text in drawings.items()},
        first_rows=_FIRST_ROWS,
        change=figures.change_text,
        speedup=figures.speedup_text,
    )


def _tiles(report: Report) -> list[dict[str, Any]]:
    """The few numbers that matter most: title, value, and what it came from."""
    before, after = report.before, report.after
    tiles = [
        _tile("Parameters", before.parameters, after.parameters, figures.count_text),
        _tile("Size", before.bytes, after.bytes, figures.bytes_text),
    ]
    if before.flops is not None and after.flops is not None:
        tiles.append(_tile("FLOPs", before.flops, after.flops, figures.flops_text))
    if (latency := report.latency) is not None:
        speedup = latency.speedup
        tiles.append(
            {
                "title": "Latency",
                "value": figures.speedup_text(speedup),
                "detail": figures.step_text(
                    figures.ms_text(latency.original_median),
                    figures.ms_text(latency.compiled_median),
                ),
                "good": speedup > 1.005,
            }
        )
    if (cosine := report.worst_cosine) is not None:
        errors = [e.relative_error for e in report.fidelity if e.relative_error is not None]
        detail = f"relative error {figures.error_text(max(errors))}" if errors else ""
        tiles.append(
            {"title": "Output cosine", "value": f"{cosine:.4f}", "detail": detail, "good": False}
        )
    return tiles


def _tile(title: str, before: float, after: float, text: Any) -> dict[str, Any]:
    return {
        "title": title,
        "value": figures.change_text(before, after),
        "detail": figures.step_text(text(before), text(after)),
        "good": after < before,
    }
