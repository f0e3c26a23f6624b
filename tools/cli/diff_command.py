"""``torchlathe diff``: two programs side by side on the same inputs."""

from __future__ import annotations

import argparse
from typing import Any

from torchlathe.tools.cli.compile_command import MODELS, check_writable
from torchlathe.tools.cli.parsing import Parser, UsageError

__all__ = ["add_parser", "run"]

_EPILOG = f"""\
A and B: {MODELS}
examples:
  torchlathe diff model.py:make small.tl
  torchlathe diff before.tl after.tl --picture error.svg --all
  torchlathe diff model.py:make small.tl --float64 --threshold 1e-9
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "diff",
        parents=[common],
        help="run two programs side by side, and show where the error starts and grows",
        description="Run two programs on the same inputs, align their values by provenance, and "
        "show where the error starts and grows.",
        epilog=_EPILOG,
    )
    parser.add_argument("first", metavar="A", help="the model that is right; see below")
    parser.add_argument("second", metavar="B", help="the model to compare with it")
    parser.add_argument(
        "--inputs",
        metavar="SPEC",
        help='inputs, as in "float32[2,3,224,224]"; by default those that A came with',
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="relative error above which a value counts as different (default 1e-4)",
    )
    parser.add_argument(
        "--float64", action="store_true", help="compute in float64, which leaves rounding out"
    )
    parser.add_argument("--all", action="store_true", help="show every value")
    parser.add_argument("--picture", metavar="FILE", help="draw the error (.svg, .png or .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--fail", action="store_true", help="exit with 1 if an output differs by more than that"
    )
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Compare and print."""
    check_writable(parsed.picture)
    if parsed.threshold is not None and not parsed.threshold >= 0:
        raise UsageError(f"--threshold is {parsed.threshold}, but must not be negative")
    import torch

    from torchlathe.tools.diff import diff
    from torchlathe.tools.diff.comparing import THRESHOLD
    from torchlathe.tools.input_specs import parse_inputs
    from torchlathe.tools.models import load_model

    first = load_model(parsed.first, seed=parsed.seed).capture()
    second = load_model(parsed.second, seed=parsed.seed).capture()
    inputs = None
    if parsed.inputs is not None:
        given = parse_inputs(parsed.inputs, seed=parsed.seed)
        inputs = (given.args, given.kwargs)
    found = diff(
        first,
        second,
        inputs,
        threshold=THRESHOLD if parsed.threshold is None else parsed.threshold,
        dtype=torch.float64 if parsed.float64 else None,
        names=(parsed.first, parsed.second),
    )
    if parsed.picture:
        found.picture(parsed.picture)
    if parsed.json:
        print(found.to_json(), end="")
    else:
        from torchlathe.tools.cli.console import output

        console = output()
        found.print(console, rows=None if parsed.all else 12)
        if parsed.picture:
            console.print(f"wrote the picture to {parsed.picture}", markup=False, soft_wrap=True)
    return int(parsed.fail and not found.equal)
