"""``torchlathe compile``: run a pipeline on a model, and keep what comes out."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.parsing import Parser, UsageError

if TYPE_CHECKING:
    from torchlathe.backends import CompiledModel
    from torchlathe.passes import Instrument, Pass
    from torchlathe.passes.statistics import Calibration
    from torchlathe.tools.calibration import Loss
    from torchlathe.tools.models import NamedModel
    from torchlathe.tools.report import Report

__all__ = [
    "add_data_arguments",
    "add_meta_argument",
    "add_model_arguments",
    "add_parser",
    "check_writable",
    "pipeline_text",
    "run",
    "write_report",
]

MODELS = """\
MODEL is one of
  package.module:function, path/to/file.py:function   the function returns a module, or
                       (module, example_inputs), or (module, args, kwargs)
  model.pt2            saved by torch.export.save
  model.tl             saved by torchlathe
  folder, config.json  of transformers; without weights they are random
"""

_EPILOG = f"""\
{MODELS}
examples:
  torchlathe compile model.py:make --passes "structured-erase{{sparsity=0.5}}" -o small.tl
  torchlathe compile my_package.nets:resnet --inputs "float32[batch=2,3,224,224]" \\
      --passes "structured-erase{{sparsity=0.3,round-to=8}}" --report small.html
  torchlathe compile path/to/bert --passes @pipeline.txt --backend inductor --json
  torchlathe compile model.py:make --passes "structured-erase{{importance=taylor}}" \\
      --calibration data.safetensors --loss cross-entropy
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "compile",
        parents=[common],
        help="run a pipeline on a model, and keep what comes out",
        description="Run a pipeline of passes on a model, report what that did, and save it.",
        epilog=_EPILOG,
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument(
        "-p",
        "--passes",
        default="",
        metavar="PIPELINE",
        help='as in "structured-erase{sparsity=0.5},other-pass"; @FILE reads it from a file',
    )
    parser.add_argument(
        "--backend",
        default="eager",
        metavar="NAME",
        help="eager (default), inductor, module, checkpoint, aoti, onnx, openvino, executorch or "
        'auto, with options as in "inductor{freezing=true}"; see `torchlathe backends`',
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="also write what the backend made: .pt2 of aoti, .onnx, .xml of openvino, .pte of "
        "executorch, a folder of checkpoint",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="save the compiled model (.tl)")
    parser.add_argument(
        "--save-module",
        metavar="DIR",
        help="with --backend module, for a model of transformers: let its own save_pretrained "
        "write it there",
    )
    parser.add_argument("--report", metavar="FILE", help="write the report as a page, or as .json")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--verify",
        choices=("off", "fast", "full"),
        default="fast",
        metavar="LEVEL",
        help="off, fast (default) or full: how much is checked after each pass",
    )
    parser.add_argument(
        "--no-latency", action="store_true", help="do not spend time on measuring latency"
    )
    parser.add_argument(
        "--print-ir-after",
        metavar="PASSES",
        help="print the program after these passes (all, or names with commas)",
    )
    parser.add_argument("--dump-ir", metavar="DIR", help="write the program after each pass there")
    parser.set_defaults(run=run, parser=parser)


def add_model_arguments(parser: Parser) -> None:
    """What every command takes that works on a model."""
    parser.add_argument("model", metavar="MODEL", help="which model; see below")
    parser.add_argument(
        "--inputs",
        metavar="SPEC",
        help='example inputs, as in "float32[batch=2,3,224,224]" or '
        '"input_ids=int64[2,16]<1000,attention_mask=int64[2,16]"; named dimensions are dynamic',
    )
    parser.add_argument(
        "--dynamic",
        choices=("auto", "none"),
        metavar="HOW",
        help="auto: the batch is dynamic; none: all dimensions are as in the example",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="take passes and op rules from this Python file",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all that is random (default 0)"
    )


def add_data_arguments(parser: Parser) -> None:
    """What a command takes whose passes may need data."""
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="batches for passes that need data: a .safetensors or .npz file of tensors with a "
        "row per sample, or a function in Python that returns batches (file.py:function)",
    )
    parser.add_argument(
        "--calibration-batch",
        type=int,
        metavar="N",
        help="rows of such a file in a batch; by default as many as the example inputs have",
    )
    parser.add_argument(
        "--calibration-memory",
        type=int,
        metavar="MIB",
        help="memory for the matrices that are collected from the data (default 2048); what does "
        "not fit is in memory-mapped files",
    )
    parser.add_argument(
        "--calibration-spill",
        metavar="DIR",
        help="folder for these files; by default the temporary one",
    )
    parser.add_argument(
        "--calibration-resume",
        metavar="DIR",
        help="keep there what was collected so far, and go on from it after an interruption",
    )
    parser.add_argument(
        "--loss",
        metavar="LOSS",
        help="for passes that need gradients: cross-entropy, mse, or a function in Python that "
        "takes (outputs, batch); a model that returns its own loss needs none",
    )


def add_meta_argument(parser: Parser) -> None:
    """What a command takes that does not need the values of a model."""
    parser.add_argument(
        "--meta",
        action="store_true",
        help="make the model without values or memory for them, on the meta device; a "
        "transformers config too large for the machine is so in any case",
    )


