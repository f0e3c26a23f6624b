"""A picture of families: which tensors each one writes and reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.ir.files import atomic, write_text
from torchlathe.tools.figures import shorten

if TYPE_CHECKING:
    import networkx

__all__ = ["dot_text", "save_picture"]

_COLOURS = {
    "exact": "#1a7f4b",
    "exact-after-correction": "#1f6feb",
    "exact-after-fold": "#1f6feb",
    "approximate": "#c2740a",
    "pinned": "#9aa3af",
}
_TENSOR, _INK, _MUTED = "#5b6573", "#1a1f26", "#626b78"
_MOST_ROWS = 1200  # matplotlib takes long for more, and nobody reads them


def save_picture(
    families: Any, path: Path, *, limit: int | None = 40, only: Collection[str] | None = None
) -> None:
    """Draw families and their tensors, in two columns.

    Args:
        families: Anything with ``to_networkx()``: a bipartite graph with ``kind`` on its nodes,
            ``extent``, ``exactness`` and ``pinned`` on families, ``axis`` and ``role`` on edges.
        path: Ends in ``.dot`` for Graphviz text, else in what matplotlib can write.
        limit: At most so many families, those that can shrink first; None draws all.
        only: Names of the families to draw; None for those of the whole model.
    """
    graph = families.to_networkx()
    chosen = _chosen(graph, limit, only)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".dot":
        write_text(path, dot_text(graph, chosen))
        return
    with atomic(path) as draft:
        _draw(graph, chosen, draft)


def dot_text(graph: networkx.Graph[str], chosen: Sequence[str]) -> str:
    """The families ``chosen`` of a graph, in Graphviz' language."""
    lines = ["graph families {", "  rankdir=LR;", '  node [fontname="sans-serif", fontsize=10];']
    for family in chosen:
        data = graph.nodes[family]
        label = _quoted(f"{family}\n{data['extent']} units, {_state(data)}")
        lines.append(f'  {_quoted(family)} [shape=box, color="{_colour(data)}", label={label}];')
    lines += [
        f"  {_quoted('tensor ' + tensor)} [shape=ellipse, label={_quoted(tensor)}];"
        for tensor in _tensors(graph, chosen)
    ]
    for family in chosen:
        for tensor in graph.neighbors(family):
            edge = graph.edges[family, tensor]
            style = "solid" if edge["role"] == "writes" else "dashed"
            lines.append(
                f"  {_quoted(family)} -- {_quoted('tensor ' + tensor)} "
                f'[style={style}, label="{edge["axis"]}"];'
            )
    return "\n".join([*lines, "}"]) + "\n"


def _chosen(
    graph: networkx.Graph[str], limit: int | None, only: Collection[str] | None = None
) -> list[str]:
    """Names of the families to draw, in their own order."""
    families = [name for name, data in graph.nodes(data=True) if data["kind"] == "family"]
    if only is not None:
        families = [name for name in families if name in only]
    if limit is None or len(families) <= limit:
        return families
    first = sorted(families, key=lambda name: bool(graph.nodes[name]["pinned"]))[:limit]
    kept = set(first)
    return [name for name in families if name in kept]


def _tensors(graph: networkx.Graph[str], chosen: Sequence[str]) -> list[str]:
    """Tensors of these families, each near its families, so that few edges cross."""
    places: dict[str, list[int]] = {}
    for place, family in enumerate(chosen):
        for tensor in graph.neighbors(family):
            places.setdefault(tensor, []).append(place)
    return sorted(places, key=lambda name: sum(places[name]) / len(places[name]))


def _draw(graph: networkx.Graph[str], chosen: Sequence[str], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    tensors = _tensors(graph, chosen)
    rows = max(len(chosen), len(tensors), 4)
    with matplotlib.rc_context({"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "0"}):
        figure = Figure(figsize=(11.0, 0.9 + 0.2 * min(rows, _MOST_ROWS)), layout="constrained")
        axis = figure.subplots()
        left = {name: _spaced(i, len(chosen), rows) for i, name in enumerate(chosen)}
        right = {name: _spaced(i, len(tensors), rows) for i, name in enumerate(tensors)}
        for family in chosen:
            colour = _colour(graph.nodes[family])
            for tensor in graph.neighbors(family):
                writes = graph.edges[family, tensor]["role"] == "writes"
                axis.plot(
                    [0, 1],
                    [left[family], right[tensor]],
                    color=colour,
                    linewidth=1.0 if writes else 0.7,
                    linestyle="-" if writes else (0, (3, 3)),
                    alpha=0.75,
                )
            axis.plot(0, left[family], "s", color=colour, markersize=5)
            text = f"{shorten(family, 58)}  ×{graph.nodes[family]['extent']}"
            axis.text(-0.02, left[family], text, ha="right", va="center", color=_INK)
        for tensor in tensors:
            axis.plot(1, right[tensor], "o", color=_TENSOR, markersize=4)
            axis.text(1.02, right[tensor], shorten(tensor, 58), va="center", color=_INK)
        axis.set_xlim(-0.95, 1.85)
        axis.set_ylim(rows - 0.4, -0.6)
        axis.axis("off")
        _legend(axis, graph, chosen)
        figure.savefig(path, dpi=130)


def _legend(axis: Any, graph: networkx.Graph[str], chosen: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    states = {_state(graph.nodes[family]): _colour(graph.nodes[family]) for family in chosen}
    handles = [
        Line2D([], [], color=colour, marker="s", linestyle="", label=state.replace("-", " "))
        for state, colour in states.items()
    ]
    handles.append(Line2D([], [], color=_MUTED, label="writes"))
    handles.append(Line2D([], [], color=_MUTED, linestyle=(0, (3, 3)), label="reads"))
    total = len(_chosen(graph, None))
    more = f", {len(chosen)} of {total}" if len(chosen) < total else ""
    axis.set_title(f"Families (left{more}) and the tensors that they go through", color=_INK)
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=6, frameon=False
    )


def _spaced(index: int, count: int, rows: int) -> float:
    """Place of one of ``count`` labels when they are spread over all rows."""
    return (index + 0.5) * rows / count - 0.5


def _state(data: Mapping[str, Any]) -> str:
    return "pinned" if data["pinned"] else str(data["exactness"])


def _colour(data: Mapping[str, Any]) -> str:
    return _COLOURS.get(_state(data), _MUTED)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
