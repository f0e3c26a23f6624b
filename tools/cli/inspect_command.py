"""``torchlathe inspect``: what a model consists of, without changing it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
    from torchlathe.passes import Explanation, HessianSensitivity
    from torchlathe.tools.cli.progress import Progress
    from torchlathe.tools.inspecting import Inspection
    from torchlathe.tools.models import NamedModel
    from torchlathe.tools.sensitivity_table import SensitivityRow

__all__ = ["add_parser", "run"]

_PICTURES = (".svg", ".png", ".pdf", ".dot")

_EPILOG = f"""\
{MODELS}
Without --families, --pins, --cost, --segments, --sensitivity, --text or --why, the first three are
shown.

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
  torchlathe inspect model.py:make --sensitivity samples=64 --calibration data.npz --loss mse
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
        "--sensitivity",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="what the curvature of the loss says of each layer; with options of the pass "
        "hessian-sensitivity, as samples=64,eigenvalues=true",
    )
    parser.add_argument("--calibration", metavar="DATA", help="batches, as for compile")
    parser.add_argument("--calibration-batch", type=int, metavar="N", help="rows in a batch")
    parser.add_argument("--loss", metavar="LOSS", help="as for compile")
    parser.add_argument(
        "--sensitivity-picture", metavar="FILE", help="draw the sensitivity (.svg, .png, .pdf)"
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
    analysis = _checked_sensitivity(parsed)
    program, inspection, rows = _inspect(parsed, analysis)
    why = _explanations(parsed, program)
    if parsed.graph:
        _draw(parsed, inspection, why)
    if parsed.json:
        data = _as_dict(parsed, program, inspection, why)
        if rows is not None:
            data["sensitivity"] = [asdict(row) for row in rows]
        print(json.dumps(data, indent=2))
        return 0
    _print(parsed, program, inspection, why)
    if rows is not None:
        _print_sensitivity(parsed, rows)
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


def _checked_sensitivity(parsed: argparse.Namespace) -> HessianSensitivity | None:
    """The analysis that was asked for, after a look at its options and at the data."""
    if parsed.sensitivity is None:
        for name in ("calibration", "calibration_batch", "loss", "sensitivity_picture"):
            if getattr(parsed, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} needs --sensitivity")
        return None
    from torchlathe.passes import HessianSensitivity, parse_pipeline
    from torchlathe.tools.calibration import check_calibration

    if parsed.calibration is None:
        raise UsageError("--sensitivity needs --calibration, the batches of the loss")
    check_calibration(parsed.calibration)
    (analysis,) = parse_pipeline(f"{HessianSensitivity.name}{{{parsed.sensitivity}}}")
    assert isinstance(analysis, HessianSensitivity)
    return analysis


def _sensitivity_rows(
    parsed: argparse.Namespace,
    analysis: HessianSensitivity,
    program: Program,
    named: NamedModel,
    progress: Progress,
) -> tuple[SensitivityRow, ...]:
    from torchlathe.tools.calibration import load_calibration, load_loss
    from torchlathe.tools.sensitivity_table import save_sensitivity_picture, sensitivity_rows

    found = analysis.on(
        program,
        calibration=load_calibration(parsed.calibration, named, parsed.calibration_batch),
        loss=None if parsed.loss is None else load_loss(parsed.loss),
        seed=parsed.seed,
        progress=progress.say,
    )
    rows = sensitivity_rows(found)
    if parsed.sensitivity_picture:
        save_sensitivity_picture(rows, parsed.sensitivity_picture)
    return rows


def _print_sensitivity(parsed: argparse.Namespace, rows: Sequence[SensitivityRow]) -> None:
    from rich.text import Text

    from torchlathe.tools.cli.console import output
    from torchlathe.tools.sensitivity_table import sensitivity_table

    console = output()
    console.print(sensitivity_table(rows, limit=None if parsed.all else parsed.limit))
    if parsed.sensitivity_picture:
        text = f"wrote the picture to {parsed.sensitivity_picture}"
        console.print(Text(text), soft_wrap=True)


def _inspect(
    parsed: argparse.Namespace, analysis: HessianSensitivity | None
) -> tuple[Program, Inspection, tuple[SensitivityRow, ...] | None]:
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
        inspection = inspect_program(program, notes=named.notes)
        if analysis is None:
            return program, inspection, None
        rows = _sensitivity_rows(parsed, analysis, program, named, progress)
        return program, inspection, rows


def _sections(parsed: argparse.Namespace) -> set[str]:
    sections = ("families", "pins", "cost", "segments", "text")
    wanted = {name for name in sections if getattr(parsed, name)}
    if wanted or parsed.graph or parsed.why or parsed.sensitivity is not None:
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
    if not wanted and not why and parsed.sensitivity is None:
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
    if wanted - {"text"} or parsed.graph or why or parsed.sensitivity is not None:
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
