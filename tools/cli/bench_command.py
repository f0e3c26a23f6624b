"""``torchlathe bench``: compare models and artefacts."""

from __future__ import annotations

import argparse
from typing import Any

from torchlathe.tools.cli.compile_command import MODELS, check_writable
from torchlathe.tools.cli.parsing import Parser, UsageError

__all__ = ["add_parser", "run_model"]

_EPILOG = f"""\
{MODELS}  model.onnx, model.xml  files of ONNX Runtime and OpenVINO
  model.pt2            also a package of AOTInductor
MODEL@BACKEND lowers the model first; a module without a backend runs as its own code.

examples:
  torchlathe bench model model.py:make small.tl small.tl@onnx
  torchlathe bench model model.py:make "model.py:make@inductor{{freezing=true}}" --plot speed.svg
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "bench",
        help="compare models and artefacts: latency, memory, size, fidelity",
        description="Compare models and artefacts.",
        epilog=_EPILOG,
    )
    parser.set_defaults(run=lambda parsed: parser.error("a subcommand is missing"), parser=parser)
    actions = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", dest="action")
    model: Parser = actions.add_parser(
        "model",
        parents=[common],
        help="compare models with the first of them",
        description="Compare models and artefacts with the first of them: percentiles of the "
        "latency, throughput, peak memory, size and fidelity.",
        epilog=_EPILOG,
    )
    model.add_argument("models", nargs="+", metavar="MODEL", help="what to compare; see below")
    model.add_argument(
        "--inputs", metavar="SPEC", help='inputs, as in "float32[8,3,224,224]"; by default A\'s'
    )
    model.add_argument(
        "--dynamic", action="store_true", help="lower what is lowered here with a dynamic batch"
    )
    model.add_argument("--threads", type=int, metavar="N", help="intra-op threads of each")
    model.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="for the rounds (default 10)"
    )
    model.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random")
    model.add_argument("--plot", metavar="FILE", help="draw it (.svg, .png or .pdf)")
    model.add_argument("--json", action="store_true", help="print JSON")
    model.add_argument("-o", "--output", metavar="FILE", help="write the JSON to a file too")
    model.set_defaults(run=run_model, parser=model, repeated="models")


def run_model(parsed: argparse.Namespace) -> int:
    """Measure and print; 2 if a model could not be measured."""
    for path in (parsed.plot, parsed.output):
        check_writable(path)
    if parsed.threads is not None and parsed.threads < 1:
        raise UsageError(f"--threads is {parsed.threads}, but must be at least 1")
    if parsed.seconds <= 0:
        raise UsageError(f"--seconds is {parsed.seconds:g}, but must be above 0")
    import torch

    from torchlathe.ir.files import write_text
    from torchlathe.tools.cli.progress import Progress
    from torchlathe.tools.model_bench import bench_models
    from torchlathe.tools.model_bench.picture import check_picture

    if parsed.plot:
        check_picture(parsed.plot)

    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    with Progress() as progress:
        found = bench_models(
            parsed.models,
            inputs=parsed.inputs,
            dynamic=parsed.dynamic,
            seconds=parsed.seconds,
            memory=not parsed.no_memory,
            seed=parsed.seed,
            progress=progress.say,
        )
    if parsed.plot:
        found.picture(parsed.plot)
    if parsed.output:
        write_text(parsed.output, found.to_json())
    if parsed.json:
        print(found.to_json(), end="")
    else:
        from torchlathe.tools.cli.console import output

        console = output()
        found.print(console)
        for name, path in (("plot", parsed.plot), ("results", parsed.output)):
            if path:
                console.print(f"wrote the {name} to {path}", markup=False, soft_wrap=True)
    return 2 if any(row.problem for row in found.rows) else 0
