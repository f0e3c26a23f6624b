"""The openvino backend: Intel's runtime, from torch's exported program."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from torchlathe.backends.base import Capabilities, Configured, Lowerable
from torchlathe.backends.exporting import Boundary, exported_program
from torchlathe.ir import BackendError, OptionError
from torchlathe.ir.files import atomic, copy_file
from torchlathe.ir.quiet import logging_kept, quiet_torch

__all__ = ["OpenVino", "RequestRun"]


@dataclass(frozen=True)
class OpenVino(Configured):
    """Converts by ``openvino.convert_model``, and runs on OpenVINO's CPU device.

    ``compiled.export("model.xml")`` writes the model, with its weights in ``model.bin``.

    Args:
        precision: What floating ops are computed in. ``"native"`` leaves it to OpenVINO, which
            takes bfloat16 on processors that have it; the check knows of no wider tolerance.
        threads: None: as many as torch has when the model is compiled.
        hint: Whether one request is to be fast, or many at once.
    """

    name: ClassVar[str] = "openvino"

    precision: Literal["f32", "bf16", "f16", "native"] = "f32"
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"

    def __post_init__(self) -> None:
        """Hold the options to their types and ranges.

        Raises:
            OptionError: A value that cannot be.
        """
        super().__post_init__()
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be at least 1, got {self.threads}")

    @property
    def capabilities(self) -> Capabilities:
        """Inference on tensors of the CPU, in the dtypes that its CPU plugin has."""
        return Capabilities(
            dtypes=(torch.float32, torch.float16, torch.float64),
            devices=("cpu",),
            packages=("openvino",),
            extra="openvino",
        )

    def lower(self, source: Lowerable) -> RequestRun:
        """Convert the program, and compile it for the CPU.

        Raises:
            BackendError: An op that OpenVINO does not have.
        """
        import openvino

        exported, boundary = exported_program(source)
        core = openvino.Core()
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": self.hint.upper(),
            "INFERENCE_NUM_THREADS": self.threads or torch.get_num_threads(),
        }
        if self.precision != "native":
            config["INFERENCE_PRECISION_HINT"] = self.precision
        try:
            with quiet_torch(), logging_kept(), torch.no_grad():
                model = openvino.convert_model(exported)
                compiled = core.compile_model(model, "CPU", config)
        except Exception as error:
            text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
            raise BackendError(
                f"OpenVINO does not take {source.name}: {text[:500]}",
                hint='backend="eager" runs every program',
            ) from error
        return RequestRun(model, compiled, boundary)


class RequestRun:
    """A compiled model of OpenVINO as a function of flat inputs.

    Args:
        model: As it was converted.
        compiled: As it was compiled for the device.
        boundary: Between the program's inputs and outputs and the model's.
    """

    def __init__(self, model: Any, compiled: Any, boundary: Boundary) -> None:
        self._model = model
        self._request = compiled.create_infer_request()
        self._boundary = boundary
        count = len(compiled.outputs)
        if len(compiled.inputs) != len(boundary.inputs) or count != len(boundary.outputs):
            raise BackendError(
                f"OpenVINO gives {len(compiled.inputs)} inputs and {count} outputs, of "
                f"{len(boundary.inputs)} and {len(boundary.outputs)}",
                hint='backend="eager" runs every program',
            )
        self._count = count

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run a request; what goes in shares its memory, what comes out is copied."""
        arrays = [t.detach().contiguous().numpy() for t in self._boundary.tensors(inputs)]
        found = self._request.infer(arrays, share_inputs=True, share_outputs=True)
        return self._boundary.flat([torch.tensor(found[i]) for i in range(self._count)])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the model, and its weights beside it.

        Raises:
            OptionError: The name does not end in ``.xml``.
        """
        import openvino

        target = Path(path)
        if target.suffix != ".xml":
            raise OptionError(f"OpenVINO writes .xml with a .bin beside it, not {target.name}")
        with atomic(target) as draft:
            openvino.save_model(self._model, str(draft), compress_to_fp16=False)
            weights = draft.with_suffix(".bin")
            copy_file(weights, target.with_suffix(".bin"))
            weights.unlink()
