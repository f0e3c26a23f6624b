"""What runs a model: the original on several runtimes, and what torchlathe makes of it."""

from __future__ import annotations

import copy
import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from torchlathe.tools.bench.end_to_end.cases import Case, Model

__all__ = ["BASE", "artefact", "compressed", "contestants"]

BASE: Final = "original, inductor"


def contestants(
    case: Case, model: Model, work: Path, torchao: str | None
) -> dict[str, Callable[[], Callable[..., Any]]]:
    """What makes each contestant, by its name in the table; the base is the first.

    Args:
        case: Of which the pipelines are.
        model: The model of the case.
        work: Folder where compressed programs are kept, so that passes run once.
        torchao: Folder with torchao; None leaves it out.
    """
    import torchlathe as tl
    from torchlathe.backends import CompiledModel

    args, kwargs = model.example
    programs: list[Any] = []

    def program() -> Any:
        if not programs:
            programs.append(tl.capture(model.module, args, kwargs))
        return programs[0].copy()

    def plain(backend: str) -> Callable[[], Any]:
        return lambda: CompiledModel(program(), backend, source=model.module)

    def ours(passes: str, backend: str) -> Callable[[], Any]:
        return lambda: tl.load(compressed(case, model, passes, work, program), backend=backend)

    found: dict[str, Callable[[], Any]] = {
        BASE: plain("inductor{short-attention=0}"),  # what torch.compile makes of it
        "original, eager": lambda: model.module,
        "original, onnxruntime fp32": plain("onnx"),
        "original, onnxruntime dynamic int8": lambda: _onnxruntime_int8(program(), model.module),
        "original, OpenVINO fp32": plain("openvino"),
    }
    if torchao is not None:
        found["torchao int8 + inductor"] = lambda: _torchao(model.module, torchao)
    for passes, backend in case.pipelines:
        if passes:
            found[f"torchlathe {passes} · {backend}"] = ours(passes, backend)
        elif backend not in ("openvino", "onnx"):
            found[f"torchlathe no passes · {backend}"] = plain(backend)
    return found


def artefact(case: Case, passes: str, work: Path) -> Path:
    """Where the compressed program of a pipeline is kept."""
    key = hashlib.sha256(f"{case.name}\n{passes}\n{torch.__version__}".encode()).hexdigest()
    return work / f"{key[:16]}.tl"


def compressed(
    case: Case, model: Model, passes: str, work: Path, program: Callable[[], Any] | None = None
) -> Path:
    """The artefact of a pipeline, which is made if it is not there.

    Args:
        case: Of the model.
        model: What is compressed.
        passes: The pipeline.
        work: Folder of artefacts.
        program: Gives the captured program; None: it is captured here.
    """
    import torchlathe as tl
    from torchlathe.backends import CompiledModel

    path = artefact(case, passes, work)
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        args, kwargs = model.example
        before = tl.capture(model.module, args, kwargs) if program is None else program()
        manager = tl.PassManager(passes, verify="off")
        after = manager.run(before, calibration=model.calibration)
        CompiledModel(after, "eager", source=model.module, check=False).save(path)
    return path


def _onnxruntime_int8(program: Any, model: nn.Module) -> Callable[..., Any]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from torchlathe.backends import CompiledModel
    from torchlathe.tools.model_bench.contestants import contestant

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        CompiledModel(program, "onnx", source=model, check=False).export(path)
        # Shapes that the exporter wrote down contradict those of weights that are turned around.
        found = onnx.load(str(path))
        found.graph.ClearField("value_info")
        onnx.save(found, str(path))
        quantised = path.with_name("int8.onnx")
        quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, per_channel=True)
        one = contestant(str(quantised), (), {}, dynamic=False, seed=0)
    return one.run


def _torchao(model: nn.Module, folder: str) -> Callable[..., Any]:
    if folder not in sys.path:
        sys.path.append(folder)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    own = copy.deepcopy(model)
    quantize_(own, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(own, options={"freezing": True})
