"""``torchlathe plan``: what a pipeline would make of a model, without lowering or measuring."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.compile_command import (
    MODELS,
    add_meta_argument,
    add_model_arguments,
    check_writable,
    pipeline_text,
    write_report,
)
from torchlathe.tools.cli.parsing import Parser

if TYPE_CHECKING:
    from torchlathe.passes import Pass
    from torchlathe.tools.report import Report

__all__ = ["add_parser", "run"]

_EPILOG = f"""\
{MODELS}
With --meta, the model is made without values or memory for them; then nothing can rank units but
importance=random, and the plan says how many go, not which.

examples:
  torchlathe plan model.py:make --passes "structured-erase{{sparsity=0.5}}"
  torchlathe plan path/to/config.json --meta \\
      --passes "structured-erase{{sparsity=0.5,importance=random,scope=local,round-to=128}}"
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "plan",
        parents=[common],
        help="what a pipeline would make of a model",
        description="Say what a pipeline would make of a model: units of each family, parameters, "
        "bytes and FLOPs. Nothing is lowered, saved or measured.",
        epilog=_EPILOG,
    )
    add_model_arguments(parser)
    add_meta_argument(parser)
    parser.add_argument(
        "-p",
        "--passes",
        default="",
        metavar="PIPELINE",
        help='as in "structured-erase{sparsity=0.5},other-pass"; @FILE reads it from a file',
    )
    parser.add_argument("--report", metavar="FILE", help="write the plan as a page, or as .json")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Plan and report."""
    text = pipeline_text(parsed.passes)
    check_writable(parsed.report)
    # Before the model, which takes time to load: a misspelt option is found at once.
    from torchlathe.passes import load_plugin, parse_pipeline

    for plugin in parsed.plugin:
        load_plugin(plugin)
    report = _plan(parsed, parse_pipeline(text))
    if parsed.report:
        write_report(report, Path(parsed.report))
    if parsed.json:
        print(report.to_json(), end="")
        return 0
    from rich.text import Text

    from torchlathe.tools.cli.console import output

    console = output()
    report.print(console)
    if parsed.report:
        console.print(Text(f"wrote the plan to {parsed.report}"), soft_wrap=True)
    return 0


def _plan(parsed: argparse.Namespace, passes: list[Pass]) -> Report:
    from torchlathe._plan import plan
    from torchlathe.tools.cli.progress import Progress
    from torchlathe.tools.models import load_model

    with Progress() as progress:
        progress.say(f"loading {parsed.model}")
        named = load_model(
            parsed.model,
            inputs=parsed.inputs,
            dynamic=parsed.dynamic,
            seed=parsed.seed,
            meta=parsed.meta,
        )
        report = plan(
            named.model,
            passes,
            named.args,
            example_kwargs=named.kwargs,
            dynamic_shapes=named.dynamic_shapes,
            progress=progress.say,
            seed=parsed.seed,
        )
    return replace(report, notes=(*report.notes, *named.notes))