def run(parsed: argparse.Namespace) -> int:
    """Compile, save and report."""
    text = pipeline_text(parsed.passes)
    for path in (parsed.output, parsed.report):
        check_writable(path)
    if parsed.save_module and parsed.backend != "module":
        raise UsageError("--save-module needs --backend module")
    # Before the model, which takes time to load: a misspelt option is found at once.
    from torchlathe.backends import get_backend
    from torchlathe.passes import load_plugin, parse_pipeline

    for plugin in parsed.plugin:
        load_plugin(plugin)
    passes = parse_pipeline(text)
    if get_backend(parsed.backend).name != "checkpoint":  # which writes a folder
        check_writable(parsed.export)
    loss = _checked_data(parsed)
    compiled = _compile(parsed, passes, loss)
    report: Report = compiled.report
    if parsed.output:
        compiled.save(parsed.output)
    if parsed.export:
        compiled.export(parsed.export)
    if parsed.save_module:
        _save_module(compiled, parsed.save_module)
    if parsed.report:
        write_report(report, Path(parsed.report))
    if parsed.json:
        print(report.to_json(), end="")
    else:
        from torchlathe.tools.cli.console import output

        report.print(output())
        _say_written(parsed)
    return 0


def _save_module(compiled: CompiledModel, folder: str) -> None:
    save = getattr(compiled.module, "save_pretrained", None)
    if save is None:
        raise UsageError(
            f"{type(compiled.module).__name__} has no save_pretrained; -o FILE saves every model"
        )
    save(folder)


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON or as a page, by the name of the file."""
    if path.suffix == ".json":
        report.save(path)
    else:
        report.to_html(path)


def _checked_data(parsed: argparse.Namespace) -> Loss | None:
    """The loss, after a look at what was said of the data."""
    from torchlathe.tools.calibration import check_calibration, load_loss

    for name, least in (("batch", 1), ("memory", 0), ("spill", None), ("resume", None)):
        value = getattr(parsed, f"calibration_{name}")
        if value is not None and parsed.calibration is None:
            raise UsageError(f"--calibration-{name} needs --calibration")
        if value is not None and least is not None and value < least:
            raise UsageError(f"--calibration-{name} is {value}, but must be at least {least}")
    if parsed.calibration is not None:
        check_calibration(parsed.calibration)
    return None if parsed.loss is None else load_loss(parsed.loss)


def _compile(parsed: argparse.Namespace, passes: list[Pass], loss: Loss | None) -> CompiledModel:
    from torchlathe._compile import compile as compile_model
    from torchlathe.tools.cli.progress import Progress
    from torchlathe.tools.models import load_model

    with Progress() as progress:
        progress.say(f"loading {parsed.model}")
        named = load_model(
            parsed.model, inputs=parsed.inputs, dynamic=parsed.dynamic, seed=parsed.seed
        )
        data = _data(parsed, named)
        compiled = compile_model(
            named.model,
            passes,
            named.args,
            example_kwargs=named.kwargs,
            dynamic_shapes=named.dynamic_shapes,
            calibration=data,
            loss=loss,
            backend=parsed.backend,
            verify=parsed.verify,
            instruments=_instruments(parsed, progress),
            measure_latency=not parsed.no_latency,
            progress=progress.say,
            seed=parsed.seed,
        )
    compiled.report = replace(compiled.report, notes=(*compiled.report.notes, *named.notes))
    return compiled


def _data(parsed: argparse.Namespace, named: NamedModel) -> Calibration | None:
    from torchlathe.passes.statistics import Calibration
    from torchlathe.tools.calibration import load_calibration

    if parsed.calibration is None:
        return None
    memory = parsed.calibration_memory
    return Calibration(
        load_calibration(parsed.calibration, named, parsed.calibration_batch),
        limit_bytes=None if memory is None else memory * 2**20,
        spill=parsed.calibration_spill,
        resume=parsed.calibration_resume,
    )


def _instruments(parsed: argparse.Namespace, progress: Any) -> list[Instrument]:
    from torchlathe.passes import DumpIR, PrintIR

    found: list[Instrument] = [progress.instrument()]
    if parsed.print_ir_after:
        found.append(PrintIR(after=parsed.print_ir_after))
    if parsed.dump_ir:
        found.append(DumpIR(parsed.dump_ir))
    return found


def pipeline_text(given: str) -> str:
    """The text of a pipeline, or of the file that ``@FILE`` names."""
    if not given.startswith("@"):
        return given
    path = Path(given[1:])
    if not path.is_file():
        raise UsageError(f"there is no pipeline file {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.partition("#")[0].strip() for line in lines).strip()


def check_writable(given: str | None) -> None:
    """Find out before the work is done, not after it."""
    if given is None:
        return
    path = Path(given)
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)


def _say_written(parsed: argparse.Namespace) -> None:
    from rich.text import Text

    from torchlathe.tools.cli.console import output

    console = output()
    for name, path in (
        ("model", parsed.output),
        ("exported model", parsed.export),
        ("module", parsed.save_module),
        ("report", parsed.report),
    ):
        if path:
            console.print(Text(f"wrote the {name} to {path}"), soft_wrap=True)
