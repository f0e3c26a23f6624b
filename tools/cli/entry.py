"""The command line as a whole: commands, errors and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from torchlathe._version import __version__
from torchlathe.tools.cli import (
    backends_command,
    bench_command,
    compile_command,
    diff_command,
    export_command,
    inspect_command,
    kernels_command,
    passes_command,
    plan_command,
    show_command,
)
from torchlathe.tools.cli.parsing import Parser, UsageError

__all__ = ["build_parser", "main"]

_EPILOG = """\
examples:
  torchlathe passes                          list the passes
  torchlathe passes structured-erase         explain one, with its options
  torchlathe inspect model.py:make           families, pins and cost of a model
  torchlathe compile model.py:make \\
      --passes "structured-erase{sparsity=0.5}" -o small.tl --report small.html
  torchlathe plan config.json --meta \\
      --passes "structured-erase{importance=random,scope=local}"
  torchlathe diff model.py:make small.tl     where the error starts and grows
  torchlathe bench model model.py:make small.tl small.tl@onnx
  torchlathe show small.tl                   what a saved model says about itself
  torchlathe export small.tl --like path/to/llama -o folder
  torchlathe backends                        list the backends
  torchlathe kernels check                   compile the kernels with no GPU

exit codes: 0 done, 1 a defect of torchlathe, 2 wrong usage or a model that cannot be compiled,
130 interrupted.
"""


def build_parser() -> Parser:
    """The parser of the whole command line."""
    common = Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=False, help="show the traceback of an error"
    )
    parser = Parser(
        prog="torchlathe",
        description="Turn a PyTorch model down to size, pass by pass.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"torchlathe {__version__}")
    # Here for the help, and to be allowed before the command: `main` looks for the word itself.
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in (
        compile_command,
        plan_command,
        inspect_command,
        passes_command,
        diff_command,
        bench_command,
        show_command,
        export_command,
        backends_command,
        kernels_command,
    ):
        command.add_parser(commands, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        parser = build_parser()
        parsed = parser.parse_args(words)
        if parsed.command is None:
            parser.print_help()
            return 0
        code: int = parsed.run(parsed)
        sys.stdout.flush()
    except SystemExit as stop:  # of --help and --version
        return int(stop.code or 0)
    except UsageError as error:
        return _failed(error, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _failed(error, debug)
    return code


def _failed(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    expected = isinstance(error, UsageError | OSError) or _is_torchlathe_error(error)
    if expected:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"error: {type(error).__name__}: {error}\n"
        "  next:  this is a defect in torchlathe or in a plugin; --debug shows the traceback",
        file=sys.stderr,
    )
    return 1


def _is_torchlathe_error(error: Exception) -> bool:
    # Whatever raises one has loaded the module, so that a usage error need not load torch.
    errors = sys.modules.get("torchlathe.ir.errors")
    return errors is not None and isinstance(error, errors.Error)
