"""``torchlathe kernels``: check the fused kernels without a GPU, or tune and time them on one."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.kernels_timing import add_bench, add_tune
from torchlathe.tools.cli.parsing import Parser, UsageError, nearest

if TYPE_CHECKING:
    from torchlathe.kernels.aot.matrix import Row

__all__ = ["add_parser", "run_check"]

_EPILOG = """\
examples:
  torchlathe kernels check                       compile for every architecture, hold to limits
  torchlathe kernels check --arch sm_90 --json   the same for one, as JSON
  torchlathe kernels check --op w4a16
  torchlathe kernels tune                        time tiles on this GPU, keep the fastest
  torchlathe kernels bench -o results.json       time the ops against cuBLAS

`check` needs Triton but no GPU. It exits with 1 if a limit is broken.
"""

_ARCHITECTURES = ("sm_80", "sm_90", "gfx942")


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "kernels",
        help="check, tune or time the fused kernels",
        description="Check the fused kernels without a GPU, or tune and time them on one.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=lambda parsed: parser.error("a subcommand is missing"), parser=parser)
    actions = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", dest="action")
    _add_check(actions, common)
    add_tune(actions, common)
    add_bench(actions, common)


def _add_check(actions: Any, common: Parser) -> None:
    parser: Parser = actions.add_parser(
        "check",
        parents=[common],
        help="compile the kernels ahead of time, and hold them to their limits",
        description="Compile the kernels ahead of time, with no GPU, and hold their registers, "
        "stack, shared memory, instructions per weight, matrix instructions and loads to limits.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=_ARCHITECTURES,
        help="compile for this architecture; may be repeated (default: all)",
    )
    parser.add_argument("--op", action="append", metavar="OP", help="check this op only")
    parser.add_argument(
        "--candidates",
        action="store_true",
        help="check every tile that `tune` would time, too (some minutes)",
    )
    parser.add_argument(
        "--triton", metavar="FOLDER", help="take Triton from this folder (pip install --target)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the JSON to a file too")
    parser.set_defaults(run=run_check, parser=parser)


def run_check(parsed: argparse.Namespace) -> int:
    """Compile, print the facts, and say whether all limits hold."""
    from torchlathe.kernels.aot.candidates import candidate_cases
    from torchlathe.kernels.aot.finding import use_triton
    from torchlathe.kernels.aot.matrix import CONTROL, OPS, all_cases, check_cases

    for op in parsed.op or ():
        if op not in OPS:
            raise UsageError(
                f"unknown op {op!r}", nearest(op, OPS) or f"known are {', '.join(OPS)}"
            )
    version = use_triton(parsed.triton)
    chosen = [name for name in _ARCHITECTURES if name in (parsed.arch or _ARCHITECTURES)]
    rows = check_cases(list(all_cases(parsed.op or OPS)), chosen)
    control = check_cases(list(all_cases([CONTROL])), ["sm_90"])
    tried = list(candidate_cases(parsed.op)) if parsed.candidates else []
    candidates = check_cases(tried, chosen)
    result = {
        "triton": version,
        "rows": [row.as_dict() for row in rows],
        "control": [row.as_dict() for row in control],
    }
    if parsed.candidates:
        result["candidates"] = [row.as_dict() for row in candidates]
        rows = [*rows, *candidates]
    if parsed.output:
        from torchlathe.ir.files import write_text

        write_text(parsed.output, json.dumps(result, indent=1) + "\n")
    if parsed.json:
        print(json.dumps(result, indent=1))
    else:
        _print(version, rows, control)
    return int(any(row.problems for row in rows) or not all(row.problems for row in control))


def _print(version: str, rows: list[Row], control: list[Row]) -> None:
    from rich.text import Text

    from torchlathe.tools.cli.console import output
    from torchlathe.tools.report_text import new_table

    table = new_table(
        "op", "arch", "*config", "registers", "shared", "slots", "mma", "load", "verdict"
    )
    for row in (*rows, *control):
        slots = "-" if row.slots_per_weight is None else f"{row.slots_per_weight:.2f}"
        verdict = "ok" if not row.problems else "FAILS"
        numbers = (str(row.registers), str(row.shared), slots)
        table.add_row(row.op, row.arch, row.config, *numbers, row.mma, str(row.load_bytes), verdict)
    console = output()
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(Text(f"{row.op} {row.arch} {row.config}: {problem}", style="red"))
    failed = sum(bool(row.problems) for row in rows)
    console.print(
        f"\nTriton {version}: {len(rows) - failed} of {len(rows)} keep their limits; the control "
        + ("fails, as it must." if all(row.problems for row in control) else "PASSES: no check.")
    )
