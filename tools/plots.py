"""Plots of a report as inline SVG that follows the colours of the page around it.

Matplotlib draws with stand-in colours, which are then replaced by CSS variables: one drawing
serves light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchlathe.tools.figures import (
    bytes_text,
    count_text,
    error_text,
    flops_text,
    ms_text,
    share_text,
    shorten,
)
from torchlathe.tools.latency import quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchlathe.tools.fidelity import OutputFidelity
    from torchlathe.tools.latency import Latency
    from torchlathe.tools.report import ParameterRow, Report

__all__ = [
    "fidelity_plot",
    "latency_plot",
    "layers_plot",
    "profile_plot",
    "sharing_plot",
    "sizes_plot",
    "svg",
    "training_plot",
]

# Stand-ins, no two alike, to the variables of the page.
_INK, _MUTED, _RULE, _BEFORE, _AFTER = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _BEFORE: "var(--before)",
    _AFTER: "var(--after)",
}
# Classes of layers that share; more of them than these begin again.
_CLASS_COLOURS = ("#1f6feb", "#1a7f4b", "#c2740a", "#8250df", "#cf222e", "#0e7490")
_MOST_LAYERS = 48
_MOST_OUTPUTS = 16
_MOST_PROFILES, _PROFILE_COLUMNS = 12, 4


def sizes_plot(report: Report) -> str:
    """Parameters, bytes and FLOPs: before, and after each pass."""
    panels = [
        ("Parameters", _steps(report, "parameters"), count_text),
        ("Size", _steps(report, "bytes"), bytes_text),
        ("FLOPs", _steps(report, "flops"), flops_text),
    ]
    panels = [panel for panel in panels if len(panel[1]) > 1]
    if not panels:
        return ""
    rows = len(panels[0][1])
    with _figure(9.0, 0.55 + 0.34 * rows) as figure:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, steps, text) in zip(axes, panels, strict=True):
            values = [value for _, value in steps]
            places = range(len(steps))
            colours = [_BEFORE, *[_AFTER] * (len(steps) - 1)]
            axis.barh(places, values, color=colours, height=0.62)
            for place, value in zip(places, values, strict=True):
                _beside(axis, (value, place), text(value))
            axis.set_xlim(0, max(values) * 1.45 or 1)
            axis.set_xticks([])
            axis.set_title(title, loc="left", fontsize=10, color=_INK)
            axis.set_yticks(list(places), [shorten(name, 26) for name, _ in steps])
            axis.tick_params(length=0)
        axes[0].invert_yaxis()
        return svg(figure, "sizes")


def latency_plot(latency: Latency) -> str:
    """Every sample of both models, with the median and the band from 20 % to 80 %."""
    rows = [
        ("original", latency.original_ms, _BEFORE),
        ("compiled", latency.compiled_ms, _AFTER),
    ]
    with _figure(9.0, 1.9) as figure:
        axis = figure.subplots()
        # Of many samples, a straggler would push all others into one corner.
        share = 0.98 if len(latency.original_ms) >= 20 else 1.0
        high = max(quantile(samples, share) for _, samples, _ in rows)
        for place, (_, samples, colour) in enumerate(rows):
            offsets = _spread(len(samples))
            inside = [(x, place + y) for x, y in zip(samples, offsets, strict=True) if x <= high]
            xs, ys = zip(*inside, strict=True)
            axis.scatter(xs, ys, s=13, color=colour, alpha=0.45, linewidths=0)
            low, middle, top = (quantile(samples, share) for share in (0.2, 0.5, 0.8))
            axis.plot([low, top], [place + 0.33] * 2, color=colour, linewidth=3)
            axis.plot([middle] * 2, [place - 0.3, place + 0.33], color=_INK, linewidth=1.4)
            axis.text(middle, place - 0.36, ms_text(middle), ha="center", color=_INK, fontsize=9)
        axis.set_yticks([0, 1], [name for name, _, _ in rows])
        axis.set_ylim(1.55, -0.65)
        axis.set_xlim(0, high * 1.06)
        axis.set_xlabel("milliseconds per call", color=_MUTED, fontsize=9)
        axis.grid(axis="x", color=_RULE, linewidth=0.7)
        axis.tick_params(length=0)
        return svg(figure, "latency")


def layers_plot(rows: Sequence[ParameterRow]) -> str:
    """The share of the parameters of each changed layer that is left; those cut most, of many."""
    shares = _layer_shares(rows)
    if not shares:
        return ""
    if len(shares) > _MOST_LAYERS:
        kept = sorted(shares, key=lambda pair: pair[1])[:_MOST_LAYERS]
        shares = [pair for pair in shares if pair in kept]
    with _figure(9.0, 0.5 + 0.21 * len(shares)) as figure:
        axis = figure.subplots()
        places = range(len(shares))
        axis.barh(places, [100.0] * len(shares), color=_RULE, height=0.6)
        axis.barh(places, [100 * share for _, share in shares], color=_AFTER, height=0.6)
        for place, (_, share) in zip(places, shares, strict=True):
            _beside(axis, (100, place), share_text(share))
        axis.set_yticks(list(places), [shorten(name, 52) for name, _ in shares], fontsize=8)
        axis.set_ylim(len(shares) - 0.4, -0.6)
        axis.set_xlim(0, 110)
        axis.set_xticks([])
        axis.tick_params(length=0)
        return svg(figure, "layers")


def fidelity_plot(entries: Sequence[OutputFidelity]) -> str:
    """Relative error of each output, on a logarithmic axis."""
    told = [(e.name, e.relative_error) for e in entries if e.relative_error is not None]
    told = told[:_MOST_OUTPUTS]
    errors = [max(error, 1e-9) for _, error in told]
    if not errors:
        return ""
    with _figure(9.0, 0.75 + 0.3 * len(told)) as figure:
        axis = figure.subplots()
        places = range(len(told))
        low, high = min(1e-4, min(errors) / 2), max(1.0, max(errors) * 2)
        axis.hlines(places, low, errors, color=_AFTER, linewidth=2)
        axis.scatter(errors, places, color=_AFTER, s=34, zorder=3)
        for place, (shown, (_, error)) in enumerate(zip(errors, told, strict=True)):
            _beside(axis, (shown, place), error_text(error))
        axis.set_xscale("log")
        axis.set_xlim(low, high * 3)
        axis.set_ylim(len(told) - 0.4, -0.6)
        axis.set_yticks(list(places), [shorten(name, 40) for name, _ in told])
        axis.set_xlabel("relative error (log scale)", color=_MUTED, fontsize=9)
        axis.grid(axis="x", color=_RULE, linewidth=0.7)
        axis.minorticks_off()
        axis.tick_params(length=0)
        return svg(figure, "fidelity")


def sharing_plot(report: Report) -> str:
    """Which layers share: a row per kind of layer, a cell per layer, a colour per class.

    Drawn for the last pass with a record of sharing; layers that share with nobody are grey.
    """
    details = [record["details"] for record in report.passes if record.get("details")]
    found = next((d["sharing"] for d in reversed(details) if "sharing" in d), None)
    rows = _sharing_rows(found) if found else {}
    if not rows:
        return ""
    widest = max(len(cells) for cells in rows.values())
    with _figure(9.0, 0.45 + 0.3 * len(rows)) as figure:
        axis = figure.subplots()
        for place, cells in enumerate(rows.values()):
            for column, number in enumerate(cells):
                alone = number < 0
                colour = _RULE if alone else _CLASS_COLOURS[number % len(_CLASS_COLOURS)]
                axis.barh(place, 0.92, left=column, height=0.82, color=colour)
                if not alone and widest <= _MOST_LAYERS:
                    text = str(number + 1)
                    axis.text(column + 0.46, place, text, ha="center", va="center", color="white")
        axis.set_yticks(range(len(rows)), [shorten(name, 52) for name in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, max(widest, 8))
        axis.set_xticks([])
        axis.tick_params(length=0)
        return svg(figure, "sharing")


def _sharing_rows(sharing: dict[str, Any]) -> dict[str, list[int]]:
    """Per role, the number of each layer's class among those of its type; -1 where it is alone."""
    rows: dict[str, list[int]] = {}
    for part in sharing["types"]:
        shared = [one["layers"] for one in part["classes"] if len(one["layers"]) > 1]
        for layer in part["layers"]:
            role = ".".join("*" if p.isdigit() else p for p in layer.split("."))
            number = next((i for i, layers in enumerate(shared) if layer in layers), -1)
            rows.setdefault(role, []).append(number)
    return rows


