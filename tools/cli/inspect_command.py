"""``torchlathe inspect``: what a model consists of, without changing it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.compile_command import (
    MODELS,
    add_meta_argument,
    add_model_arguments,
)
from torchlathe.tools.cli.parsing import Parser, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchlathe.ir import Program
    from torchlathe.passes import Explanation
    from torchlathe.tools.inspecting import Inspection

__all__ = ["add_parser", "run"]

_PICTURES = (".svg", ".png", ".pdf", ".dot")

_EPILOG = f"""\
{MODELS}
Without --families, --pins, --cost, --segments, --text or --why, the first three are shown.

--why takes the name of a parameter (encoder.0.weight), of an axis of it (encoder.0.weight:0), of an
index (encoder.0.weight:0[17]), of a family, a module, a node of --text, or an op
(aten.linear.default). It says what goes together with it and by which ops, what erasing it takes,
and what pins it.

examples:
  torchlathe inspect model.py:make
  torchlathe inspect my_package.nets:vit --inputs "float32[batch=2,3,224,224]" --pins
  torchlathe inspect path/to/config.json --families --all --json
  torchlathe inspect model.tl --text
  torchlathe inspect model.py:make --why "1.up.weight:0[17]"
  torchlathe inspect model.py:make --graph families.svg
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="families, pins and cost of a model",
        description="Show what of a model can be erased, what cannot and why, and what it costs.",
        epilog=_EPILOG,
    )
    add_model_arguments(parser)
    add_meta_argument(parser)
    parser.add_argument("--families", action="store_true", help="what can go, and what with it")
    parser.add_argument("--pins", action="store_true", help="what cannot go, why, and where")
    parser.add_argument("--cost", action="store_true", help="parameters, bytes and FLOPs")
    parser.add_argument(
        "--segments", action="store_true", help="branches that erase-operators can take out"
    )
    parser.add_argument(
        "--why",
        metavar="NAME",
        action="append",
        default=[],
        help="what goes together with this, by which ops, and what pins it; can be repeated",
    )
    parser.add_argument("--text", action="store_true", help="the program, as text")
    parser.add_argument(
        "--terms", action="store_true", help="with --text: the term of every axis too"
    )
    parser.add_argument(
        "--graph",
        metavar="FILE",
        help=f"draw the families ({', '.join(_PICTURES)}); with --why, those of NAME",
    )
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="rows of each table (default 20)"
    )
    parser.add_argument("--all", action="store_true", help="all rows of each table")
    parser.add_argument("--json", action="store_true", help="print JSON, with all rows")
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Capture the model and show what was asked for."""
    if parsed.graph and Path(parsed.graph).suffix not in _PICTURES:
        raise UsageError(
            f"cannot draw into {parsed.graph}", f"give a name that ends in {', '.join(_PICTURES)}"
        )
    if parsed.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {parsed.limit}")
    program, inspection = _inspect(parsed)
    why = _explanations(parsed, program)
    if parsed.graph:
        _draw(parsed, inspection, why)
    if parsed.json:
        print(json.dumps(_as_dict(parsed, program, inspection, why), indent=2))
        return 0
    _print(parsed, program, inspection, why)
    return 0


def _explanations(parsed: argparse.Namespace, program: Program) -> list[Explanation]:
    from torchlathe.passes import explain

    return [explain(program, name) for name in parsed.why]


def _draw(parsed: argparse.Namespace, inspection: Inspection, why: Sequence[Explanation]) -> None:
    from torchlathe.tools.graph_picture import save_picture

    only = {part.name for explanation in why for part in explanation.families}
    save_picture(
        inspection.result,
        Path(parsed.graph),
        limit=None if parsed.all else 40,
        only=only if why else None,
    )


def _inspect(parsed: argparse.Namespace) -> tuple[Program, Inspection]:
    from torchlathe.passes import load_plugin
    from torchlathe.tools.cli.progress import Progress
    from torchlathe.tools.inspecting import inspect_program
    from torchlathe.tools.models import load_model

    for plugin in parsed.plugin:
        load_plugin(plugin)
    with Progress() as progress:
        progress.say(f"loading {parsed.model}")
        named = load_model(
            parsed.model,
            inputs=parsed.inputs,
            dynamic=parsed.dynamic,
            seed=parsed.seed,
            meta=parsed.meta,
        )
        progress.say("capturing")
        program = named.capture()
        progress.say("analysing")
        return program, inspect_program(program, notes=named.notes)


def _sections(parsed: argparse.Namespace) -> set[str]:
    sections = ("families", "pins", "cost", "segments", "text")
    wanted = {name for name in sections if getattr(parsed, name)}
    if wanted or parsed.graph or parsed.why:
        return wanted
    return {"families", "pins", "cost"}


def _as_dict(
    parsed: argparse.Namespace,
    program: Program,
    inspection: Inspection,
    why: Sequence[Explanation],
) -> dict[str, Any]:
    data = inspection.to_dict()
    wanted = _sections(parsed)
    if not wanted and not why:
        wanted = {"families", "pins", "cost"}
    chosen = {key: value for key, value in data.items() if key not in {"families", "pins", "cost"}}
    chosen |= {key: data[key] for key in ("families", "pins", "cost") if key in wanted}
    if "text" in wanted:
        chosen["text"] = program.to_text(axis_terms=parsed.terms)
    if "segments" in wanted:
        from torchlathe.tools.segment_table import segment_dicts, segment_rows

        chosen["segments"] = segment_dicts(segment_rows(program))
    if why:
        chosen["why"] = [explanation.to_dict() for explanation in why]
    return chosen


def _print(
    parsed: argparse.Namespace,
    program: Program,
    inspection: Inspection,
    why: Sequence[Explanation],
) -> None:
    from rich.text import Text

    from torchlathe.tools.cli.console import output

    console = output()
    wanted = _sections(parsed)
    if wanted - {"text"} or parsed.graph or why:
        for part in _summary(inspection):
            console.print(part)
    for part in _tables(wanted, inspection, None if parsed.all else parsed.limit):
        console.print(part)
    if "segments" in wanted:
        from torchlathe.tools.segment_table import segment_rows, segment_table

        rows = segment_rows(program)
        console.print(segment_table(rows, limit=None if parsed.all else parsed.limit))
    for explanation in why:
        console.print()
        console.print(explanation.rich(None if parsed.all else parsed.limit), soft_wrap=True)
    if "text" in wanted:
        # Not through rich: it would fold lines, and the text may be kept in a file.
        print(program.to_text(axis_terms=parsed.terms), end="")
    if parsed.graph:
        console.print(Text(f"wrote the picture to {parsed.graph}"), soft_wrap=True)


def _summary(inspection: Inspection) -> Iterator[RenderableType]:
    from rich.text import Text

    from torchlathe.tools.figures import bytes_text, count_text, flops_text, share_text

    totals = inspection.totals
    yield Text.assemble(
        (inspection.model, "bold"),
        f" · {totals.nodes} operations · {count_text(totals.parameters)} parameters · "
        f"{bytes_text(totals.bytes)} · {flops_text(totals.flops)}",
    )
    for title, lines in (("inputs", inspection.inputs), ("outputs", inspection.outputs)):
        yield Text(f"{title}: {'; '.join(lines)}", style="dim")
    yield Text(
        f"{share_text(inspection.free_share)} of the parameters are in families that can shrink",
        style="dim",
    )
    for note in inspection.notes:
        yield Text(f"note: {note}", style="dim")


def _tables(
    wanted: set[str], inspection: Inspection, limit: int | None
) -> Iterator[RenderableType]:
    from torchlathe.tools.report_text import cost_tables, family_table, pin_table

    if "families" in wanted:
        yield family_table(inspection.families, limit=limit, with_kept=False)
    if "pins" in wanted and inspection.pins:
        yield pin_table(inspection.pins, limit=limit)
    if "cost" in wanted:
        yield from cost_tables(inspection.cost, limit=limit)
