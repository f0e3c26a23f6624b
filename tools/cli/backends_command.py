"""``torchlathe backends``: list the backends, or explain one."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from torchlathe.tools.cli.parsing import Parser

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  torchlathe backends
  torchlathe backends inductor
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "backends",
        parents=[common],
        help="list the backends, or explain one",
        description="List the backends and what they can do; with a name, explain that one.",
        epilog=_EPILOG,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the backend to explain")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the backends, or one of them."""
    from torchlathe.backends import backend_names, get_backend

    names = backend_names() if parsed.name is None else [parsed.name]
    rows = [_described(get_backend(name)) for name in names]
    if parsed.json:
        print(json.dumps(rows if parsed.name is None else rows[0], indent=2))
        return 0
    from torchlathe.tools.cli.console import output

    console = output()
    if parsed.name is None:
        console.print(_table(rows))
    else:
        for part in _explained(rows[0]):
            console.print(part, markup=False)
    return 0


def _described(backend: Any) -> dict[str, Any]:
    from torchlathe.backends import capabilities_of
    from torchlathe.backends.needs import missing_packages
    from torchlathe.ir.text.options import options_of

    able = capabilities_of(backend)
    cls: type = type(backend)
    text = inspect.getdoc(cls) or ""
    options = [
        {"name": o.key, "type": o.type_text, "default": o.default_text} for o in options_of(cls)
    ]
    return {
        "name": backend.name,
        "summary": text.partition("\n")[0].replace("`", ""),
        "text": text,
        "options": options,
        "training": able.training,
        "dynamic_shapes": able.dynamic_shapes,
        "devices": list(able.devices) if able.devices else None,
        "dtypes": [str(d).removeprefix("torch.") for d in able.dtypes] if able.dtypes else None,
        "checked": able.checked,
        "missing": missing_packages(backend),
        "extra": able.extra,
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.markup import escape

    from torchlathe.tools.report_text import new_table

    table = new_table("backend", "*what it does", "trains", "dtypes", "devices", "here")
    for row in rows:
        table.add_row(
            row["name"],
            escape(row["summary"]),
            "yes" if row["training"] else "no",
            ", ".join(row["dtypes"]) if row["dtypes"] else "all",
            ", ".join(row["devices"]) if row["devices"] else "all",
            f"needs {', '.join(row['missing'])}" if row["missing"] else "yes",
        )
    return table


def _explained(row: dict[str, Any]) -> Any:
    from torchlathe.tools.report_text import new_table

    yield f"{row['name']}\n"
    yield row["text"]
    if row["options"]:
        table = new_table("option", "*type", "default")
        for option in row["options"]:
            table.add_row(option["name"], option["type"], option["default"])
        yield ""
        yield table
    if row["missing"]:
        how = f'; pip install "torchlathe[{row["extra"]}]"' if row["extra"] else ""
        yield f"\nneeds {', '.join(row['missing'])}, which is not installed{how}"