def profile_plot(report: Report) -> str:
    """Error against size of split layers by method, and what was chosen: a panel for each layer.

    Drawn for the last pass with a record of it; of many layers, those at equal steps of depth.
    Dots are errors that were estimated for the choice; rings, of what was chosen, are measured.
    """
    details = [record["details"] for record in report.passes if record.get("details")]
    found: list[dict[str, Any]] = next(
        (d["layer_profile"] for d in reversed(details) if "layer_profile" in d), []
    )
    layers = [layer for layer in found if layer["methods"]]
    if not layers:
        return ""
    count = min(len(layers), _MOST_PROFILES)
    steps = [round(i * (len(layers) - 1) / max(count - 1, 1)) for i in range(count)]
    shown = [layers[step] for step in steps]
    names = list(dict.fromkeys(name for layer in layers for name in layer["methods"]))
    columns = min(count, _PROFILE_COLUMNS)
    rows = -(-count // columns)
    with _figure(9.0, 0.5 + 1.75 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for panel in panels[count:]:
            panel.set_visible(False)
        guessed = {name for layer in layers for name in layer.get("estimated", ())}
        for panel, layer in zip(panels, shown, strict=False):
            _profile(panel, layer, names, guessed)
        panels[0].set_xlim(0, 1.05)
        handles = [panels[0].plot([], [], **_line_of(name, names, guessed))[0] for name in names]
        labels = [f"{name} (estimated)" if name in guessed else name for name in names]
        figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=8)
        figure.supxlabel("share of the layer's parameters", color=_MUTED, fontsize=9)
        return svg(figure, "profile")


def _profile(
    panel: Axes, layer: dict[str, Any], names: Sequence[str], guessed: Collection[str]
) -> None:
    """One layer's errors, with a ring at what was chosen; without error it is at the floor."""
    floor = 1e-4
    for name, curve in layer["methods"].items():
        shares, errors = zip(*curve, strict=True)
        shown = [max(error, floor) for error in errors]
        panel.plot(shares, shown, linewidth=1.2, **_line_of(name, names, guessed))
    chosen = layer["chosen"]
    panel.plot(
        [chosen["kept"]],
        [max(chosen["error"], floor)],
        marker="o",
        markersize=6,
        markerfacecolor="none",
        markeredgecolor=_INK,
        clip_on=False,
    )
    panel.set_yscale("log")
    title = shorten(layer["weight"].removesuffix(".weight"), 30)
    panel.set_title(f"{title}\n{chosen['method']}", fontsize=7.5, loc="left", color=_INK)
    panel.grid(color=_RULE, linewidth=0.6)
    panel.tick_params(length=0, labelsize=7)
    panel.minorticks_off()


def _line_of(name: str, names: Sequence[str], guessed: Collection[str]) -> dict[str, Any]:
    """Colour and, where the colours begin again, dashes of a method; dots where it is estimated."""
    place = list(names).index(name)
    again = place >= len(_CLASS_COLOURS)
    colour = _CLASS_COLOURS[place % len(_CLASS_COLOURS)]
    style = ":" if name in guessed else "--" if again else "-"
    return {"color": colour, "linestyle": style}


def training_plot(report: Report) -> str:
    """The loss of each step of passes that trained, and of their evaluations.

    A panel for each training; the loss is on a logarithmic axis where it is positive. Where
    groups become zero on the way, their share is drawn as well.
    """
    found = [
        (f"{record['spec'].partition('{')[0]}: {kind}", curve)
        for record in report.passes
        for kind, curve in (record.get("details") or {}).get("training", {}).items()
        if curve.get("losses")
    ]
    if not found:
        return ""
    with _figure(9.0, 2.6 * len(found)) as figure:
        axes = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axis, (title, curve) in zip(axes, found, strict=True):
            told = [(e["step"], e["loss"]) for e in curve.get("evaluations", [])]
            axis.plot(*zip(*curve["losses"], strict=True), color=_BEFORE, linewidth=0.9)
            if told:
                axis.plot(*zip(*told, strict=True), color=_AFTER, marker="o", markersize=3.5)
                _beside(axis, told[-1], f"held out {told[-1][1]:.3g}")
            if all(loss > 0 for _, loss in (*curve["losses"], *told)):
                axis.set_yscale("log")
            axis.set_title(title, fontsize=9, loc="left", color=_INK)
            axis.set_xlabel("step", color=_MUTED)
            axis.set_ylabel("loss")
            axis.grid(axis="y", color=_RULE, linewidth=0.7)
            _draw_sparsity(axis, curve)
        return svg(figure, "training")


def _draw_sparsity(axis: Axes, curve: dict[str, Any]) -> None:
    """On an axis of its own, the share of the groups that a sparse training has made zero."""
    steps = [step for step, _ in curve["losses"]]
    shares = [100 * row.get("group_sparsity", 0.0) for row in curve.get("records", [])]
    if not any(shares):
        return
    count = min(len(steps), len(shares))
    other = axis.twinx()
    other.step(steps[:count], shares[:count], where="post", color=_MUTED, linestyle="--")
    other.set_ylim(0, 100)
    other.set_ylabel("zero groups, %", color=_MUTED)
    other.tick_params(length=0)


def svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element.

    Args:
        figure: Drawn with the stand-in colours of this module.
        name: Prefix of its ids, so that several drawings can be on one page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]+"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]+"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure in the style of the report; width and height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9.0,
        "axes.edgecolor": _RULE,
        "axes.labelcolor": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.spines.bottom": False,
        "axes.axisbelow": True,
        "xtick.color": _MUTED,
        "ytick.color": _INK,
        "text.color": _INK,
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def _beside(axis: Axes, place: tuple[float, float], text: str) -> None:
    axis.annotate(
        text, place, (6, 0), textcoords="offset points", va="center", color=_INK, fontsize=8.5
    )


def _steps(report: Report, what: str) -> list[tuple[str, float]]:
    """The value before anything, and after each pass; empty where it is unknown."""
    first = getattr(report.before, what)
    steps = [] if first is None else [("original", float(first))]
    for record in report.passes:
        value = record.get(f"{what}_after")
        if value is None:
            return []
        steps.append((str(record.get("spec", "")).partition("{")[0], float(value)))
    return steps


def _layer_shares(rows: Sequence[ParameterRow]) -> list[tuple[str, float]]:
    """Layers (what owns the parameters) in order, with the share of their elements that is left."""
    sizes: dict[str, tuple[int, int]] = {}
    for row in rows:
        layer = row.name.rpartition(".")[0] or row.name
        before, after = sizes.get(layer, (0, 0))
        left = 0 if row.after is None else math.prod(row.after)
        sizes[layer] = (before + math.prod(row.before), after + left)
    return [(name, after / before if before else 1.0) for name, (before, after) in sizes.items()]


def _spread(count: int) -> list[float]:
    """Offsets in ±0.2 that keep neighbouring samples apart; the same every time."""
    return [((index * 0.618034) % 1.0 - 0.5) * 0.4 for index in range(count)]
