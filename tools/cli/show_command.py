"""``torchlathe show``: what a saved model says about itself."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.parsing import Parser

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  torchlathe show small.tl            manifest, pipeline and report of the saved model
  torchlathe show small.tl --json     the manifest as it is in the file
  torchlathe show small.tl --check    also read every member, and hold it against its hash
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "show",
        parents=[common],
        help="what a saved model says about itself",
        description="Show the manifest and the report of a saved model, without loading weights.",
        epilog=_EPILOG,
    )
    parser.add_argument("path", metavar="FILE", help="a model that torchlathe saved (.tl)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.add_argument(
        "--check", action="store_true", help="read every member, and hold it against its hash"
    )
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the manifest and the report."""
    from torchlathe.backends import manifest
    from torchlathe.backends.artifact import check, saved_report

    found = manifest(parsed.path)
    if parsed.check:
        check(parsed.path)
    if parsed.json:
        print(json.dumps(found, indent=2))
        return 0
    from torchlathe.tools.cli.console import output
    from torchlathe.tools.report import Report

    console = output()
    console.print(_table(parsed.path, found))
    console.print(_members(found, checked=parsed.check))
    report = saved_report(parsed.path)
    if report is not None:
        console.print()
        Report.from_dict(report.to_dict()).print(console)
    return 0


def _table(path: str, found: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rows = {
        "file": path,
        "model": found.get("model", ""),
        "pipeline": found.get("pipeline") or "no passes",
        "parameters": f"{found.get('parameters', 0):,}",
        "written by": ", ".join(
            f"{name} {found.get(name, '?')}" for name in ("torchlathe", "torch", "python")
        ),
        "format": f"{found.get('format', '')} {found.get('format_version', '')}",
    }
    for name, value in rows.items():
        table.add_row(Text(name, style="dim"), Text(str(value)))
    return table


def _members(found: Mapping[str, Any], *, checked: bool) -> Any:
    from torchlathe.tools.figures import bytes_text
    from torchlathe.tools.report_text import new_table, section

    table = new_table("member", ">size", "sha256")
    for name, entry in sorted(found["members"].items()):
        table.add_row(name, bytes_text(entry["size"]), str(entry["sha256"]))
    return section("Members", table, "read, and equal to their hashes" if checked else None)
