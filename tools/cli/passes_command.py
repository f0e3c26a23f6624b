"""``torchlathe passes``: list the passes, or explain one."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.parsing import Parser

if TYPE_CHECKING:
    from torchlathe.passes.base import Pass

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  torchlathe passes
  torchlathe passes structured-erase
  torchlathe passes --plugin my_passes.py my-pass
  torchlathe passes --json
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "passes",
        parents=[common],
        help="list the passes, or explain one",
        description="List the passes; with a name, explain that one and its options.",
        epilog=_EPILOG,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the pass to explain")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="take passes from this Python file too",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the passes, or one of them."""
    from torchlathe.passes import load_plugin
    from torchlathe.passes.registry import all_passes, get_pass

    for plugin in parsed.plugin:
        load_plugin(plugin)
    if parsed.name is None:
        found = all_passes()
        if parsed.json:
            print(json.dumps([_as_dict(cls) for cls in found.values()], indent=2))
        else:
            _print_list(found)
        return 0
    cls = get_pass(parsed.name)
    if parsed.json:
        print(json.dumps(_as_dict(cls), indent=2))
    else:
        _explain(cls)
    return 0


def _print_list(found: dict[str, type[Pass]]) -> None:
    from torchlathe.tools.cli.console import output
    from torchlathe.tools.report_text import new_table

    table = new_table("pass", "kind", "*what it does")
    for name, cls in sorted(found.items(), key=lambda item: (_kind(item[1]), item[0])):
        table.add_row(name, _kind(cls), _summary(cls))
    console = output()
    console.print(table)
    console.print("\n`torchlathe passes NAME` explains one.", style="dim")


def _explain(cls: type[Pass]) -> None:
    from rich.text import Text

    from torchlathe.passes.options import options_of
    from torchlathe.passes.registry import plugin_of
    from torchlathe.tools.cli.console import output
    from torchlathe.tools.report_text import new_table, section

    console = output()
    console.print(Text.assemble((cls.name, "bold"), f" · {_kind(cls)}"))
    console.print()
    # The options are in the table below, where they have their types and defaults.
    console.print(Text(_without_attributes(inspect.getdoc(cls) or "")))
    options = options_of(cls)
    if options:
        table = new_table("option", "type", "default", "*meaning")
        for option in options:
            default = "required" if option.required else option.default_text
            meaning = option.help or _attribute_texts(cls).get(option.name, "")
            table.add_row(option.key, option.type_text, default, meaning)
        console.print(section("Options", table))
    for title, names in _promises(cls).items():
        console.print(Text.assemble((f"\n{title}: ", "dim"), ", ".join(names)), end="")
    if origin := plugin_of(cls):
        console.print(Text(f"\nfrom {origin}", style="dim"), end="")
    console.print()


def _as_dict(cls: type[Pass]) -> dict[str, Any]:
    from torchlathe.passes.options import options_of

    return {
        "name": cls.name,
        "kind": _kind(cls),
        "summary": _summary(cls),
        "options": [
            {
                "name": option.key,
                "type": option.type_text,
                "default": None if option.required else option.default_text,
                "required": option.required,
                "help": option.help or _attribute_texts(cls).get(option.name, ""),
            }
            for option in options_of(cls)
        ],
    }


def _kind(cls: type[Pass]) -> str:
    from torchlathe.passes.base import AnalysisPass, RewritePass, TunePass

    if issubclass(cls, AnalysisPass):
        return "analysis"
    if issubclass(cls, TunePass):
        return "tune"
    if issubclass(cls, RewritePass):
        return f"rewrite, {cls.exactness.value}"
    return "pass"


def _summary(cls: type[Pass]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def _promises(cls: type[Pass]) -> dict[str, list[str]]:
    """What a rewrite says of itself to the manager, as far as it says anything."""
    found = {}
    for title in ("requires", "preserves", "needs", "provides", "breaks"):
        names = sorted(getattr(item, "name", item.__name__) for item in getattr(cls, title, ()))
        if names:
            found[title] = names
    return found


_SECTION = "Attributes:"


def _without_attributes(text: str) -> str:
    head, section, tail = text.partition(_SECTION)
    if not section:
        return text
    lines = tail.splitlines()[1:]
    rest = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), None)
    return (head + ("\n".join(lines[rest:]) if rest is not None else "")).rstrip()


def _attribute_texts(cls: type[Pass]) -> dict[str, str]:
    """What the docstring says of each attribute, for options without a help text."""
    tail = (inspect.getdoc(cls) or "").partition(_SECTION)[2]
    found: dict[str, str] = {}
    name = ""
    for line in tail.splitlines()[1:]:
        if line and not line.startswith(" "):
            break
        if line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found
