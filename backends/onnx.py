"""The onnx backend: torch's exporter, and ONNX Runtime to run what it gives."""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from torchlathe.backends.base import Capabilities, Configured, Lowerable
from torchlathe.backends.exporting import Boundary, exported_program
from torchlathe.backends.onnx_quantised import rewrite_quantised, translations
from torchlathe.ir import BackendError, OptionError
from torchlathe.ir.files import copy_file
from torchlathe.ir.quiet import quiet_torch

__all__ = ["Onnx", "SessionRun"]

_LIMIT = 2**31 - 2**20  # a protobuf message of 2 GiB cannot be written


@dataclass(frozen=True)
class Onnx(Configured):
    """Exports by ``torch.onnx.export(dynamo=True)``, and runs in ONNX Runtime.

    ``compiled.export("model.onnx")`` writes the model, with the weights in ``model.onnx.data``
    beside it where they are more than 2 GiB. Inputs and outputs have the names of the graph's, and
    dynamic dimensions stay dynamic. Linear layers of the `quantize` pass become integer products
    (``w8a8``), or the contrib op ``MatMulNBits`` (``w4a16``, ``w8a16``); what else is quantised is
    spelled out in standard ops.

    Args:
        opset: Version of the operator set; None: torch's own choice.
        optimize: Let the exporter fold constants and remove what is not needed.
        int8_products: Let weights of few bits be multiplied by activations that are rounded to 8
            bits, block by block (``accuracy_level`` 4 of ``MatMulNBits``).
        graph_level: How far ONNX Runtime optimises the graph.
        threads: Of one op; None: as many as torch has when the model is compiled.
        providers: Execution providers of ONNX Runtime, the preferred one first.
    """

    name: ClassVar[str] = "onnx"

    opset: int | None = None
    optimize: bool = True
    int8_products: bool = False
    graph_level: Literal["none", "basic", "extended", "all"] = "all"
    threads: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    def __post_init__(self) -> None:
        """Hold the options to their types and ranges.

        Raises:
            OptionError: A value that cannot be.
        """
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be at least 1, got {self.threads}")
        if not self.providers:
            raise OptionError("providers must name at least one execution provider")

    @property
    def capabilities(self) -> Capabilities:
        """Inference on tensors of the CPU, in the dtypes that its CPU kernels have."""
        return Capabilities(
            dtypes=(torch.float32, torch.float64, torch.float16),
            devices=("cpu",),
            packages=("onnx", "onnxruntime", "onnxscript"),
            extra="onnx",
        )

    def lower(self, source: Lowerable) -> SessionRun:
        """Export the program, and start a session.

        Raises:
            BackendError: An op that the exporter or the runtime does not have.
        """
        level = 4 if self.int8_products else 0
        exported, boundary = exported_program(
            source, rewrite=lambda module: rewrite_quantised(module, level=level)
        )
        try:
            with quiet_torch(), torch.no_grad():
                made = torch.onnx.export(
                    exported,
                    dynamo=True,
                    opset_version=self.opset,
                    optimize=self.optimize,
                    input_names=list(boundary.inputs),
                    output_names=list(boundary.outputs),
                    custom_translation_table=translations(),
                    verbose=False,
                )
        except Exception as error:
            raise BackendError(
                f"torch.onnx could not export {source.name}: {_innermost(error)}",
                hint='backend="eager" runs every program',
            ) from error
        assert made is not None
        _set_apart(made.model.graph)
        folder = tempfile.TemporaryDirectory(prefix="torchlathe-onnx-")
        path = Path(folder.name) / "model.onnx"
        made.save(str(path), external_data=_bytes(made.model) > _LIMIT)
        return SessionRun(self._session(path), boundary, folder)

    def _session(self, path: Path) -> Any:
        import onnxruntime

        unknown = [p for p in self.providers if p not in onnxruntime.get_available_providers()]
        if unknown:
            raise BackendError(
                f"ONNX Runtime has no {', '.join(unknown)} here",
                hint=f"it has {', '.join(onnxruntime.get_available_providers())}",
            )
        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(
            levels, f"ORT_{'DISABLE' if self.graph_level == 'none' else 'ENABLE'}_"
            f"{'ALL' if self.graph_level in ('none', 'all') else self.graph_level.upper()}",
        )  # fmt: skip
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=list(self.providers))
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime refuses the model: {' '.join(str(error).splitlines()[:2])[:500]}",
                hint='backend="eager" runs every program',
            ) from error


class SessionRun:
    """A session of ONNX Runtime as a function of flat inputs.

    Args:
        session: The session.
        boundary: Between the program's inputs and outputs and the model's.
        folder: Temporary folder with the model, which goes with this object.
    """

    def __init__(
        self, session: Any, boundary: Boundary, folder: tempfile.TemporaryDirectory[str]
    ) -> None:
        self._session = session
        self._boundary = boundary
        self._folder = folder
        self._finalizer = weakref.finalize(self, folder.cleanup)
        # The exporter may leave out an input that nothing reads.
        known = {value.name for value in session.get_inputs()}
        self._feeds = [(i, n) for i, n in enumerate(boundary.inputs) if n in known]
        self._names = [value.name for value in session.get_outputs()]

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the session; tensors and arrays share their memory."""
        tensors = self._boundary.tensors(inputs)
        feeds = {name: tensors[i].detach().contiguous().numpy() for i, name in self._feeds}
        outputs = self._session.run(self._names, feeds)
        return self._boundary.flat([torch.from_numpy(_writable(value)) for value in outputs])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the model, each of its files at once or not at all."""
        folder = Path(self._folder.name)
        _write_model(folder / "model.onnx", Path(path))


def _set_apart(graph: Any) -> None:
    """Give values inside a graph other names than its outputs have.

    The exporter gives outputs the names that it is told, and values inside those that the ops of
    its own export got, which may be the same ones.
    """
    outputs = {value.name: value for value in graph.outputs}
    constants = list(graph.initializers.values())
    inside = [*constants, *(value for node in graph for value in node.outputs)]
    taken = {value.name for value in (*inside, *graph.inputs)} | outputs.keys()
    for value in inside:
        if value.name not in outputs or value is outputs[value.name]:
            continue
        name = f"{value.name}_inside"
        while name in taken:
            name += "_"
        taken.add(name)
        is_constant = any(value is constant for constant in constants)
        if is_constant:
            del graph.initializers[value.name]
        value.name = name
        if is_constant:
            graph.register_initializer(value)


def _writable(value: Any) -> Any:
    # A scalar comes as a NumPy number, and some arrays of constants are read-only.
    import numpy

    array = numpy.asarray(value)
    return array if array.flags.writeable else array.copy()


def _write_model(model: Path, path: Path) -> None:
    data = model.with_name("model.onnx.data")
    if not data.exists():
        copy_file(model, path)
        return
    import onnx

    # The file of the weights is named in the model, by the name that it has beside it.
    found = onnx.load(str(model), load_external_data=False)
    for tensor in found.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{path.name}.data"
    renamed = model.with_name("renamed.onnx")
    onnx.save(found, str(renamed))
    copy_file(data, path.with_name(f"{path.name}.data"))
    copy_file(renamed, path)


def _bytes(model: Any) -> int:
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def _innermost(error: BaseException) -> str:
    """What was the matter: the exporter wraps it in advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(line.strip() for line in str(error).splitlines()[:3])
    return f"{type(error).__name__}: {text[:500]}"
